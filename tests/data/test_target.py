"""Nothing of a person's is lost: where `prepare` may write, what it may delete, one preparation at a time."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from deit_ray.data import shards
from deit_ray.data.check import check
from deit_ray.data.claim import LOCK, claimed
from deit_ray.data.prepare import prepare
from deit_ray.errors import UnavailableError, UserError
from tests.support.commands import call
from tests.support.sources import snapshot, write, write_classes

TWO = {"cat": 10, "dog": 10}


@pytest.fixture
def source(tmp_path) -> Path:
    write_classes(tmp_path / "source", TWO)
    return tmp_path / "source"


def refuse(source, out, *says: str) -> None:
    """Runs `data prepare`, which must be refused."""
    ended = call("data", "prepare", source, "--out", out)
    assert ended.status, ended
    for text in says:
        assert text in ended.error


def other_program(out: Path) -> None:
    write(out / "manifest.json", b'{"name": "a browser extension"}')
    write(out / "unreadable.csv", b"mine\n")
    write(out / "train-mydata.parquet", b"mine")


def prepare_ours(out: Path) -> None:
    write_classes(out.parent / "another", TWO, 2000)
    prepare(str(out.parent / "another"), str(out), shard_images=8)


def change_manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Prepares a data set in a folder, and then changes its manifest."""

    def make(out: Path) -> None:
        prepare_ours(out)
        manifest = json.loads((out / "manifest.json").read_text())
        changed = change(manifest)
        (out / "manifest.json").write_text(json.dumps(changed or manifest))

    return make


def unfinished_of_others(out: Path) -> None:
    write(out / ".parts" / "notes.txt", b"mine")


def own_shard_without_manifest(out: Path) -> None:
    prepare_ours(out)
    (out / "manifest.json").unlink()


NOT_OURS = "manifest.json there was not written by this version of deit-ray, or was changed since"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (other_program, NOT_OURS),
        (lambda out: write(out / "manifest.json", b"[1, 2]"), NOT_OURS),
        (lambda out: write(out / "manifest.json", b"not JSON"), NOT_OURS),
        (lambda out: write(out / "manifest.json", b"\xff"), NOT_OURS),
        (change_manifest(lambda m: m | {"format": 2}), NOT_OURS),
        (change_manifest(lambda m: m | {"classes": ["zero", *m["classes"][1:]]}), NOT_OURS),
        (change_manifest(lambda m: m["splits"]["train"][0].pop("sha256") and None), NOT_OURS),
        (change_manifest(lambda m: m["splits"]["train"][0].update(file="../mine.txt")), NOT_OURS),
        (
            lambda out: write(out / "mine.txt", b"mine"),
            "is not empty, and holds no data set of deit-ray but mine",
        ),
        (lambda out: write(out / ".mine", b"mine"), "holds no data set of deit-ray but .mine"),
        (lambda out: (out / "folder").mkdir(parents=True), "holds no data set of deit-ray but folder"),
        (own_shard_without_manifest, "holds no data set of deit-ray but test-00000.parquet"),
        (unfinished_of_others, "deit-ray did not write the folder .parts there, which holds notes.txt"),
        (lambda out: write(out, b"mine"), "is a file; --out must be a folder"),
        (lambda out: out.symlink_to("gone"), "is a link that leads nowhere"),
    ],
)
def test_a_folder_that_is_not_ours_is_refused_and_stays_as_it_is(source, tmp_path, make, says):
    out = tmp_path / "out"
    make(out)
    before = snapshot(tmp_path)
    refuse(source, out, f"--out {out}: ", says)
    assert snapshot(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_an_error_of_one_line(source, tmp_path):
    write(tmp_path / "file", b"mine")
    refuse(source, tmp_path / "file" / "new" / "out", f"cannot be made: {tmp_path / 'file'} is no folder")
    refuse(source, "/proc/out", "--out /proc/out: cannot be written")


@pytest.mark.parametrize(
    ("given", "out", "relation"),
    [
        ("source", "source", "is SOURCE"),
        ("source/", "source/../source", "is SOURCE"),
        ("link", "source", "is SOURCE"),
        ("source", "link/", "is SOURCE"),
        ("source", "source/out", "is inside SOURCE"),
        ("source", "link/new/out", "is inside SOURCE"),
        ("source", "file://{}/source/out", "is inside SOURCE"),
        ("source/cat", "source", "holds SOURCE"),
        ("link/cat", "source", "holds SOURCE"),
        ("source", ".", "holds SOURCE"),
        ("pixels/x.npz", "pixels", "holds SOURCE"),
        ("pixels/x.npz", "pixels/x.npz", "is SOURCE"),
    ],
)
def test_a_folder_that_overlaps_with_the_source_is_refused(source, tmp_path, given, out, relation):
    (tmp_path / "link").symlink_to("source")
    write(tmp_path / "pixels" / "x.npz", b"mine")
    before = snapshot(tmp_path)
    place = out.format(tmp_path) if "{}" in out else f"{tmp_path}/{out}"
    refuse(f"{tmp_path}/{given}", place, relation, "choose another --out")
    assert snapshot(tmp_path) == before


def test_a_data_set_that_a_source_reads_over_links_is_not_replaced(tmp_path):
    prepare_ours(tmp_path / "out")
    (tmp_path / "source").mkdir()
    for name in ("train-00000.parquet", "test-00000.parquet"):
        (tmp_path / "source" / name).symlink_to(tmp_path / "out" / name)
    before = snapshot(tmp_path)
    refuse(tmp_path / "source", tmp_path / "out", "holds a file of SOURCE")
    assert snapshot(tmp_path) == before


def test_leftovers_of_the_system_make_no_folder_a_persons(source, tmp_path):
    (tmp_path / "out" / "lost+found").mkdir(parents=True)
    write(tmp_path / "out" / ".DS_Store", b"x")
    prepare(str(source), str(tmp_path / "out"))
    assert (tmp_path / "out" / ".DS_Store").read_bytes() == b"x"


def test_files_of_others_beside_a_data_set_stay_when_it_is_replaced(source, tmp_path):
    out = tmp_path / "out"
    prepare_ours(out)
    mine = dict.fromkeys(("README.md", "train-mydata.parquet", "train-00009.parquet", ".parts2"), b"mine")
    for name, content in mine.items():
        write(out / name, content)
    prepared = prepare(str(source), str(out))
    assert sorted(os.listdir(out)) == sorted(
        [*mine, "manifest.json", "test-00000.parquet", "train-00000.parquet"]
    )
    assert {name: (out / name).read_bytes() for name in mine} == mine
    assert check(str(out)).problems == []
    assert prepared.manifest.rows("train") == 16


@pytest.mark.parametrize(
    ("other", "options", "said"),
    [
        ("source", [], None),
        ("source", ["--quality", "80"], "holds a data set of the same source with other settings"),
        ("another", [], "holds a data set of another source"),
    ],
)
def test_what_is_replaced_is_said_before(source, tmp_path, other, options, said):
    out = tmp_path / "out"
    write_classes(tmp_path / "another", {"cat": 6, "dog": 6}, 2000)
    assert call("data", "prepare", source, "--out", out).status == 0
    again = call("data", "prepare", tmp_path / other, "--out", out, *options)
    assert again.status == 0
    lines = [line for line in again.err.splitlines() if ", which is replaced" in line]
    assert lines == [] if said is None else len(lines) == 1
    for line in lines:
        assert line.startswith(f"warning: --out {out}: {said} (16 train, 4 test images), which is replaced")
        assert line.endswith(f"it was made by: deit-ray data prepare {source} --out {out}")


def change(path: Path) -> bytes:
    """Replaces a label in a shard, as a person might; its metadata stays."""
    table = pq.read_table(path)
    pq.write_table(table, path)
    return path.read_bytes()


def test_a_shard_that_was_changed_is_not_replaced(source, tmp_path):
    out = tmp_path / "out"
    prepare_ours(out)
    changed = change(out / "train-00000.parquet")
    before = snapshot(out)
    with pytest.raises(UserError, match=r"train-00000.parquet there is not what deit-ray wrote"):
        prepare(str(source), str(out))
    assert snapshot(out) == before
    (out / "train-00000.parquet").unlink()
    later = change(out / "train-00001.parquet")
    prepared = prepare(str(source), str(out))
    assert prepared.notes == [f"train-00001.parquet is left in {out}: it was changed since deit-ray wrote it"]
    assert (out / "train-00001.parquet").read_bytes() == later
    assert changed != later


def test_a_damaged_shard_is_kept_beside_the_repaired_one(source, tmp_path):
    out = tmp_path / "out"
    whole = prepare(str(source), str(out)).manifest
    for number in (1, 2):
        write(out / "train-00000.parquet", b"damaged %d" % number)
        repaired = prepare(str(source), str(out))
        assert repaired.manifest == whole
        assert f"it is kept as train-00000.parquet.damaged-{number}, and made again" in repaired.notes[0]
        assert (out / f"train-00000.parquet.damaged-{number}").read_bytes() == b"damaged %d" % number
    assert check(str(out)).problems == []


def test_the_list_of_unreadable_images_is_replaced_only_if_it_is_ours(source, tmp_path):
    out = tmp_path / "out"
    write(source / "cat" / "broken.png", b"no image")
    listed = out / "unreadable.csv"
    assert prepare(str(source), str(out), max_bad=1).manifest.files.keys() == {"unreadable.csv"}
    prepare(str(source), str(out), quality=80, max_bad=1)
    listed.write_text("mine")
    with pytest.raises(UserError, match=r"unreadable.csv there is not what deit-ray wrote"):
        prepare(str(source), str(out), quality=70, max_bad=1)
    assert listed.read_text() == "mine"
    listed.unlink()
    prepare(str(source), str(out), quality=70, max_bad=1)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["files"]  # as an earlier version wrote it
    (out / "manifest.json").write_text(json.dumps(manifest))
    (source / "cat" / "broken.png").unlink()
    prepare(str(source), str(out))
    assert not listed.exists()


def test_a_data_set_stays_until_the_images_of_another_are_read(source, tmp_path):
    out = tmp_path / "out"
    prepare_ours(out)
    write(source / "cat" / "broken.png", b"no image")
    with pytest.raises(UserError, match="1 of 21 images cannot be read"):
        prepare(str(source), str(out))
    assert check(str(out)).problems == []
    assert shards.read_manifest(str(out)).rows("train") == 16
    write(out / ".parts" / "mine.txt", b"mine")
    (source / "cat" / "broken.png").unlink()  # this makes it another source
    prepared = prepare(str(source), str(out))
    assert prepared.notes == [f".parts is left in {out}: deit-ray did not write mine.txt there"]
    assert sorted(os.listdir(out)) == [".parts", "manifest.json", "test-00000.parquet", "train-00000.parquet"]
    assert os.listdir(out / ".parts") == ["mine.txt"]


# One preparation at a time, and one that is killed

HOLD = """
import sys, time
from contextlib import contextmanager
from deit_ray.data.prepare import prepare

@contextmanager
def stop_at(text, total):
    if text == sys.argv[3]:
        print("here", flush=True)
        time.sleep(600)
    yield lambda count: None

prepare(sys.argv[1], sys.argv[2], shard_images=10, progress=stop_at)
"""


@pytest.mark.parametrize("phase", ["reading images", "writing shards"])
def test_a_second_preparation_is_refused_and_a_killed_one_is_no_obstacle(source, tmp_path, phase):
    write_classes(tmp_path / "other", {"a": 10, "b": 10, "c": 10}, 1000)
    out = tmp_path / "out"
    prepare_ours(out)  # a data set that they replace
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, source, out, phase], stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "here\n"
        before = snapshot(out)
        for given in (source, tmp_path / "other"):
            refuse(given, out, f"another data prepare (process {first.pid} on ", "writes there now")
        assert snapshot(out) == before
        first.send_signal(signal.SIGKILL)
    assert (out / LOCK).exists()
    prepared = prepare(str(tmp_path / "other"), str(out))
    assert check(str(out)).problems == []
    assert prepared.manifest.classes == ["a", "b", "c"]
    assert sorted(os.listdir(out)) == ["manifest.json", "test-00000.parquet", "train-00000.parquet"]


def test_a_lock_keeps_what_else_has_its_name(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).symlink_to(tmp_path / "mine")
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UnavailableError, match="cannot be written"), claimed(str(tmp_path / "out")):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
