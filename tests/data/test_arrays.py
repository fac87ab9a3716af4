"""Arrays of pixels: axes, types and labels are read where they leave no doubt, and refused otherwise."""

import pickle
import zipfile

import numpy as np
import pytest

from deit_ray.data.arrays import arrays
from deit_ray.data.decode import decode_array
from deit_ray.data.sources import open_source
from deit_ray.errors import UserError
from tests.support.pictures import smooth

COUNT = 10
COLOUR = np.stack([smooth(6, 7, seed=i) for i in range(COUNT)])
GREY = COLOUR[..., 0]
LABELS = np.arange(COUNT) % 2


def save(folder, images=COLOUR, labels=LABELS, **more) -> str:
    """Writes x.npz with training arrays, and the same arrays for testing; returns its path."""
    np.savez(
        folder / "x.npz", **{"x_train": images, "y_train": labels, "x_test": images, "y_test": labels} | more
    )
    return str(folder / "x.npz")


def pixels_of(source, split: str = "train") -> np.ndarray:
    found = source.splits[split]
    return np.stack([decode_array(image).pixels for image in found.reader.read(found.images)])


def with_alpha(images: np.ndarray) -> np.ndarray:
    return np.concatenate([images, images[..., :1]], 3)


PIXELS = {  # (an array, the RGB pixels that it has)
    "colour": (COLOUR, COLOUR),
    "colour with alpha": (with_alpha(COLOUR), COLOUR),
    "channels first": (COLOUR.transpose(0, 3, 1, 2), COLOUR),
    "channels first with alpha": (with_alpha(COLOUR).transpose(0, 3, 1, 2), COLOUR),
    "grey": (GREY, GREY[..., None]),
    "grey with an axis": (GREY[..., None], GREY[..., None]),
    "grey, channels first": (GREY[:, None], GREY[..., None]),
    "16 bits": (COLOUR.astype(np.uint16) * 257, COLOUR),
    "16 bits, big-endian": ((COLOUR.astype(np.uint16) * 257).astype(">u2"), COLOUR),
    "black and white": (GREY > 100, (GREY > 100)[..., None] * 255),
    "not in one piece": (np.repeat(COLOUR, 2, 0)[::2], COLOUR),
}


@pytest.mark.parametrize("name", PIXELS)
def test_pixels_are_those_of_the_array(tmp_path, name):
    array, wanted = PIXELS[name]
    source = open_source(save(tmp_path, array))
    for split in ("train", "test"):
        np.testing.assert_array_equal(pixels_of(source, split), np.broadcast_to(wanted, COLOUR.shape))
    dtype = array.dtype.name
    first = ", channels first" if "channels first" in name else ""
    assert f"train: 10 images from x_train ({dtype}, 6x7{first}), labels from y_train" in source.recognised


WORDS = np.array(["cat", "dog"] * 5)
LABELLED = {  # (labels, the class of each image)
    **{
        name: (LABELS.astype(name), ["0", "1"] * 5) for name in ("uint8", "int64", ">i4", "float32", "uint64")
    },
    "a column": (LABELS[:, None], ["0", "1"] * 5),
    "bool": (LABELS.astype(bool), ["False", "True"] * 5),
    "words": (WORDS, list(WORDS)),
    "bytes": (WORDS.astype("S"), list(WORDS)),
    "a column of words": (WORDS[:, None], list(WORDS)),
    "gaps": (np.array([5, 9] * 5), ["5", "9"] * 5),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labels_are_one_number_or_word_for_each_image(tmp_path, name):
    labels, wanted = LABELLED[name]
    source = open_source(save(tmp_path, labels=labels))
    assert [source.classes[label] for label in source.splits["train"].images["label"].to_pylist()] == wanted


REFUSED = {  # (images, labels, message)
    "floats": (COLOUR / np.float32(255), LABELS, r"x_train: has pixels of the type float32, .* save \(255"),
    "int64": (COLOUR.astype(np.int64), LABELS, r"x_train: has pixels of the type int64, .* save x.astype"),
    "int8": (COLOUR.astype(np.int8), LABELS, "x_train: has pixels of the type int8"),
    "complex": (COLOUR * 1j, LABELS, "x_train: has pixels of the type complex128"),
    "objects": (COLOUR.astype(object), LABELS, "x_train: holds pickled objects, which are"),
    "flat": (COLOUR.reshape(COUNT, -1), LABELS, r"x_train: .* the shape \[126\]; wanted"),
    "ten channels": (np.zeros((COUNT, 6, 7, 10), np.uint8), LABELS, r"x_train: .* the shape \[6, 7, 10\]"),
    "two orders": (np.zeros((COUNT, 3, 7, 3), np.uint8), LABELS, "x_train: .*: the channels can be the"),
    "three pixels wide": (np.zeros((COUNT, 7, 3), np.uint8), LABELS, r"x_train: .* the shape \[7, 3\]"),
    "no pixels": (np.zeros((COUNT, 0, 7, 3), np.uint8), LABELS, r"x_train: .* the shape \[0, 7, 3\]"),
    "images last": (COLOUR.transpose(1, 2, 3, 0).copy(), LABELS, "x_train: .* its last axis counts"),
    "Fortran's order": (np.asfortranarray(COLOUR), LABELS, "x_train: is in Fortran's order; save x.copy"),
    "no images": (COLOUR[:0], LABELS[:0], r"x_train: has the shape \[0, 6, 7, 3\]"),
    "too few labels": (COLOUR, LABELS[:-1], r"x_train: has the shape \[10, 6, 7, 3\], and y_train .* \[9\]"),
    "one-hot": (COLOUR, np.eye(5)[LABELS], r"y_train: has 5 values for each image; .* argmax"),
    "negative": (COLOUR, LABELS - 1, "y_train: row 0 has the label -1, which is no class"),
    "fractions": (COLOUR, LABELS + 0.2, "y_train: row 0 has 0.2; a label is one"),
    "NaN": (COLOUR, np.where(LABELS, np.nan, 0.0), "y_train: 5 of 10 rows have no label .null or NaN., the"),
    "huge": (COLOUR, LABELS * 10**9, "y_train: row 1 has the label 1000000000, which can be no class"),
    "word objects": (COLOUR, WORDS.astype(object), "y_train: holds pickled objects, which are"),
    "dates": (COLOUR, LABELS.astype("datetime64[D]"), r"y_train: holds values of the type datetime64\[D\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_arrays_are_refused(tmp_path, name):
    images, labels, message = REFUSED[name]
    where = save(tmp_path, images, labels)
    with pytest.raises(UserError, match=f"^{where}: {message}"):
        open_source(where)


NAMES = [
    ("x_train", "y_train", "x_test", "y_test"),
    ("X_train", "Y_train", "X_val", "Y_val"),
    ("train_images", "train_labels", "val_images", "val_labels"),
    ("images_train", "labels_train", "images_test", "labels_test"),
    ("trainImages", "trainTargets", "testImages", "testTargets"),
    ("xtrain", "ytrain", "xtest", "ytest"),
    ("train/data", "train/target", "test/data", "test/target"),
]


@pytest.mark.parametrize("names", NAMES, ids=" ".join)
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_names_say_split_and_kind(tmp_path, names, kind):
    test_images = np.stack(
        [smooth(9, 5, seed=i) for i in range(4)]
    )  # of another size, and with another class
    for name, array in zip(names, (COLOUR, LABELS, test_images, np.array([0, 1, 2, 2])), strict=True):
        if kind == "npy":
            (tmp_path / name).parent.mkdir(exist_ok=True)
            np.save(tmp_path / f"{name}.npy", array)
    if kind == "npz":
        values = (COLOUR, LABELS, test_images, np.array([0, 1, 2, 2]))
        np.savez(tmp_path / "x.npz", **dict(zip(names, values, strict=True)))
    uris = [str(path) for path in sorted(tmp_path.rglob("*.np?"))]
    source = arrays(uris, str(tmp_path))
    np.testing.assert_array_equal(pixels_of(source, "train"), COLOUR)
    np.testing.assert_array_equal(pixels_of(source, "test"), test_images)
    assert source.classes == ["0", "1", "2"]


@pytest.mark.parametrize("names", [("images", "labels"), ("X", "y"), ("data", "target")])
def test_arrays_without_a_split_in_their_names_are_split(tmp_path, names):
    np.savez(tmp_path / "x.npz", **dict(zip(names, (COLOUR, LABELS), strict=True)), mean=np.zeros(3))
    source = open_source(str(tmp_path / "x.npz"))
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 8, "test": 2}
    assert source.notes == ["mean is not used"]


def test_arrays_that_are_missing_double_or_without_labels_are_named(tmp_path):
    cases = {
        "x_train: no array holds its labels; wanted are .*; found are x_train, y_test": {
            "x_train": COLOUR, "y_test": LABELS},
        "no arrays of training images; .*, found are arr_0, arr_1": {"arr_0": COLOUR, "arr_1": LABELS},
        "train_images: images of train too, as .*x_train; join them": {
            "x_train": COLOUR, "train_images": COLOUR, "y_train": LABELS},
    }  # fmt: skip
    for message, named in cases.items():
        np.savez(tmp_path / "x.npz", **named)
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path / "x.npz"))
    source = open_source(save(tmp_path, y_test=np.full(COUNT, -1), x_val=COLOUR))
    assert source.notes == ["x_test is not used: y_test has no labels", "x_val is not used"]
    assert [len(found) for found in source.splits.values()] == [8, 2]


def test_damaged_files_are_named(tmp_path):
    where = save(tmp_path)
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[:-50])
    with pytest.raises(
        UserError, match=f"^{where}: cannot be read as an .npz: it is cut off, damaged, or no .npz$"
    ):
        open_source(where)
    for name, array in (("x_train", COLOUR), ("y_train", LABELS)):
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "x.npz").unlink()
    whole = (tmp_path / "x_train.npy").read_bytes()
    for content, message in (
        (whole[:-50], r"x_train.npy: is cut off: it has \d+ bytes of \d+"),
        (b"no array", "x_train.npy: cannot be read as a NumPy array of numbers or words"),
    ):
        (tmp_path / "x_train.npy").write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path))


def test_a_compressed_row_that_is_damaged_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, 60, 60, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "x.npz", x_train=noise, y_train=LABELS, x_test=noise, y_test=LABELS)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "x.npz") as packed:
        start = packed.getinfo("x_train.npy").header_offset
    content[start + 60000 : start + 60100] = bytes(100)
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"x_train: row \d+ cannot be read: the file is damaged"):
        pixels_of(open_source(str(tmp_path / "x.npz")))


CIFAR = {
    "one-hot": ({b"labels": [[0, 1]] * 4}, "holds a list for each image"),
    "no data": ({b"data": None}, "it has no data or no labels"),
    "other pixels": ({b"data": np.zeros((4, 3072))}, r"data is float64 \[4, 3072\] with 4 labels"),
    "a label too large": ({b"labels": [0, 1, 2, 10**12]}, "row 3 has the label 1000000000000"),
    "labels of several types": ({b"labels": [0, "cat", 1, 1]}, "holds labels of several types"),
}


@pytest.mark.parametrize("name", CIFAR)
def test_odd_batches_of_cifar_are_refused(tmp_path, name):
    changed, message = CIFAR[name]
    good = {b"labels": [0, 1, 0, 1], b"data": np.zeros((4, 3072), np.uint8)}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(good, protocol=2))
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(good | changed, protocol=2))
    with pytest.raises(UserError, match=f"^{tmp_path}/data_batch_1: .*{message}"):
        open_source(str(tmp_path))
