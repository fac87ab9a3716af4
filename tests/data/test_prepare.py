"""From a source to shards: digits, class folders of many kinds, and what is refused."""

import csv
import os
import re
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from deit_ray.cli.main import app
from deit_ray.data import shards, shuffle
from deit_ray.data.crop import decode
from deit_ray.data.prepare import prepare
from deit_ray.errors import UserError
from tests.support.commands import call
from tests.support.pictures import deep_png, image_file, smooth, turned
from tests.support.sources import write_classes


def write_image(path, size=(30, 40), grey=False, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if grey else (*size, 3)
    cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def folders(tmp_path):
    """10 cats and 5 dogs: PNG, JPEG, grey and colour, of several sizes."""
    for i in range(10):
        write_image(
            tmp_path / "pets" / "cat" / f"{i}.{'png' if i % 2 else 'jpg'}",
            (30 + i, 300),
            grey=i % 3 == 0,
            seed=i,
        )
    for i in range(5):
        write_image(tmp_path / "pets" / "dog" / f"{i}.JPEG", (500, 400), seed=i)
    return tmp_path / "pets"


def test_the_digits_are_split_by_class(digits):
    manifest = shards.read_manifest(digits)
    assert manifest.classes == [str(d) for d in range(10)]
    # scikit-learn's digits: 178 to 183 of each class, 1,797 in all; a fifth of each, rounded, is test
    classes = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert manifest.class_counts["test"] == [round(n / 5) for n in classes]
    assert manifest.class_counts["train"] == [n - round(n / 5) for n in classes]
    assert manifest.rows("train") + manifest.rows("test") == 1797


def test_rows_are_in_random_order(digits):
    (group,) = shards.read_row_groups(f"{digits}/train-00000.parquet", [0])
    labels = group["label"].to_pylist()
    assert len(set(labels)) == 10
    assert labels != sorted(labels)


def test_the_same_source_gives_the_same_bytes(tmp_path, digits):
    again = prepare("digits", str(tmp_path / "again")).manifest
    assert again.fingerprint == shards.read_manifest(digits).fingerprint


def test_a_flat_set_of_class_folders_is_split_and_the_counts_are_printed(folders, tmp_path):
    prepared = call("data", "prepare", folders, "--out", tmp_path / "out")
    assert prepared.status == 0, prepared
    assert "12 train, 3 test images of 2 classes" in prepared.out
    assert "cat: 8 train, 2 test" in prepared.out
    assert "dog: 4 train, 1 test" in prepared.out


def test_train_and_val_folders_are_kept_apart(folders, tmp_path):
    write_image(tmp_path / "split" / "val" / "dog" / "0.png")
    folders.rename(tmp_path / "split" / "train")
    manifest = prepare(str(tmp_path / "split"), str(tmp_path / "out")).manifest
    assert manifest.class_counts == {"train": [10, 5], "test": [0, 1]}


def test_images_become_rgb_jpeg_of_a_bounded_short_side(folders, tmp_path):
    prepare(str(folders), str(tmp_path / "out"), short_side=64)
    (table,) = shards.read_row_groups(str(tmp_path / "out" / "train-00000.parquet"), [0])
    shapes = {decode(image.as_buffer()).shape for image in table["image"]}
    assert (80, 64, 3) in shapes  # 500 x 400 scaled to a short side of 64
    assert all(shape[2] == 3 and min(shape[:2]) <= 64 for shape in shapes)


def test_test_images_keep_their_bytes_unless_a_size_is_given(tmp_path):
    for split in ("train", "test"):
        for number in range(2):
            for name in "ab":
                write_image(tmp_path / "source" / split / name / f"{number}.jpg", (500, 400), seed=number)
    source = {path.read_bytes() for path in (tmp_path / "source").rglob("*.jpg")}
    for given, kept, shape in (({}, True, (500, 400, 3)), ({"test_short_side": 64}, False, (80, 64, 3))):
        out = str(tmp_path / f"out-{kept}")
        prepare(str(tmp_path / "source"), out, short_side=32, **given)
        images = {}
        for split in ("train", "test"):
            (table,) = shards.read_row_groups(f"{out}/{split}-00000.parquet", [0])
            images[split] = [image.as_py() for image in table["image"]]
        assert {decode(image).shape for image in images["train"]} == {(40, 32, 3)}
        assert {decode(image).shape for image in images["test"]} == {shape}
        assert (set(images["test"]) <= source) == kept


def test_an_unreadable_image_is_left_out_and_listed_with_its_reason(folders, tmp_path):
    (folders / "dog" / "broken.jpg").write_bytes(b"no image")
    prepared = prepare(str(folders), str(tmp_path / "out"), max_bad=0.1)
    assert [name for names in prepared.unreadable.values() for name in names] == ["dog/broken.jpg"]
    assert sum(prepared.manifest.rows(split) for split in ("train", "test")) == 15
    with open(tmp_path / "out" / "unreadable.csv") as file:
        _, (split, name, reason) = csv.reader(file)
    assert prepared.manifest.unreadable == {split: 1}
    assert (name, reason) == ("dog/broken.jpg", 'not an image: it begins with "no image"')


def test_more_unreadable_images_than_allowed_stop_it_and_are_listed(folders, tmp_path):
    (folders / "dog" / "broken.jpg").write_bytes((folders / "dog" / "0.JPEG").read_bytes()[:5000])
    arguments = ["data", "prepare", str(folders), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    assert "1 of 16 images cannot be read, such as dog/broken.jpg (damaged: image file is truncated" in str(
        result.exception
    )
    assert "allowed are --max-bad 0.1%" in str(result.exception)
    (needed,) = re.findall(r"allow them with (--max-bad [0-9.]+%)", str(result.exception))
    assert "dog/broken.jpg" in (tmp_path / "out" / "unreadable.csv").read_text()
    with pytest.raises(UserError, match="no prepared data set there"):
        shards.read_manifest(str(tmp_path / "out"))
    assert CliRunner().invoke(app, [*arguments, *needed.split()]).exit_code == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such folder"),
        (lambda p: write_image(p / "only" / "1.png"), "holds 1 class folder .only.; at least 2"),
        (lambda p: (write_image(p / "a" / "1.png"), (p / "b").mkdir()), "b: holds no images"),
        (
            lambda p: [write_image(p / d / "1.png") for d in ("train/a", "train/b", "test/c")],
            "has the class 'c'",
        ),
    ],
)
def test_impossible_sources_are_refused(tmp_path, make, message):
    make(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        prepare(str(tmp_path / "source"), str(tmp_path / "out"))


def test_held_out_images_are_a_fixed_part_of_train(digits):
    manifest = shards.read_manifest(digits)
    train, val = (shards.row_groups(digits, manifest, split, 0.1) for split in ("train", "val"))
    assert val.images == round(0.1 * manifest.rows("train"))
    assert train.images + val.images == manifest.rows("train")
    assert int(val.first_id[0]) == train.images


def test_a_folder_that_is_no_data_set_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"no prepared data set there .* deit-ray data prepare SOURCE --out"):
        shards.read_manifest(str(tmp_path))
    (tmp_path / "a file").write_text("x")
    with pytest.raises(UserError, match=r"a file: is a file; .* deit-ray data prepare SOURCE --out FOLDER"):
        shards.read_manifest(str(tmp_path / "a file"))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff\xfe", b"null", b"[1, 2]", b'"x"', b"{}", b'{"format": 1}', b'{"format": 9}'),
        *(b'{"format": 1, "splits": []}', b'{"format": 1, "splits": {"train": [3]}}'),
        *(b'{"format": 1, "splits": {"train": [{}]}}', b'{"format": 1, "splits": {}, "more": 1}'),
    ],
)
def test_a_manifest_that_is_none_or_is_damaged_is_refused_with_the_remedy(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest.json: not a manifest of format 1, or damaged; .* --out"):
        shards.read_manifest(str(tmp_path))


# A preparation is resumed


def write_source(folder, count: int, size=(20, 24)):
    """Two classes of small noise JPEGs in train/ and test/. The first test image is also in train/."""
    for split, number in (("train", count), ("test", 10)):
        for i in range(number):
            write_image(
                folder / split / ("ab"[i % 2]) / f"{i:05d}.jpg",
                size,
                seed=i if split == "train" or i == 0 else 10**6 + i,
            )
    return str(folder)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".parquet", ".json")}


def test_the_bytes_do_not_depend_on_the_workers(tmp_path, ray_cluster, monkeypatch):
    monkeypatch.setattr(shuffle, "PART", 100)
    source = write_source(tmp_path / "source", 450)
    one = prepare(source, str(tmp_path / "one"), shard_images=128)  # in this process
    monkeypatch.setattr(shuffle, "PART", 70)
    many = prepare(source, str(tmp_path / "many"), shard_images=128, address="local")  # over Ray's four CPUs
    assert [len(found) for found in many.manifest.splits.values()] == [
        4,
        1,
    ]  # ceil(450 / 128), ceil(10 / 128)
    assert one.manifest == many.manifest
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert {path.name for path in (tmp_path / "many").iterdir()} == {
        shards.MANIFEST,
        *(s.file for f in many.manifest.splits.values() for s in f),
    }


def test_every_image_is_there_once_and_the_order_is_random_over_all_shards(tmp_path):
    source = write_source(tmp_path / "source", 400)
    prepare(source, str(tmp_path / "out"), shard_images=100)
    names = [
        pq.read_table(tmp_path / "out" / f"train-{n:05d}.parquet", columns=["name"])["name"].to_pylist()
        for n in range(4)
    ]
    numbers = [int(name.rpartition("/")[2].removesuffix(".jpg")) for shard in names for name in shard]
    assert sorted(numbers) == list(range(400))
    # 100 of 400 shuffled numbers have a mean of 199.5 with a standard error of 400 / sqrt(12 x 100) = 11.5
    assert all(abs(np.mean(numbers[first : first + 100]) - 199.5) < 4 * 11.5 for first in range(0, 400, 100))


def test_duplicates_between_train_and_test_are_counted_and_named(tmp_path):
    manifest = prepare(write_source(tmp_path / "source", 30), str(tmp_path / "out")).manifest
    assert manifest.duplicates == {"count": 1, "such as": ["a/00000.jpg"], "other class": 0}


@pytest.mark.parametrize("harm", ["remove", "damage"])
def test_only_shards_that_are_missing_or_damaged_are_made_again(tmp_path, harm):
    source, out = write_source(tmp_path / "source", 400), tmp_path / "out"
    assert prepare(source, str(out), shard_images=100).written == 5
    before, times = contents(out), {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    harmed = out / "train-00002.parquet"
    if harm == "remove":
        harmed.unlink()
    else:
        harmed.write_bytes(before[harmed.name][:1000] + b"x" + before[harmed.name][1001:])
    assert prepare(source, str(out), shard_images=100).written == 1
    assert contents(out) == before
    changed = {
        path.name
        for path in out.iterdir()
        if path.suffix == ".parquet" and path.stat().st_mtime_ns != times[path.name]
    }
    assert changed == {harmed.name}
    assert prepare(source, str(out), shard_images=100).written == 0


def test_other_settings_replace_the_data_set(tmp_path):
    source, out = write_source(tmp_path / "source", 250), tmp_path / "out"
    first = prepare(source, str(out), shard_images=100).manifest
    second = prepare(source, str(out), shard_images=200, quality=80).manifest
    assert second.fingerprint != first.fingerprint
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        "test-00000.parquet",
        "train-00000.parquet",
        "train-00001.parquet",
    ]


def test_a_source_that_changed_since_is_noticed(tmp_path):
    source, out = write_source(tmp_path / "source", 30, size=(16, 16)), tmp_path / "out"
    prepare(source, str(out))
    image = tmp_path / "source" / "train" / "a" / "00002.jpg"
    size = image.stat().st_size
    write_image(image, (16, 16), seed=3)
    image.write_bytes(image.read_bytes()[:size].ljust(size, b"\0"))  # other pixels, the same size
    (out / "train-00000.parquet").unlink()
    with pytest.raises(UserError, match="the repaired shards differ from the manifest"):
        prepare(source, str(out), max_bad=0.1)


def test_a_killed_preparation_resumes_and_ends_with_the_same_bytes(own_ray, tmp_path):
    """It is killed twice: while reading images, and while writing shards. Its Ray's workers end with it."""
    source, out = write_source(tmp_path / "source", 6000), tmp_path / "out"
    expected = prepare(source, str(tmp_path / "expected"), shard_images=64).manifest
    program = f"from deit_ray.data.prepare import prepare; prepare({source!r}, {str(out)!r}, shard_images=64)"

    def run_until(pattern: str, count: int):
        process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
        deadline = time.monotonic() + 120
        while len(list(out.glob(pattern))) < count and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    run_until(".parts/*.arrow", 1)
    assert not list(out.glob("*.parquet"))
    run_until("train-*.parquet", 10)
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("train-*.parquet")}
    assert 10 <= len(finished) < 94
    assert not (out / shards.MANIFEST).exists()
    for name in finished:
        assert (out / name).read_bytes() == (
            tmp_path / "expected" / name
        ).read_bytes()  # whole, under its final name
    prepared = prepare(source, str(out), shard_images=64)
    assert prepared.manifest == expected
    assert prepared.written <= 95 - len(finished)  # ceil(6000 / 64) and one of test
    assert all((out / name).stat().st_mtime_ns == written for name, written in finished.items())


def test_images_that_ask_for_a_rotation_are_deep_or_have_pages_are_counted(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(6):
            (tmp_path / "in" / name / f"{i}.jpg").write_bytes(image_file("JPEG", smooth(30, 40, i)))
    (tmp_path / "in" / "a" / "turned.jpg").write_bytes(turned("JPEG", 6))
    (tmp_path / "in" / "a" / "turned.png").write_bytes(turned("PNG", 8))
    (tmp_path / "in" / "b" / "deep.png").write_bytes(deep_png(smooth()[..., 0].astype(np.uint16) * 16))
    source, out = str(tmp_path / "in"), str(tmp_path / "out")
    prepared = call("data", "prepare", source, "--out", out)
    assert prepared.status == 0, prepared
    said = " ".join(prepared.err.split())
    assert "2 images ask for a rotation in EXIF, which was not applied, as in timm" in said
    assert "the first is a/turned." in said
    assert "1 image has more than 8 bits; its declared range became 0 to 255; it is b/deep.png" in said
    assert "1 image uses less than a quarter of its declared range: it is nearly even, perhaps black" in said
    manifest = shards.read_manifest(out)
    assert (manifest.exif, manifest.remarks["rotated"][0]) == (False, 2)
    again = prepare(source, out)  # what was counted is kept with the data set
    assert (again.written, again.manifest.remarks) == (0, manifest.remarks)
    (tmp_path / "out" / "train-00000.parquet").unlink()
    assert prepare(source, out).manifest.remarks == manifest.remarks
    applied = prepare(source, str(tmp_path / "applied"), exif=True)
    assert any("2 images ask for a rotation in EXIF, which was applied" in note for note in applied.notes)
    assert applied.manifest.exif


def test_a_preparation_that_was_interrupted_still_counts_all_images(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "in" / name / f"{i}.jpg").write_bytes(
                turned("JPEG", 1 + i % 2 * 5, smooth(30, 40, i))
            )

    def broken(*arguments):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(shuffle, "write_shard", broken)
        with pytest.raises(OSError, match="the disk is gone"):
            prepare(str(tmp_path / "in"), str(tmp_path / "out"))
    assert prepare(str(tmp_path / "in"), str(tmp_path / "out")).manifest.remarks["rotated"][0] == 10


def test_images_that_have_two_labels_are_counted(tmp_path):
    write_classes(tmp_path / "source", {"apple": 6, "pear": 6})
    for i in range(3):
        copy = (tmp_path / "source" / "apple" / f"{i}.png").read_bytes()
        (tmp_path / "source" / "pear" / f"copy{i}.png").write_bytes(copy)
    for _ in range(2):  # the second call reads the shards of the first one
        prepared = call("data", "prepare", tmp_path / "source", "--out", tmp_path / "out")
        assert "6 images are also images of another class, byte for byte" in prepared.err
