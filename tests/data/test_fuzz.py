"""Random images, labels and Parquet tables: each is read as a reference reads it, or refused in one sentence.

Examples follow from the tests' names (`derandomize`), so every run tries the same ones.
"""

import io
import re
import tempfile
import warnings
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from deit_ray.data import labels as label_rule
from deit_ray.data.decode import decode_array, decode_file, jpeg_header
from deit_ray.data.images import encode
from deit_ray.data.listing import Unreadable
from deit_ray.data.sources import open_source
from deit_ray.errors import UserError
from tests.support.pictures import MODES, as_pil, image_file, smooth, turned


def fixed(examples: int) -> settings:
    """The same examples in every run, this many."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


MOST_PIXELS = 10**6  # a larger reference would take the test's time
RAW = re.compile(r"Error\b|Traceback|0x[0-9a-f]{6}|<class|<pyarrow|DataType\(|b'")  # what no person can read

kinds = st.sampled_from([(format, mode) for format, modes in MODES.items() for mode in modes])
sides = st.integers(1, 40)


def check_message(error: Exception, beginning: str = "") -> None:
    text = str(error)
    assert text.startswith(beginning)
    assert not RAW.search(text), text
    assert "\n" not in text


@fixed(150)
@given(kind=kinds, height=sides, width=sides, seed=st.integers(0, 99), short_side=st.sampled_from([0, 16]))
def test_images_of_any_kind_and_size_have_pils_pixels(kind, height, width, seed, short_side):
    content = image_file(kind[0], smooth(height, width, seed), kind[1])
    try:
        wanted = as_pil(content)
    except OSError:  # PIL writes a PCX of one pixel that it cannot read
        with pytest.raises(Unreadable):
            decode_file(content)
        return
    np.testing.assert_array_equal(decode_file(content).pixels, wanted)
    made = decode_file(encode(content, short_side, 95)).pixels
    scale = min(1, (short_side or 10**6) / min(wanted.shape[:2]))
    assert made.shape[:2] == tuple(max(1, round(side * scale)) for side in wanted.shape[:2])
    assert abs(made.mean() - wanted.mean()) < 12  # grey levels; chroma of tiny images is averaged


@fixed(60)
@given(
    format=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    orientation=st.integers(0, 12),
    height=sides,
    width=sides,
    exif=st.booleans(),
)
def test_any_orientation_is_applied_only_where_it_is_asked_for(format, orientation, height, width, exif):
    content = turned(format, orientation, smooth(height, width))
    with Image.open(io.BytesIO(content)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(decode_file(content, exif).pixels, upright if exif else as_pil(content))


@fixed(200)
@given(
    kind=kinds,
    seed=st.integers(0, 9),
    cut=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=3),
)
def test_damaged_images_are_refused_or_have_pils_pixels(kind, seed, cut, changes):
    content = bytearray(image_file(kind[0], smooth(24, 20, seed), kind[1]))
    for place, value in changes:
        content[int(place * len(content))] = value
    content = bytes(content if changes else content[: int(cut * len(content))])
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MOST_PIXELS:
                return
            wanted = None if image.mode[0] in "IF" else as_pil(content)
    except Exception:  # whatever PIL raises on damaged files
        wanted = None
    try:
        decoded = decode_file(content)
    except Unreadable as unreadable:
        header = jpeg_header(content)
        assert wanted is None or not header.fits(len(content))
        check_message(unreadable)
        return
    if wanted is not None:
        np.testing.assert_array_equal(decoded.pixels, wanted)
    else:
        assert {"deep"} <= set(decoded.remarks)


# Labels: the reference is Python's own arithmetic on the values

NUMBERS = st.one_of(st.integers(0, 12), st.integers(-3, 120_000), st.integers(0, 2**63 - 1))
COLUMNS = st.one_of(
    st.tuples(st.sampled_from(["int64", "uint64"]), st.lists(st.one_of(NUMBERS, st.none()), max_size=20)),
    st.tuples(st.just("int8"), st.lists(st.integers(-2, 127), max_size=20)),
    st.tuples(
        st.sampled_from(["float64", "float32"]),
        st.lists(
            st.one_of(st.integers(0, 9).map(float), st.floats(width=32), st.sampled_from([0.5, 1e30])),
            max_size=20,
        ),
    ),
    st.tuples(st.just("decimal"), st.lists(st.decimals(0, 99, places=2), max_size=20)),
    st.tuples(st.just("bool"), st.lists(st.booleans(), max_size=20)),
    st.tuples(
        st.sampled_from(["string", "large_string", "dictionary"]),
        st.lists(st.one_of(st.text(max_size=4), st.none(), st.sampled_from(["cat", "0", "é"])), max_size=20),
    ),
)
TYPES = {
    "decimal": pa.decimal128(10, 2),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "bool": pa.bool_(),
    **{name: getattr(pa, name)() for name in ("int64", "uint64", "int8", "string", "large_string")},
    "float64": pa.float64(),
    "float32": pa.float32(),
}


def class_of(value) -> str | None:
    """The class that a value means; None where it is none."""
    if isinstance(value, str):
        return value if value.strip() else None
    if value is None or isinstance(value, bool):
        return None if value is None else str(value)
    if isinstance(value, (float, Decimal)) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return str(int(value)) if value == int(value) and value >= 0 else None


@fixed(300)
@given(COLUMNS)
def test_labels_are_pythons_values_or_refused(column):
    kind, values = column
    if kind == "uint64":
        values = [None if value is None else abs(value) for value in values]
    named = [class_of(value) for value in values]
    is_word = kind in ("bool", "string", "large_string", "dictionary")
    numbers = [] if is_word else [int(name) for name in named if name is not None]
    is_right = None not in named and values and max(numbers, default=0) <= max(10_000, 10 * len(values))
    try:
        found = label_rule.clean(pa.chunked_array([pa.array(values, TYPES[kind])]), "x: column label")
        label_rule.check_all_there(found, "x: column label")
        if found.type == pa.int64():
            classes = label_rule.numbered_classes(found.to_numpy(), "x: column label")
        else:
            classes = label_rule.words_of([found])
        places = label_rule.places(found, classes, "x: column label")
    except UserError as error:
        assert not is_right
        check_message(error, "x: column label: ")
        return
    assert is_right or not values
    assert [classes[place] for place in places] == named


# Parquet tables: the reference is the table itself

FILES = [image_file("PNG", smooth(8, 9, seed=i)) for i in range(6)]
PIXELS = np.stack([smooth(8, 9, seed=i) for i in range(6)])
NESTED = pa.list_(pa.list_(pa.list_(pa.uint8())))
COLUMN_TYPES = {  # columns of six rows
    "files": pa.array(FILES),
    "large files": pa.array(FILES, pa.large_binary()),
    "structs": pa.array([{"bytes": file, "path": "x"} for file in FILES]),
    "pixels": pa.array(PIXELS.tolist(), NESTED),
    "planes": pa.array(PIXELS.transpose(0, 3, 1, 2).tolist(), NESTED),
    "tensors": pa.FixedShapeTensorArray.from_numpy_ndarray(PIXELS),
    "float pixels": pa.array((PIXELS / 255).tolist()),
    "numbers": pa.array([0, 1, 2, 0, 1, 2], pa.int16()),
    "words": pa.array(["b", "a"] * 3).dictionary_encode(),
    "lists": pa.array([[0]] * 6),
    "nothing": pa.nulls(6),
    "some numbers": pa.array([0, None, 1, 1, 0, 0]),
    "paths": pa.array([f"{i}.png" for i in range(6)]),
}
NAMES = ("image", "img", "depth", "label", "labels", "fine_label", "target", "id", "Image", "a.b")
GOOD_IMAGES = {"files", "large files", "structs", "pixels", "planes", "tensors"}


@fixed(100)
@given(
    columns=st.dictionaries(
        st.sampled_from(NAMES), st.sampled_from(list(COLUMN_TYPES)), min_size=1, max_size=5
    ),
    group=st.integers(1, 7),
    second=st.randoms(use_true_random=False),
)
def test_tables_of_any_schema_are_read_as_they_say_or_refused(columns, group, second):
    with tempfile.TemporaryDirectory() as folder:
        names = list(columns)
        for file in ("train-0", "train-1"):
            table = pa.table({name: COLUMN_TYPES[columns[name]] for name in names})
            pq.write_table(table, Path(folder) / f"{file}.parquet", row_group_size=group)
            second.shuffle(names)
        try:
            source = open_source(folder)
        except UserError as error:
            check_message(error, folder)
            assert not (columns.get("image") in GOOD_IMAGES and columns.get("label") in ("numbers", "words"))
            return
        image = re.search(r"images from the column (\S+)", source.recognised[0]).group(1)
        label = re.search(r"labels from (\S+)", source.recognised[0]).group(1)
        if columns.get("image") in GOOD_IMAGES:
            assert image == "image"
        assert columns[image] in GOOD_IMAGES
        if "label" in columns:
            assert label == "label"
        wanted = COLUMN_TYPES[columns[label]].to_pylist()
        rows = 0
        for split in source.splits.values():
            listed = zip(split.images.to_pylist(), split.reader.read(split.images), strict=True)
            for entry, content in listed:
                row = int(entry["name"].rpartition("/")[2])
                assert source.classes[entry["label"]] == str(wanted[row])
                decoded = decode_file(content) if isinstance(content, bytes) else decode_array(content)
                np.testing.assert_array_equal(decoded.pixels, PIXELS[row])
                rows += 1
        assert rows == 12


@pytest.mark.parametrize("text", ["ValueError: x", "<class 'int'>", "b'abc'"])
def test_a_raw_message_would_be_found(text):
    with pytest.raises(AssertionError):
        check_message(UserError(text))
