"""A label is what the source says: one whole number or one word for each image.

The rule is written in docs/data.md, "Labels and classes". Every table of labels is read by this file.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deit_ray.errors import UserError

LARGEST_LABEL = 10_000  # a label up to this number, or up to ten times the number of images, is allowed
NAMED = 5  # classes that a message names at most
WANTED = "a label is one whole number or one word"


def clean(column: pa.ChunkedArray | pa.Array, where: str) -> pa.Array:
    """The labels of a column, as int64 numbers or as words; null where the source has none (null or NaN).

    Args:
        column: of any type.
        where: what holds the labels, for messages, such as `train.parquet: column label`.

    Raises:
        UserError: the type holds neither whole numbers nor words, or some value is neither.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    kind = column.type
    if pa.types.is_dictionary(kind):
        return clean(column.cast(kind.value_type), where)
    if pa.types.is_null(kind):
        return pa.nulls(len(column), pa.int64())
    if pa.types.is_boolean(kind):
        return pc.if_else(column, "True", "False")
    if pa.types.is_integer(kind):
        return _numbers(column, where)
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _whole(column, where)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return _words(column, where)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return _words(column, where)
    raise UserError(f"{where}: holds {_in_words(kind)} for each image; {WANTED}")


def _in_words(kind: pa.DataType) -> str:
    if pa.types.is_fixed_size_list(kind):
        return f"a list of {kind.list_size}"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return "a list"
    if pa.types.is_temporal(kind):
        return "a date or time"
    return f"a value of the type {str(kind).partition('<')[0]}"


def _numbers(column: pa.Array, where: str) -> pa.Array:
    """Whole numbers as int64."""
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:  # of uint64
        raise UserError(f"{where}: has labels above 2^63; {_BOUND}") from None


def _whole(column: pa.Array, where: str) -> pa.Array:
    """Floating-point or decimal numbers as int64. NaN becomes null."""
    try:
        column = column.cast(pa.float64())
    except pa.ArrowInvalid:
        raise UserError(f"{where}: has labels that are too large; {_BOUND}") from None
    column = pc.if_else(pc.is_nan(column), None, column)
    wrong = pc.invert(pc.and_(pc.is_finite(column), pc.equal(column, pc.round(column))))
    if (row := _first(wrong)) is not None:
        raise UserError(f"{where}: row {row} has {column[row].as_py():g}; {WANTED}")
    if len(column) and (largest := pc.max(pc.abs(column)).as_py()) and largest >= 2**53:
        raise UserError(f"{where}: has the label {largest:g}; {_BOUND}")
    return column.cast(pa.int64())


def _words(column: pa.Array, where: str) -> pa.Array:
    """Words as strings."""
    try:
        words = column.cast(pa.large_string())
    except pa.ArrowInvalid:
        raise UserError(f"{where}: holds bytes that are no text; {WANTED}") from None
    if (row := _first(pc.equal(pc.utf8_trim_whitespace(words), ""))) is not None:
        raise UserError(f"{where}: row {row} has an empty label; {WANTED}")
    return words


def of_array(values: np.ndarray, where: str) -> pa.Array:
    """The labels of a NumPy array [images] or [images, 1]; see `clean`.

    Raises:
        UserError: also where an image has several values, as in one-hot labels.
    """
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        each = (
            f"{values.shape[1]} values" if values.ndim == 2 else f"an array of shape {list(values.shape[1:])}"
        )
        raise UserError(
            f"{where}: has {each} for each image; {WANTED} (the class of a one-hot row is its argmax(axis=1))"
        )
    if values.dtype.kind not in "iufbUS":
        raise UserError(f"{where}: holds values of the type {values.dtype.name}; {WANTED}")
    if values.dtype.kind == "f" and values.dtype.itemsize > 8:
        values = values.astype(np.float64)
    native = values.astype(values.dtype.newbyteorder("="))
    return clean(pa.array(native.tolist() if values.dtype.kind in "US" else native), where)


def of_list(values: Iterable, where: str) -> pa.Array:
    """The labels of a list of Python's numbers or words; see `clean`."""
    try:
        return clean(pa.array(list(values)), where)
    except (pa.ArrowException, OverflowError):
        raise UserError(f"{where}: holds labels of several types; {WANTED}") from None


def has_none(labels: pa.Array) -> bool:
    """Whether no image has a label: all are missing, or -1 as in the test splits of the Hugging Face hub."""
    if labels.type == pa.int64():
        return not pc.any(pc.not_equal(labels, -1)).as_py()
    return labels.null_count == len(labels)


def check_all_there(labels: pa.Array, where: str) -> None:
    """Refuses labels of which some are missing.

    Raises:
        UserError: naming the number of missing labels, and the first row.
    """
    if labels.null_count:
        row, count = _first(labels.is_null()), labels.null_count
        which = f"row {row}" if count == 1 else f"the first is row {row}"
        verb = "have" if count > 1 else "has"
        raise UserError(
            f"{where}: {count} of {len(labels)} rows {verb} no label (null or NaN), {which}; remove them, "
            "or give them labels"
        )


def numbered_classes(labels: np.ndarray, where: str, one: str = "row") -> list[str]:
    """The labels themselves as class names, from 0 to the largest.

    Args:
        labels: whole numbers, one for each image.
        where: what holds them, for the message.
        one: what holds one of them, for the message.

    Raises:
        UserError: a label is below 0, or so large that it can be no number of a class.
    """
    if len(labels) == 0:
        raise UserError(f"{where}: holds no labels")
    row = int(labels.argmin())
    if labels[row] < 0:
        raise UserError(f"{where}: {one} {row} has the label {labels[row]}, which is no class; {_FROM_ZERO}")
    largest, most = int(labels.max()), max(LARGEST_LABEL, 10 * len(labels))
    if largest > most:
        raise UserError(
            f"{where}: {one} {int(labels.argmax())} has the label {largest}, which can be no class of "
            f"{len(labels)} images; {_FROM_ZERO} (allowed is up to {most}), or use words"
        )
    return [str(label) for label in range(largest + 1)]


def words_of(parts: Iterable[pa.Array]) -> list[str]:
    """The different words of labels, sorted."""
    return sorted({word for part in parts for word in part.unique().to_pylist()})


def places(labels: pa.Array, classes: list[str], where: str) -> np.ndarray:
    """Each label's place in `classes`, int64 [images].

    Raises:
        UserError: a label is missing, or none of the classes.
    """
    check_all_there(labels, where)
    if labels.type == pa.int64():
        found = labels.to_numpy()
        wrong = (found < 0) | (found >= len(classes))
        if wrong.any():
            row = int(wrong.argmax())
            raise UserError(
                f"{where}: row {row} has the label {found[row]}; it must be 0 to {len(classes) - 1}, since "
                f"there are names for {len(classes)} classes"
            )
        return found
    found = pc.index_in(labels, pa.array(classes, labels.type))
    if (row := _first(found.is_null())) is not None:
        known = ", ".join(classes[:NAMED]) + (f" and {len(classes) - NAMED} more" if classes[NAMED:] else "")
        raise UserError(
            f'{where}: row {row} has the label "{labels[row]}", which is none of the classes {known}'
        )
    return found.to_numpy().astype(np.int64)


def _first(flags: pa.Array) -> int | None:
    """The row of the first true value; None if there is none."""
    row = pc.index(flags, True).as_py()
    return None if row < 0 else row


_FROM_ZERO = "classes are numbered from 0"
_BOUND = f"{_FROM_ZERO}, up to {LARGEST_LABEL} or ten times the number of images"
