"""Cases of bench/faults.py: where a data set is written."""

import signal
import subprocess
import time

import numpy as np

from bench.faulty.expect import (
    Prepared,
    differ,
    either,
    expect_prepared,
    read_shards,
    refused,
)
from bench.faulty.inputs import (
    class_folders,
    image_cells,
    stack,
    write,
    write_arrays,
    write_table,
)
from bench.faulty.raw import raw_parts
from bench.faulty.stage import DEIT_RAY, Launch, Reader, Stage, case, digests, start

OVERLAP = r"overlap|inside|same (folder|as|place)|is SOURCE|the source|holds? .*(files?|not)|not empty"
OTHERS = (
    r"not (empty|written by|ours|deit-ray|a data set|made|in its manifest)|other files|did not write|"
    r"nothing that|no data set of|foreign|choose|another folder|empty"
)


@case(
    "out_is_source",
    "prepare",
    parquet=("parquet",),
    folders_inside=("inside",),
    parent=("parent",),
    link=("link",),
    array=("array",),
    dots=("dots",),
    uri=("uri",),
)
def out_is_source(stage: Stage, how: str) -> None:
    """OUT and SOURCE overlap by their real paths: refused, and no file changes."""
    source, out = stage / "mine", "mine"
    if how in ("parquet", "link", "uri"):
        for number in range(2):
            cells = image_cells(12, 40 * number)
            write_table(source / f"train-{number:05d}.parquet", image=cells, label=[i % 2 for i in range(12)])
        write_table(source / "test-00000.parquet", image=image_cells(6, 90), label=[0, 1] * 3)
    elif how == "array":
        write_arrays(source / "arrays.npz", stack(20), np.arange(20) % 2)
        write(source / "manifest.json", "{}")
    else:
        class_folders(source)
    words = {"inside": "mine/prepared", "parent": ".", "link": "alias", "dots": "x/../mine/pear"}
    out = words.get(how, "mine")
    if how == "link":
        (stage / "alias").symlink_to(source)
    if how == "dots":
        (stage / "x").mkdir()
    if how == "uri":
        out = source.as_uri()
    given = "mine/arrays.npz" if how == "array" else "mine"
    stage.outs = ("out",)
    expect_prepared(stage, given, refused(r"out|" + OVERLAP), out=out)


@case(
    "out_has_others_files",
    "prepare",
    extension=("extension",),
    project=("project",),
    added=("added",),
    cut_manifest=("cut",),
    a_file=("file",),
    hidden_parts=("parts",),
)
def out_has_others_files(stage: Stage, how: str) -> None:
    """Files in OUT that are not the product's stay as they are, or OUT is refused."""
    class_folders(stage / "mine")
    out, expected = stage / "out", refused(OTHERS + r"|out")
    if how == "extension":
        write(out / "manifest.json", '{"manifest_version": 3, "name": "tabs"}')
        write(out / "unreadable.csv", "name,reason\nmy own list,\n")
        write_table(out / "train-clicks.parquet", a=[1, 2])
    elif how == "project":
        write(out / "README.md", "# my project\n")
        write(out / "train-00000.parquet", b"PAR1 mine PAR1")
        write(out / "test-00000.parquet", b"PAR1 mine PAR1")
    elif how == "added":
        stage.setup("data", "prepare", "mine", "--out", "out")
        write(out / "notes.txt", "what I tried\n")
        write(out / "train-00007.parquet", b"PAR1 mine PAR1")
        write(out / "test-extra.parquet", b"PAR1 mine PAR1")
        class_folders(stage / "mine", ("fig",))
        samples = class_folders(stage / "mine", ("apple", "fig", "pear"))
        expected = either(expected, Prepared({"all": samples}))
    elif how == "cut":
        write(out / "manifest.json", '{"format": 1, "classes": ["a"')
        write(out / "train-00000.parquet", b"PAR1 mine PAR1")
    elif how == "file":
        write(out, "a letter")
        expected = refused("out", "file|folder|director")
    else:
        write(out / ".parts" / "thesis.txt", "chapter 1\n")
        write(out / ".git" / "config", "[core]\n")
    expect_prepared(stage, "mine", expected)


@case("another_data_set", "prepare", source=("two", ()), settings=("mine", ("--short-side", "32")))
def another_data_set(stage: Stage, source: str, options: tuple) -> None:
    """A data set of another source, or with other settings, is replaced with a line that names it."""
    samples = class_folders(stage / "mine")
    stage.setup("data", "prepare", "mine", "--out", "out")
    if source == "two":
        samples = class_folders(stage / "two", each=8, first=7000)
    words = ("replaced", r"\b16 train", "prepare mine --out out")
    expect_prepared(stage, source, Prepared({"all": samples}, words=words), *options)


@case("two_prepares", "prepare", same=("same",), different=("different",))
def two_prepares(stage: Stage, how: str) -> None:
    """Two at once into one OUT: whoever exits 0 has its own images there, and nobody dies of the other."""
    one = class_folders(stage / "one", each=120)
    two = class_folders(stage / "two", each=120, first=7000) if how == "different" else one
    stage.before = digests(stage.root)
    processes = []
    for source in ("one", "two" if how == "different" else "one"):
        launch = Launch([*DEIT_RAY, "data", "prepare", source, "--out", "out"], stage.root, stage.environment)
        processes.append(start(launch, 0))
        time.sleep(0.2)
    ended = [finish(stage, process, ends) for process, ends in processes]
    winners = [samples for samples, (status, _) in zip((one, two), ended, strict=True) if status == 0]
    for status, text in ended:
        if status not in (0, 1, 2):
            stage.fault("raw", f"two prepares: exit status {status}: {text[-200:]}")
        elif status and "error: " not in text:
            stage.fault("silent", f"two prepares: exit status {status} without an error: {text[-200:]}")
        elif status and not any(
            word in text for word in ("another", "already", "lock", "running", "process")
        ):
            stage.fault("silent", f"two prepares: the one that fails does not name the other: {text[-200:]}")
    if not winners:
        stage.fault("silent", "two prepares: none of them has prepared OUT")
        return
    found = [sample for samples in read_shards(stage / "out").values() for sample in samples]
    wrong = [differ(samples, found) for samples in winners]
    if None not in wrong or (len(winners) == 2 and how == "same" and any(wrong)):
        stage.fault("silent", f"two prepares: exit status 0, but OUT holds other images: {wrong[0]}")
    if how == "different" and len(winners) == 2 and ended[0][0] == ended[1][0] == 0:
        overlapped(stage, wrong)


def overlapped(stage: Stage, wrong: list) -> None:
    """Both exit 0: the second must have waited for the first, so OUT holds the images of exactly one."""
    if sum(found is None for found in wrong) != 1:
        stage.fault("silent", "two prepares of different sources: OUT holds images of both or of neither")


def finish(stage: Stage, process: subprocess.Popen, ends: dict[int, int]) -> tuple[int, str]:
    """Waits for a process; its exit status and output, which is judged for `raw`."""
    reader = Reader(ends)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        reader.read(0.05)
    if process.poll() is None:
        process.kill()
        process.wait()
        stage.fault("late", "has not ended within 120 s")
    reader.read(0.0, rest=True)
    text = "".join(reader.texts())
    for part in raw_parts(text):
        stage.fault("raw", part)
    return process.returncode, text


@case("killed_prepare", "prepare", twice=("SIGKILL",))
def killed_prepare(stage: Stage, name: str) -> None:
    """A killed preparation leaves a lock that stops nobody: the same command, run again, ends it."""
    samples = class_folders(stage / "mine", each=150)

    def kill(process):
        if (stage / "out").exists() and any((stage / "out").rglob("*")):
            process.send_signal(getattr(signal, name))
            return True

    stage.run("data", "prepare", "mine", "--out", "out", during=kill, answers=False)
    stage.faults.clear()
    expect_prepared(stage, "mine", Prepared({"all": samples}))


@case("full_disk", "environment", prepare=("200k",))
def full_disk(stage: Stage, size: str) -> None:
    """A disk that is full while a data set is prepared: one sentence, nothing half-written."""
    class_folders(stage / "mine", each=200)
    disk = stage / "out"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    subprocess.run(mount, check=True)
    stage.undo.append(lambda: subprocess.run(["umount", "-l", str(disk)], check=True))
    expect_prepared(stage, "mine", refused(r"no space|full", "out"))
