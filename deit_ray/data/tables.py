"""Sources that are Parquet tables, as on the Hugging Face hub: a column of images, and a column of labels."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deit_ray import storage
from deit_ray.data import labels as label_rule
from deit_ray.data.arrays import as_rgb, axes_of, check_dtype
from deit_ray.data.listing import (
    Source,
    Split,
    Unreadable,
    find_split,
    listing,
    split_by_class,
    split_word,
)
from deit_ray.errors import UserError
from deit_ray.terminal.format import counted

READ_ROWS = 64  # images in memory at a time
# names of columns, the first that a table has is used
LABELS = ("label", "labels", "fine_label", "cls", "class", "target", "targets", "y", "label_id", "class_id",
          "category", "coarse_label")  # fmt: skip
IMAGES = ("image", "image.bytes", "img", "jpg", "jpeg", "png", "webp", "images", "image_bytes",
          "pixel_values", "pixels", "picture", "photo")  # fmt: skip


def parquet(uris: list[str], folder: str) -> Source:
    """Parquet with a column of images (files or pixels) and a column of labels.

    A word in a file's name or folder names its split. Class names come from the metadata that Hugging Face's
    `datasets` writes. Without metadata, the labels are the class names: numbers, or sorted words.

    Raises:
        UserError: a file cannot be read, has no such columns, or other columns than its neighbours; a
            label is missing, or none of the classes.
    """
    by_split: dict[str, list[str]] = {}
    for uri in uris:
        by_split.setdefault(split_word(uri[len(folder) :]), []).append(uri)
    train = next((word for word in ("train", "") if word in by_split), None)
    if train is None:
        raise UserError(
            f"{folder}: no Parquet file is named train, such as train-00000-of-00001.parquet; "
            f"found {', '.join(by_split)}"
        )
    opened = {train: _Tables(by_split[train], True)}
    opened |= {word: _Tables(found, False) for word, found in by_split.items() if word != train}
    labelled = [
        word for word, found in opened.items() if found.has_labels
    ]  # ImageNet's own test split is not
    test, others = find_split(labelled)
    used = {"train": opened[train]} | ({"test": opened[test]} if test else {})
    classes = _classes(list(used.values()))
    splits = {split: tables.split(classes) for split, tables in used.items()}
    notes, recognised = [], [f"{split}: {tables.described}" for split, tables in used.items()]
    if not test:
        splits = split_by_class(splits["train"].images, splits["train"].reader)
    for tables in used.values():
        notes += [note for note in tables.notes if note not in notes]
    for word in opened:
        if word not in (train, test):
            why = "" if word in others else ": they have no labels"
            if word not in labelled or word in others:
                notes.append(f"the files named {word or 'otherwise'} are not used{why}")
    return Source("parquet", classes, splits, notes, recognised)


def _classes(used: list["_Tables"]) -> list[str]:
    """The class names: those of the metadata, else numbers from 0, or sorted words of train."""
    train = used[0]
    named = [
        (uri, found) for tables in used for uri, found in zip(tables.uris, tables.names, strict=True) if found
    ]
    for uri, found in named:
        if found != named[0][1]:
            raise UserError(f"{uri}: its metadata names other classes than that of {named[0][0]}")
    for tables in used:
        for uri, found in zip(tables.uris, tables.labels, strict=True):
            label_rule.check_all_there(found, tables.where(uri))
            if len(found) and found.type != train.label_type and not (named and train.label_type is None):
                kinds = ("numbers", "words") if found.type == pa.int64() else ("words", "numbers")
                raise UserError(
                    f"{tables.where(uri)}: holds {kinds[0]}, and {train.uris[0]} holds {kinds[1]}"
                )
    if named:
        return named[0][1]
    if train.label_type is None:
        raise UserError(f"{train.uris[0]}: holds no rows")
    if train.label_type != pa.int64():
        return label_rule.words_of(train.labels)
    ids = [(tables, np.concatenate([found.to_numpy() for found in tables.labels])) for tables in used]
    sized = [_numbered(tables, numbers) for tables, numbers in ids if len(numbers)]
    return max(sized, key=len)


def _numbered(tables: "_Tables", numbers: np.ndarray) -> list[str]:
    if len(tables.uris) == 1:
        return label_rule.numbered_classes(numbers, tables.where(tables.uris[0]))
    folder = tables.uris[0].rpartition("/")[0]
    return label_rule.numbered_classes(
        numbers, f"{folder}: column {tables.label} of {len(tables.uris)} files"
    )


class _Tables:
    """The Parquet files of one split, with their labels.

    Args:
        uris: the files.
        is_train: whether labels are needed; another split may have none.
    """

    def __init__(self, uris: list[str], is_train: bool):
        self.uris, self.names, self.labels, self.notes = uris, [], [], []
        opened = [open_parquet(uri) for uri in uris]
        schema = opened[0].schema_arrow
        self.image, self.label = _image_column(uris[0], schema), _label_column(schema)
        if self.label is None and is_train:
            raise UserError(
                f"{uris[0]}: no column of labels; known are {', '.join(LABELS)}, "
                f"it has {', '.join(schema.names)}"
            )
        others = [name for name in schema.names if name not in (self.image, self.label)]
        for name in others:
            if name in LABELS or _image_kind(schema.field(name).type):
                self.notes.append(f"the column {name} is not used")
        for uri, file in zip(uris, opened, strict=True):
            self._add(uri, file, schema)
        self.leaf = _leaf(self.image, schema.field(self.image).type)
        rows = sum(file.metadata.num_rows for file in opened)
        files = counted(len(uris), "file")
        self.described = (
            f"{counted(rows, 'row')} of {files}, images from the column {self.image} "
            f"({_image_kind(schema.field(self.image).type)})"
        )
        if self.label:
            self.described += f", labels from {self.label}"

    def _add(self, uri: str, file: pq.ParquetFile, first: pa.Schema) -> None:
        """Checks a file's columns against the first file's, and reads its labels."""
        schema = file.schema_arrow
        for name in filter(None, (self.image, self.label)):
            if name not in schema.names:
                raise UserError(
                    f"{uri}: has no column {name}, which {self.uris[0]} has; it has {', '.join(schema.names)}"
                )
        own, wanted = (_image_kind(found.field(self.image).type) for found in (schema, first))
        if own != wanted:
            raise UserError(
                f"{uri}: its column {self.image} holds {own or 'no images'}, that of {self.uris[0]} {wanted}"
            )
        self.names.append(_hub_features(uri, schema).get(self.label, {}).get("names"))
        if self.label is None:
            self.labels.append(pa.nulls(file.metadata.num_rows, pa.int64()))
            return
        try:
            column = file.read(columns=[self.label])[self.label]
        except (OSError, pa.ArrowException, KeyError):
            raise UserError(f"{self.where(uri)}: cannot be read: the file is damaged or encrypted") from None
        self.labels.append(label_rule.clean(column, self.where(uri)))

    def where(self, uri: str) -> str:
        """The place of a file's labels, for messages."""
        return f"{uri}: column {self.label}"

    @property
    def has_labels(self) -> bool:
        """Whether any image has a label."""
        return self.label is not None and not all(map(label_rule.has_none, self.labels))

    @property
    def label_type(self) -> pa.DataType | None:
        """The type of the labels: int64 or words; None where there are no rows."""
        return next((found.type for found in self.labels if len(found)), None)

    def split(self, classes: list[str]) -> Split:
        """The split's images, labelled by their place in `classes`."""
        parts = []
        for number, (uri, found) in enumerate(zip(self.uris, self.labels, strict=True)):
            labels = label_rule.places(found, classes, self.where(uri))
            stem = uri.rpartition("/")[2].removesuffix(".parquet")
            names = [f"{stem}/{row}" for row in range(len(labels))]
            parts.append(listing(names, labels, number, np.arange(len(labels))))
        return Split(pa.concat_tables(parts).combine_chunks(), ParquetRows(tuple(self.uris), self.leaf))


def _label_column(schema: pa.Schema) -> str | None:
    """The column of labels: the first known name, else the only one that the hub's metadata calls a label."""
    if found := _first_known(schema.names, LABELS):
        return found
    features = _hub_features("", schema)
    described = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    return described[0] if len(described) == 1 else None


def _image_column(uri: str, schema: pa.Schema) -> str:
    """The column of images: the first known name whose type holds images, else the only such column.

    Raises:
        UserError: no column holds images, or several with unknown names do.
    """
    able = [name for name in schema.names if _image_kind(schema.field(name).type)]
    if found := _first_known(able, IMAGES):
        return found
    if len(able) == 1:
        return able[0]
    if able:
        raise UserError(
            f"{uri}: several columns hold images: {', '.join(able)}; rename the wanted one to image"
        )
    for name in schema.names:
        if name.lower() in IMAGES:
            kind = schema.field(name).type
            if depth := _depth(kind)[0]:
                check_dtype(_numpy_dtype(_depth(kind)[1]), f"{uri}: column {name}")
                raise UserError(f"{uri}: column {name}: its pixels have {depth} axes; wanted are 2 or 3")
            what = "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else str(kind)
            raise UserError(
                f"{uri}: column {name} holds {what}; wanted are the bytes of image files, or pixels"
            )
    raise UserError(
        f"{uri}: no column of images; wanted is a column image with the bytes of image files, a struct with "
        f"bytes, or pixels; it has {', '.join(schema.names)}"
    )


def _first_known(names: list[str], known: tuple[str, ...]) -> str | None:
    """The name that comes first among the known ones; in capital letters too, where there is no other."""
    by_lower = {name.lower(): name for name in reversed(names)} | {name: name for name in names}
    return next((by_lower[name] for name in known if name in by_lower), None)


def _image_kind(kind: pa.DataType) -> str | None:
    """What a column holds: files, files with paths, or pixels; None where it cannot hold images."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return "files with paths" if place >= 0 and _holds_bytes(kind.field(place).type) else None
    if _holds_bytes(kind):
        return "files"
    depth, value = _depth(kind)
    if depth == 1 and value == pa.uint8() and not isinstance(kind, pa.FixedShapeTensorType):
        return "files"
    return "pixels" if depth in (2, 3) and value in (pa.uint8(), pa.uint16(), pa.bool_()) else None


def _holds_bytes(kind: pa.DataType) -> bool:
    is_kind = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return any(check(kind) for check in is_kind)


def _depth(kind: pa.DataType) -> tuple[int, pa.DataType]:
    """(number of axes, type of the values) of nested lists and tensors; 0 axes for other types."""
    if isinstance(kind, pa.FixedShapeTensorType):
        return len(kind.shape), kind.value_type
    depth = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        depth, kind = depth + 1, kind.value_type
    return depth, kind


def _numpy_dtype(kind: pa.DataType) -> np.dtype:
    try:
        return np.dtype(kind.to_pandas_dtype())
    except (NotImplementedError, TypeError):
        return np.dtype(object)


def _leaf(name: str, kind: pa.DataType) -> str:
    """The path of a column's images."""
    return f"{name}.bytes" if pa.types.is_struct(kind) else name


def _hub_features(uri: str, schema: pa.Schema) -> dict[str, dict]:
    """What the hub's `datasets` wrote about each column.

    Raises:
        UserError: it is no JSON.
    """
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except ValueError:
        raise UserError(f"{uri}: its metadata huggingface is no JSON; write the file again") from None
    info = described.get("info") if isinstance(described, dict) else None
    features = info.get("features") if isinstance(info, dict) else None
    features = features if isinstance(features, dict) else {}
    return {name: found for name, found in features.items() if isinstance(found, dict)}


def open_parquet(uri: str) -> pq.ParquetFile:
    """Opens a Parquet file.

    Raises:
        UserError: the file cannot be read as Parquet.
    """
    filesystem, path = storage.open_uri(uri)
    try:
        return pq.ParquetFile(filesystem.open_input_file(path), pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        why = "it is cut off, damaged, or no Parquet file"
        if "crypt" in str(error):
            why = "it is encrypted; write it without encryption"
        elif isinstance(error, OSError) and error.errno:
            why = error.strerror
        raise UserError(f"{uri}: cannot be read as Parquet: {why}") from None


@dataclass(frozen=True)
class ParquetRows:
    """Reads images from a Parquet column. `offset` is the row."""

    files: tuple[str, ...]
    column: str

    def read(self, images: pa.Table) -> Iterator[bytes | np.ndarray | Unreadable]:
        numbers, rows = images["file"].to_numpy(), images["offset"].to_numpy()
        for number in np.unique(numbers):  # the listing is in the order of files and rows
            yield from self._read_file(self.files[number], rows[numbers == number])

    def _read_file(self, uri: str, rows: np.ndarray) -> Iterator[bytes | np.ndarray | Unreadable]:
        file = open_parquet(uri)
        ends = np.cumsum([file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)])
        for group in np.unique(np.searchsorted(ends, rows, "right")):
            first = int(ends[group]) - file.metadata.row_group(int(group)).num_rows
            for batch in _batches(uri, file, int(group), self.column):
                wanted = rows[(rows >= first) & (rows < first + len(batch))] - first
                yield from (_image_of(batch.column(0)[int(row)]) for row in wanted)
                first += len(batch)


def _batches(uri: str, file: pq.ParquetFile, group: int, column: str) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(READ_ROWS, row_groups=[group], columns=[column], use_threads=False)
    except (OSError, pa.ArrowException):
        raise UserError(
            f"{uri}: row group {group} cannot be read: the file is damaged or encrypted"
        ) from None


def _image_of(value: pa.Scalar) -> bytes | np.ndarray | Unreadable:
    """The image of a row: the bytes of a file, or RGB pixels."""
    if pa.types.is_struct(value.type):
        value = value["bytes"] if value.is_valid else value
    if not value.is_valid:
        return Unreadable("the row holds no image")
    if _holds_bytes(value.type):
        return value.as_py()
    if _depth(value.type)[0] == 1:
        return (
            bytes(value.as_py())
            if not value.values.null_count
            else Unreadable("a part of its bytes is missing")
        )
    try:
        pixels = _pixels_of(value)
        return as_rgb(pixels, axes_of(pixels.shape, "the row"))
    except (UserError, ValueError) as error:
        return Unreadable(str(error))


def _pixels_of(value: pa.Scalar) -> np.ndarray:
    """The array of a tensor, or of nested lists.

    Raises:
        ValueError: lists of one level have different lengths, or a value is missing.
    """
    if isinstance(value.type, pa.FixedShapeTensorType):
        return value.to_numpy()
    values, shape = value.values, [len(value.values)]
    while _depth(values.type)[0]:
        lengths = pc.unique(pc.list_value_length(values))
        if len(lengths) != 1 or not lengths[0].is_valid:
            raise ValueError("its rows of pixels have different lengths")
        shape.append(lengths[0].as_py())
        values = values.flatten()
    if values.null_count:
        raise ValueError("some of its pixels are missing")
    return values.to_numpy(zero_copy_only=False).reshape(shape)
