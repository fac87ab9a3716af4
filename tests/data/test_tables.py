"""Parquet tables: every column that people have is read as what it says, or refused in one sentence."""

import datetime
import decimal
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deit_ray.data.decode import decode_array
from deit_ray.data.listing import Unreadable
from deit_ray.data.sources import open_source
from deit_ray.errors import UserError
from tests.support.pictures import image_file, smooth

FILES = [image_file("PNG", smooth(seed=i)) for i in range(10)]
NUMBERS = [0, 1] * 5
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NESTED = pa.list_(pa.list_(pa.list_(pa.uint8())))


def write(
    folder, columns: dict, name: str = "train.parquet", features: dict | None = None, **options
) -> None:
    table = pa.table(columns)
    if features is not None:
        described = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": described})
    pq.write_table(table, folder / name, **options)


def contents(source, split: str = "train") -> list:
    found = source.splits[split]
    return list(found.reader.read(found.images))


def labels_of(source) -> list[str]:
    """The class of each image, in the order of the source's rows."""
    named = {}
    for split in source.splits.values():
        for name, label in zip(
            split.images["name"].to_pylist(), split.images["label"].to_pylist(), strict=True
        ):
            named[int(name.rpartition("/")[2])] = source.classes[label]
    return [named[row] for row in range(len(named))]


WORDS = ["cat", "dog"] * 5
AS_NUMBERS, AS_WORDS = ["0", "1"] * 5, WORDS
LABELS = {  # (a column of labels, the classes that its rows have)
    **{str(kind): (pa.array(NUMBERS, kind), AS_NUMBERS) for kind in (pa.int8(), pa.uint8(), pa.int16())},
    **{str(kind): (pa.array(NUMBERS, kind), AS_NUMBERS) for kind in (pa.uint16(), pa.int32(), pa.uint64())},
    "float": (pa.array([float(n) for n in NUMBERS]), AS_NUMBERS),
    "half": (pa.array(NUMBERS, pa.float16()), AS_NUMBERS),
    "decimal": (pa.array([decimal.Decimal(n) for n in NUMBERS], pa.decimal128(5, 2)), AS_NUMBERS),
    "bool": (pa.array([bool(n) for n in NUMBERS]), ["False", "True"] * 5),
    "string": (pa.array(WORDS), AS_WORDS),
    "large_string": (pa.array(WORDS, pa.large_string()), AS_WORDS),
    "string_view": (pa.array(WORDS, pa.string_view()), AS_WORDS),
    "binary": (pa.array([word.encode() for word in WORDS]), AS_WORDS),
    "dictionary of words": (pa.array(WORDS).dictionary_encode(), AS_WORDS),
    "dictionary of numbers": (pa.array(NUMBERS).dictionary_encode(), AS_NUMBERS),
    "gaps": (pa.array([5, 9] * 5), ["5", "9"] * 5),
    "digits as words": (pa.array(["10", "2"] * 5), ["10", "2"] * 5),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_what_the_column_says(tmp_path, name):
    column, wanted = LABELS[name]
    write(tmp_path, {"image": FILES, "label": column})
    assert labels_of(open_source(str(tmp_path))) == wanted


REFUSED_LABELS = {
    "null": (
        pa.array([None if i % 3 == 2 else i % 3 for i in range(10)]),
        "3 of 10 rows have no label .null or NaN., the first is row 2",
    ),
    "one null": (pa.array([0, 1, None, *[0] * 7]), "1 of 10 rows has no label .null or NaN., row 2"),
    "NaN": (
        pa.array([0.0, float("nan")] * 5),
        "5 of 10 rows have no label .null or NaN., the first is row 1",
    ),
    "no value at all": (pa.nulls(10), "10 of 10 rows have no label"),
    "negative": (pa.array([0, -1] * 5), "row 1 has the label -1, which is no class"),
    "all -1": (pa.array([-1] * 10), "row 0 has the label -1, which is no class"),
    "huge": (
        pa.array([0, 3_000_000_000] * 5),
        "row 1 has the label 3000000000, which can be no class of 10 images",
    ),
    "above int64": (
        pa.array([0, 2**63 + 1] * 5, pa.uint64()),
        r"has labels above 2\^63; classes are numbered",
    ),
    "huge float": (pa.array([0.0, 1e300] * 5), "has the label 1e\\+300"),
    "infinite": (pa.array([0.0, float("inf")] * 5), "row 1 has inf"),
    "fraction": (pa.array([0.0, 0.2] * 5), "row 1 has 0.2; a label is one whole number or one word"),
    "empty word": (pa.array(["cat", " "] * 5), "row 1 has an empty label"),
    "no text": (pa.array([b"\xff\xfe"] * 10), "holds bytes that are no text"),
    "list": (pa.array([[n] for n in NUMBERS]), "holds a list for each image; a label is one"),
    "fixed list": (
        pa.array([[n, 0] for n in NUMBERS], pa.list_(pa.int64(), 2)),
        "holds a list of 2 for each image",
    ),
    "struct": (pa.array([{"id": n} for n in NUMBERS]), "holds a value of the type struct for each image"),
    "date": (pa.array([datetime.date(2026, 1, 1)] * 10), "holds a date or time for each image"),
    "timestamp": (pa.array([datetime.datetime(2026, 1, 1)] * 10), "holds a date or time for each image"),
}


@pytest.mark.parametrize("name", REFUSED_LABELS)
def test_other_labels_are_refused_with_file_column_and_row(tmp_path, name):
    column, message = REFUSED_LABELS[name]
    write(tmp_path, {"image": FILES, "label": column})
    with pytest.raises(UserError, match=rf"^{tmp_path}/train.parquet: column label: {message}"):
        open_source(str(tmp_path))


def tensor(values: np.ndarray) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))


PIXELS = np.stack([smooth(6, 7, seed=i) for i in range(10)])
IMAGES = {  # columns of images with the same ten images: files, or pixels
    "binary": pa.array(FILES),
    "large_binary": pa.array(FILES, pa.large_binary()),
    "binary_view": pa.array(FILES, pa.binary_view()),
    "struct": pa.array([{"bytes": file, "path": "x"} for file in FILES], STRUCT),
    "struct of large_binary": pa.array(
        [{"bytes": file} for file in FILES], pa.struct([("bytes", pa.large_binary())])
    ),
    "list of bytes": pa.array([list(file) for file in FILES], pa.list_(pa.uint8())),
    "nested lists": pa.array(PIXELS.tolist(), NESTED),
    "nested fixed lists": pa.array(PIXELS.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8(), 3), 7), 6)),
    "channels first": pa.array(PIXELS.transpose(0, 3, 1, 2).tolist(), NESTED),
    "tensor": tensor(PIXELS),
    "tensor of 16 bits": tensor(PIXELS.astype(np.uint16) * 257),
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("column", ["image", "img", "pixel_values", "whatever"])
def test_images_are_files_or_pixels_of_any_type(tmp_path, name, column):
    write(tmp_path, {"id": list(range(10)), column: IMAGES[name], "label": NUMBERS}, row_group_size=3)
    source = open_source(str(tmp_path))
    for split in source.splits:
        rows = [int(name.rpartition("/")[2]) for name in source.splits[split].images["name"].to_pylist()]
        for row, found in zip(rows, contents(source, split), strict=True):
            if isinstance(found, bytes):
                assert found == FILES[row]
            else:
                np.testing.assert_array_equal(decode_array(found).pixels, PIXELS[row])


def test_single_images_that_are_missing_or_odd_are_counted(tmp_path):
    rows = [{"bytes": FILES[0], "path": "x"}, None, {"bytes": None, "path": "x"}]
    write(tmp_path, {"image": pa.array(rows * 2, STRUCT), "label": [0] * 6})
    (tmp_path / "test").mkdir()
    ragged = [[[0, 1], [2]], [[1, 2, 3]], [[0] * 9] * 4]  # the second is 1 high and 3 wide, or 3 channels
    write(tmp_path / "test", {"image": pa.array(ragged, pa.list_(pa.list_(pa.uint8()))), "label": [0] * 3})
    source = open_source(str(tmp_path))
    assert [type(found) for found in contents(source)] == [bytes, Unreadable, Unreadable] * 2
    reasons = [str(found) for found in contents(source, "test")]
    assert reasons[0] == "its rows of pixels have different lengths"
    assert reasons[1].startswith("the row: its images have the shape [1, 3]")
    assert contents(source, "test")[2].shape == (4, 9, 3)


CLASS_LABEL = {"_type": "ClassLabel", "names": ["cat", "dog"]}
CHOSEN = {  # (columns, metadata, the chosen columns, classes, notes)
    "depth first": ({"depth": IMAGES["struct"], "image": IMAGES["struct"], "label": NUMBERS}, None,
                    "image", ["0", "1"], ["the column depth is not used"]),
    "coarse and fine": ({"img": FILES, "coarse_label": [0] * 10, "fine_label": NUMBERS}, None,
                        "img", ["0", "1"], ["the column coarse_label is not used"]),
    "two label columns": ({"image": FILES, "labels": [[1]] * 10, "label": NUMBERS}, None,
                          "image", ["0", "1"], ["the column labels is not used"]),
    "target": ({"jpg": FILES, "target": NUMBERS}, None, "jpg", ["0", "1"], []),
    "capital letters": ({"Image": FILES, "Label": NUMBERS}, None, "Image", ["0", "1"], []),
    "names": ({"image": FILES, "label": NUMBERS}, {"label": CLASS_LABEL}, "image", ["cat", "dog"], []),
    "an unknown label column": ({"image": FILES, "species": NUMBERS}, {"species": CLASS_LABEL},
                                "image", ["cat", "dog"], []),
    "names of words": ({"image": FILES, "label": WORDS}, {"label": {"_type": "Value", "names": None}},
                       "image", ["cat", "dog"], []),
    "more names than ids": ({"image": FILES, "label": [0] * 10}, {"label": CLASS_LABEL},
                            "image", ["cat", "dog"], []),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOSEN)
def test_columns_are_chosen_by_name_and_the_others_are_named(tmp_path, name):
    columns, features, image, classes, notes = CHOSEN[name]
    write(tmp_path, columns, features=features)
    source = open_source(str(tmp_path))
    assert (source.classes, source.notes) == (classes, notes)
    assert f"images from the column {image} " in source.recognised[0]


REFUSED_TABLES = {
    "an id past the names": ({"image": FILES, "label": [0, 2] * 5}, {"label": CLASS_LABEL},
                             "row 1 has the label 2; it must be 0 to 1, since there are names for 2"),
    "a word past the names": ({"image": FILES, "label": ["cat", "cow"] * 5}, {"label": CLASS_LABEL},
                              'row 1 has the label "cow", which is none of the classes cat, dog'),
    "no labels": ({"image": FILES}, None, "no column of labels; known are label, .*, it has image"),
    "no images": ({"label": NUMBERS}, None, "no column of images; wanted is a column image"),
    "two image columns": ({"left": FILES, "right": FILES, "label": NUMBERS}, None,
                          "several columns hold images: left, right; rename the wanted one to image"),
    "paths": ({"image": ["a.jpg"] * 10, "label": NUMBERS}, None,
              "column image holds text; wanted are the bytes"),
    "float pixels": ({"image": tensor(PIXELS / 255), "label": NUMBERS}, None,
                     r"column image: has pixels of the type float64, whose range is not declared; where"),
    "int64 pixels": ({"image": PIXELS.tolist(), "label": NUMBERS}, None,
                     r"column image: has pixels of the type int64, .* save x.astype\('uint8'\)"),
    "no rows": ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, None,
                "holds no rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_TABLES)
def test_other_tables_are_refused(tmp_path, name):
    columns, features, message = REFUSED_TABLES[name]
    write(tmp_path, columns, features=features)
    with pytest.raises(UserError, match=rf"^{tmp_path}/train.parquet: (column label: )?{message}"):
        open_source(str(tmp_path))


def test_files_of_a_split_may_differ_in_order_and_width_but_not_in_kind(tmp_path):
    write(tmp_path, {"image": FILES, "label": pa.array(NUMBERS, pa.int8())}, "train-0.parquet")
    write(tmp_path, {"label": pa.array(NUMBERS), "id": NUMBERS, "image": FILES}, "train-1.parquet")
    write(tmp_path, {"image": pa.array([], pa.binary()), "label": pa.array([], pa.null())}, "train-2.parquet")
    source = open_source(str(tmp_path))
    assert sum(map(len, source.splits.values())) == 20
    for columns, message in (
        (
            {"image": FILES, "label": WORDS},
            "train-3.parquet: column label: holds words, and .* holds numbers",
        ),
        ({"image": FILES}, "train-3.parquet: has no column label, which .*train-0.parquet has; it has image"),
        ({"image": WORDS, "label": NUMBERS}, "its column image holds no images, that of .* files"),
    ):
        write(tmp_path, columns, "train-3.parquet")
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path))


@pytest.mark.parametrize("test_labels", [None, pa.nulls(10), pa.array([-1] * 10)])
def test_a_test_split_without_labels_is_not_used_and_named(tmp_path, test_labels):
    write(tmp_path, {"image": FILES, "label": NUMBERS}, "train.parquet")
    columns = {"image": FILES} if test_labels is None else {"image": FILES, "label": test_labels}
    write(tmp_path, columns, "test.parquet")
    source = open_source(str(tmp_path))
    assert source.notes == ["the files named test are not used: they have no labels"]
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 8, "test": 2}


def test_a_class_that_only_the_test_split_has_is_kept_by_number_and_refused_by_word(tmp_path):
    write(tmp_path, {"image": FILES, "label": NUMBERS}, "train.parquet")
    write(tmp_path, {"image": FILES, "label": [2] * 10}, "test.parquet")
    assert open_source(str(tmp_path)).classes == ["0", "1", "2"]
    write(tmp_path, {"image": FILES, "label": WORDS}, "train.parquet")
    write(tmp_path, {"image": FILES, "label": ["cow"] * 10}, "test.parquet")
    with pytest.raises(UserError, match='row 0 has the label "cow", which is none of the classes cat, dog'):
        open_source(str(tmp_path))


def test_damaged_and_encrypted_files_are_named(tmp_path):
    where = tmp_path / "train.parquet"
    write(tmp_path, {"image": FILES, "label": NUMBERS})
    whole = where.read_bytes()
    cut = "cannot be read as Parquet: it is cut off, damaged, or no Parquet file"
    encrypted = "cannot be read as Parquet: it is encrypted; write it without encryption"
    for content, message in (
        (whole[:-100], cut),
        (b"", cut),
        (b"PAR1 nothing", cut),
        (whole[:-4] + b"PARE", encrypted),
    ):
        where.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{where}: {message}$"):
            open_source(str(tmp_path))
