"""Cases of bench/faults.py: arrays of pixels and labels."""

import numpy as np

from bench.faulty.expect import Prepared, either, expect_prepared, refused
from bench.faulty.inputs import (
    array_truth,
    stack,
    write_arrays,
)
from bench.faulty.stage import Stage, case

FILE = r"x\.npz|[xy]_train"
NOTE = r"\b(convert|scal|range|rescal|divid|as float|float|uint16|16.bit|12.bit|bits?)"

# arrays: pixels


@case(
    "npz_float",
    "pixels",
    unit32=("<f4", 1, 0, 220),
    unit64=("<f8", 1, 0, 30),
    unit16=("<f2", 1, 0, 30),
    to_255=("<f4", 255, 0, 30),
    centred=("<f4", 2, -1, 30),
)
def npz_float(stage: Stage, dtype: str, scale: float, offset: float, size: int) -> None:
    """Float pixels: refused, or converted with a note. Never black, at any size."""
    images, labels = stack(20, size, size + 8), np.arange(20) % 4
    write_arrays(stage / "mine/x.npz", (images / 255 * scale + offset).astype(dtype), labels)
    noted = Prepared(array_truth(images, labels), words=(NOTE,))
    expect_prepared(stage, "mine", either(refused(FILE, "float"), noted))


@case(
    "npz_wide",
    "pixels",
    uint16=("<u2", 257),
    big_endian=(">u2", 257),
    twelve_bits=("<u2", 16),
    int32=("<i4", 257),
    uint32=("<u4", 1 << 16),
)
def npz_wide(stage: Stage, dtype: str, factor: int) -> None:
    """Whole numbers above 255: refused, or converted with a note. Never white, never wrapped around."""
    images, labels = stack(24), np.arange(24) % 4
    write_arrays(stage / "mine/x.npz", images.astype(dtype) * np.array(factor, dtype), labels)
    noted = Prepared(array_truth(images, labels), words=(NOTE,))
    dark = (images.astype(np.uint32) * factor // 257).astype(np.uint8) if factor == 16 else images
    warned = Prepared(array_truth(dark, labels), words=("range",))
    expect_prepared(stage, "mine", either(refused(FILE, r"int|16|32"), noted, warned))


@case("npz_bytes", "pixels", int64=("<i8",), int8=("i1",), boolean=("?",), nan=("nan",), words=("<U3",))
def npz_bytes(stage: Stage, dtype: str) -> None:
    """Other dtypes: right, or refused; whole numbers up to 255 in a wide type are certain."""
    images, labels = stack(20), np.arange(20) % 2
    if dtype == "nan":
        given = (images / 255).astype(np.float32)
        given[3, 2:5] = np.nan
        expected = refused(FILE, "nan|finite|float")
    elif dtype == "?":
        given = images[..., 1] > 128
        images = np.repeat((given * 255).astype(np.uint8)[..., None], 3, axis=3)
        noted = Prepared(array_truth(images, labels), words=("bool|white",))
        expected = either(refused(FILE, "bool"), noted)
    elif dtype == "i1":
        given = (images.astype(np.int16) - 128).astype(np.int8)
        expected = refused(FILE, "int8|negative|below 0|-1")
    elif dtype == "<U3":
        given, expected = images.astype("<U3"), refused(FILE, "number|text|str|U3|dtype")
    else:
        given = images.astype(dtype)
        expected = either(Prepared(array_truth(images, labels)), refused(FILE, "int64"))
    write_arrays(stage / "mine/x.npz", given, labels)
    expect_prepared(stage, "mine", expected)


@case(
    "npz_axes",
    "pixels",
    first=((0, 3, 1, 2), 36),
    first_grey=("grey_first", 36),
    width_first=("fortran", 36),
    thin=((0, 3, 1, 2), 3),
    ambiguous=("ambiguous", 30),
    grey=("grey", 36),
    alpha=("alpha", 36),
    flat=("flat", 36),
    two=("two", 36),
)
def npz_axes(stage: Stage, how, size: int) -> None:
    """Axes in another order: converted where that is certain, else refused; never strips."""
    images, labels = stack(24, size, max(size, 30)), np.arange(24) % 4
    if size == 3:  # rows alike, since JPEG mixes the colours of rows
        images = np.repeat(images[:, :1], 3, axis=1)
    grey = np.repeat(images[..., :1], 3, axis=3)
    right = Prepared(array_truth(images, labels))
    wrong = refused(FILE, "channel|axis|axes|shape|height")
    if how == "fortran":
        given, expected = np.asfortranarray(images), either(right, refused(FILE, "order|Fortran"))
    elif how == "grey":
        given, expected = grey[..., 0], Prepared(array_truth(grey, labels))
    elif how == "grey_first":
        given, expected = grey[..., 0][:, None], either(Prepared(array_truth(grey, labels)), wrong)
    elif how == "alpha":
        given = np.concatenate([images, np.full((*images.shape[:3], 1), 255, np.uint8)], axis=3)
        expected = right
    elif how == "flat":
        given, expected = images.reshape(len(images), -1), wrong
    elif how == "ambiguous":  # 30 high and 3 wide, or 3 high and 30 wide with channels last
        given, expected = images[:, :, :3].transpose(0, 3, 1, 2).copy(), wrong
    elif how == "two":
        given, expected = images[..., :2], wrong
    else:
        given, expected = images.transpose(how).copy(), either(right, wrong)
    write_arrays(stage / "mine/x.npz", given, labels)
    expect_prepared(stage, "mine", expected)


# arrays: labels


@case(
    "npz_labels",
    "pixels",
    one_hot=(np.eye(5)[np.arange(40) % 5], "5|shape|one-hot"),
    one_hot_bool=(np.eye(4, dtype=bool)[np.arange(40) % 4], "4|shape|one-hot"),
    negative=(np.arange(40) % 3 - 1, "-1"),
    negative8=((np.arange(40) % 4 - 2).astype(np.int8), "-2|-1"),
    fractional=(np.array([0.2, 0.9, 1.7, 0.2] * 10), r"0\.2|whole"),
    nan=(np.array([0, 1, np.nan, 1] * 10), "nan|whole|no label"),
    huge=(np.array([0, 2**62] * 20, np.uint64), str(2**62) + "|large|classes"),
    short=(np.arange(39) % 3, "39|40"),
    empty=(np.zeros((40, 0)), "shape|0"),
)
def npz_labels(stage: Stage, labels: np.ndarray, words: str) -> None:
    """Labels that are no single whole number: refused, saying what is there."""
    write_arrays(stage / "mine/x.npz", stack(40, 20, 20), labels)
    expect_prepared(stage, "mine", refused(FILE, words), within_s=40)


@case(
    "npz_right_labels",
    "pixels",
    column=("column",),
    whole_floats=("float",),
    text=("text",),
    uint8=("uint8",),
)
def npz_right_labels(stage: Stage, how: str) -> None:
    """Labels that mean one thing only are right, or refused where they are no numbers."""
    images, numbers = stack(30, 24, 24), np.arange(30) % 3
    given = {
        "column": numbers[:, None],
        "float": numbers.astype(np.float64),
        "text": np.array(["fig", "kiwi", "lime"])[numbers],
        "uint8": numbers.astype(np.uint8),
    }[how]
    truth = Prepared(array_truth(images, given if how == "text" else numbers))
    write_arrays(stage / "mine/x.npz", images, given, names=("x", "y"))
    others = either(truth, refused(FILE, "float|text|str|number|word|whole"))
    expect_prepared(stage, "mine", truth if how in ("column", "uint8") else others)
