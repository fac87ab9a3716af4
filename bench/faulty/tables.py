"""Cases of bench/faults.py: Parquet files."""

import datetime
import decimal

import numpy as np
import pyarrow as pa

from bench.faulty.expect import Prepared, either, expect_prepared, refused
from bench.faulty.inputs import (
    image_cells,
    packed,
    truth_of,
    write_table,
)
from bench.faulty.stage import Stage, case

# Parquet: labels

TIME = datetime.datetime(2024, 1, 1)


@case(
    "parquet_labels",
    "pixels",
    huge=([0, 3_000_000_000] * 10, None, "3.?000.?000.?000|classes"),
    huge_unsigned=([0, 2**63 + 5] * 10, pa.uint64(), "922|large|classes"),
    null=([None if i % 3 == 2 else i % 3 for i in range(20)], None, "6|null|no label"),
    null_text=(["a", None] * 10, None, "10|null|no label"),
    list=([[i % 3] for i in range(20)], None, "list"),
    struct=([{"id": i % 2} for i in range(20)], None, "struct"),
    fraction=([0.5, 1.0] * 10, None, r"0\.5|double|float|whole"),
    negative=([0, -3] * 10, None, "-3"),
    time=([TIME, TIME.replace(day=2)] * 10, None, "timestamp|time|date"),
    binary=([b"a", b"\xff"] * 10, None, "binary|bytes"),
)
def parquet_labels(stage: Stage, labels: list, kind, words: str) -> None:
    """Labels that are no single number or word: one sentence that names column and type."""
    cells = image_cells(20)
    write_table(stage / "mine/train.parquet", image=cells, label=pa.array(labels, kind))
    expect_prepared(stage, "mine", refused("label", words), within_s=40)


@case(
    "parquet_right_labels",
    "pixels",
    boolean=([False, True] * 10, None),
    dictionary=(["kiwi", "fig"] * 10, "dictionary"),
    large_text=(["kiwi", "fig"] * 10, pa.large_string()),
    number_text=(["10", "9"] * 10, None),
    whole_floats=([0.0, 1.0] * 10, None),
    decimals=([decimal.Decimal(0), decimal.Decimal(1)] * 10, None),
    uint8=([0, 1] * 10, pa.uint8()),
    view=(["kiwi", "fig"] * 10, pa.string_view()),
)
def parquet_right_labels(stage: Stage, labels: list, kind) -> None:
    """Labels that mean one thing only: right, or refused naming column and type."""
    cells, column = image_cells(20), pa.array(labels, None if kind == "dictionary" else kind)
    column = column.dictionary_encode() if kind == "dictionary" else column
    write_table(stage / "mine/train.parquet", image=cells, label=column)
    names = [
        str(int(label)) if isinstance(label, (float, decimal.Decimal)) else str(label) for label in labels
    ]
    right = Prepared({"all": truth_of(cells, names)})
    certain = kind == "dictionary" or kind in (pa.large_string(), pa.uint8()) or labels[0] == "10"
    expect_prepared(
        stage, "mine", right if certain else either(right, refused("label", str(column.type)[:4]))
    )


@case(
    "parquet_gaps",
    "pixels",
    numbers=([5, 9] * 10, None),
    late=([0, 40] * 10, None),
    named=([0, 2] * 10, ["apple", "fig", "kiwi"]),
)
def parquet_gaps(stage: Stage, labels: list, names: list | None) -> None:
    """Ids without images are reported, or refused; the others keep their numbers."""
    cells = image_cells(20)
    hub = {"label": {"names": names, "_type": "ClassLabel"}} if names else None
    write_table(stage / "mine/train.parquet", hub, image=cells, label=labels)
    classes = [names[label] if names else label for label in labels]
    gap = r"(no|without) (\w+ )?images|empty|gap|have no|has no"
    expect_prepared(
        stage, "mine", either(Prepared({"all": truth_of(cells, classes)}, words=(gap,)), refused("label"))
    )


@case("parquet_few_names", "pixels", two=(["apple", "fig"],), none=([],))
def parquet_few_names(stage: Stage, names: list) -> None:
    """More ids than the hub's names: refused."""
    hub = {"label": {"names": names, "_type": "ClassLabel"}}
    cells, labels = image_cells(21), [0, 1, 2] * 7
    write_table(stage / "mine/train.parquet", hub, image=cells, label=labels)
    expected = (
        refused("label", r"\b2\b")
        if names
        else either(refused("label"), Prepared({"all": truth_of(cells, labels)}))
    )
    expect_prepared(stage, "mine", expected)


# Parquet: images


@case("parquet_images", "pixels", large=(pa.large_binary(),), view=(pa.binary_view(),), binary=(pa.binary(),))
def parquet_images(stage: Stage, kind) -> None:
    """Every binary type holds images."""
    cells, labels = image_cells(20), [i % 2 for i in range(20)]
    write_table(stage / "mine/train.parquet", image=pa.array(cells, kind), label=labels)
    expect_prepared(stage, "mine", Prepared({"all": truth_of(cells, labels)}))


@case(
    "parquet_columns",
    "pixels",
    depth=("depth", "image", True),
    mask=("mask", "image", False),
    jpg=("annotation", "img", True),
    neither=("left", "right", True),
)
def parquet_columns(stage: Stage, first: str, second: str, is_struct: bool) -> None:
    """Two columns of images: the one called image is taken; or refused, naming both."""
    cells, labels = image_cells(20), [i % 2 for i in range(20)]
    flat = [packed(np.full((44, 52, 3), 4, np.uint8))] * 20
    wrap = (lambda values: [{"bytes": value, "path": None} for value in values]) if is_struct else list
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if is_struct else pa.binary()
    columns = {first: pa.array(wrap(flat), kind), second: pa.array(wrap(cells), kind), "label": labels}
    write_table(stage / "mine/train.parquet", **columns)
    named = refused(first, second)
    right = Prepared({"all": truth_of(cells, labels)})
    expect_prepared(
        stage,
        "mine",
        named if first == "left" else right if second == "image" and not is_struct else either(right, named),
    )


@case("parquet_no_images", "pixels", paths=("paths",), null=("null",), lists=("lists",), text=("text",))
def parquet_no_images(stage: Stage, how: str) -> None:
    """Rows without an image's bytes are named, or refused."""
    cells, labels = image_cells(20), [i % 2 for i in range(20)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    expected = refused("image")
    if how == "paths":
        column = pa.array([{"bytes": None, "path": f"/data/{i}.png"} for i in range(20)], kind)
    elif how == "lists":
        column = pa.array([list(cell[:20]) for cell in cells], pa.list_(pa.uint8()))
    elif how == "text":
        column = pa.array([f"/data/{i}.png" for i in range(20)])
    else:
        cells[4] = None
        column = pa.array(cells)
        left_out = Prepared({"all": truth_of(cells, labels)}, words=(r"\b1 (image|row)",))
        expected = either(left_out, refused("image|train", r"\b1\b|row 4|/4"))
    write_table(stage / "mine/train.parquet", image=column, label=labels)
    expect_prepared(stage, "mine", expected, "--max-bad", "20%")
