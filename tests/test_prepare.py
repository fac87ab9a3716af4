"""From a source to shards: digits, class folders of many kinds, and what is refused."""

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from deit_ray.cli import app
from deit_ray.data import shards
from deit_ray.data.crop import decode
from deit_ray.data.prepare import prepare
from deit_ray.errors import UserError


def write_image(path, size=(30, 40), grey=False, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if grey else (*size, 3)
    cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def folders(tmp_path):
    """10 cats and 5 dogs: PNG, JPEG, grey and colour, of several sizes."""
    for i in range(10):
        write_image(tmp_path / "pets" / "cat" / f"{i}.{'png' if i % 2 else 'jpg'}", (30 + i, 300), grey=i % 3 == 0, seed=i)
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
    group = shards.ShardReader().read(f"{digits}/train-00000.parquet", 0)
    labels = group["label"].to_pylist()
    assert len(set(labels)) == 10
    assert labels != sorted(labels)


def test_the_same_source_gives_the_same_bytes(tmp_path, digits):
    again = prepare("digits", str(tmp_path / "again")).manifest
    assert again.fingerprint == shards.read_manifest(digits).fingerprint


def test_a_flat_set_of_class_folders_is_split_and_the_counts_are_printed(folders, tmp_path):
    result = CliRunner().invoke(app, ["data", "prepare", str(folders), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "12 train, 3 test images of 2 classes" in result.output
    assert "cat: 8 train, 2 test" in result.output
    assert "dog: 4 train, 1 test" in result.output


def test_train_and_val_folders_are_kept_apart(folders, tmp_path):
    write_image(tmp_path / "split" / "val" / "dog" / "0.png")
    folders.rename(tmp_path / "split" / "train")
    manifest = prepare(str(tmp_path / "split"), str(tmp_path / "out")).manifest
    assert manifest.class_counts == {"train": [10, 5], "test": [0, 1]}


def test_images_become_rgb_jpeg_of_a_bounded_short_side(folders, tmp_path):
    prepare(str(folders), str(tmp_path / "out"), short_side=64)
    table = shards.ShardReader().read(str(tmp_path / "out" / "train-00000.parquet"), 0)
    shapes = {decode(image.as_buffer()).shape for image in table["image"]}
    assert (80, 64, 3) in shapes  # 500 x 400 scaled to a short side of 64
    assert all(shape[2] == 3 and min(shape[:2]) <= 64 for shape in shapes)


def test_an_unreadable_image_is_left_out_and_named(folders, tmp_path):
    (folders / "dog" / "broken.jpg").write_bytes(b"no image")
    prepared = prepare(str(folders), str(tmp_path / "out"))
    assert [name for names in prepared.unreadable.values() for name in names] == ["dog/broken.jpg"]
    assert sum(prepared.manifest.rows(split) for split in ("train", "test")) == 15


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such folder"),
        (lambda p: write_image(p / "only" / "1.png"), "holds 1 class folders; at least 2"),
        (lambda p: (write_image(p / "a" / "1.png"), (p / "b").mkdir()), "b: holds no images"),
        (lambda p: [write_image(p / d / "1.png") for d in ("train/a", "train/b", "test/c")], "has the class 'c'"),
    ],
)
def test_sources_that_cannot_be_are_refused(tmp_path, make, message):
    make(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        prepare(str(tmp_path / "source"), str(tmp_path / "out"))


def test_held_out_images_are_a_fixed_part_of_train(digits):
    manifest = shards.read_manifest(digits)
    train, val = (shards.row_groups(digits, manifest, split, 0.1) for split in ("train", "val"))
    assert val.images == round(0.1 * manifest.rows("train"))
    assert train.images + val.images == manifest.rows("train")
    assert int(val.first_id[0]) == train.images


def test_a_folder_that_is_no_data_set_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"no prepared data set there .* deit-ray data prepare SOURCE --out"):
        shards.read_manifest(str(tmp_path))
