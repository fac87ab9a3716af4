"""Sources that are tables: Parquet as on the Hugging Face hub, and arrays of pixels, such as CIFAR's."""

import contextlib
import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deit_ray import storage
from deit_ray.data.listing import Source, Split, find_split, listing, split_by_class, split_word
from deit_ray.errors import UserError

READ_ROWS = 64  # images in memory at a time
LABELS = ("label", "labels", "fine_label", "cls")
BATCH_FILE = re.compile(r"(data|test)_batch(_\d+)?|train|test")
ARRAY_NAMES = (("x_{}", "y_{}"), ("{}_images", "{}_labels"), ("{}_x", "{}_y"), ("images_{}", "labels_{}"))


def parquet(uris: list[str], folder: str) -> Source:
    """Parquet with a column of image files (`image.bytes`, or binary) and a column of labels.

    A word in a file's name or folder names its split. Class names come from the metadata that Hugging Face's
    `datasets` writes. Without metadata, the labels are the class names: numbers, or sorted words.
    """
    by_split: dict[str, list[str]] = {}
    for uri in uris:
        by_split.setdefault(split_word(uri[len(folder) :]), []).append(uri)
    opened = {word: _ParquetSplit(found) for word, found in by_split.items()}
    # ImageNet's own test split has no labels
    labelled = [word for word, found in opened.items() if found.has_labels]
    test, others = find_split(labelled)
    train = next((word for word in ("train", "") if word in opened), None)
    if train is None:
        raise UserError(
            f"{folder}: no Parquet file is named train, such as train-00000-of-00001.parquet; "
            f"found {', '.join(opened)}"
        )
    classes = opened[train].classes()
    splits = {"train": opened[train].split(classes)}
    if test:
        splits["test"] = opened[test].split(classes)
    else:
        splits = split_by_class(splits["train"].images, splits["train"].reader)
    unused = [*others, *(word for word in opened if word not in labelled)]
    notes = [f"the files named {word or 'otherwise'} are not used" for word in unused]
    return Source("parquet", classes, splits, notes)


class _ParquetSplit:
    """The Parquet files of one split, with their labels."""

    def __init__(self, uris: list[str]):
        self.uris = uris
        file = open_parquet(uris[0])
        self.schema = file.schema_arrow
        self.image, self.leaf = self._image_column()
        self.label = next((name for name in LABELS if name in self.schema.names), None)
        if self.label is None:
            raise UserError(
                f"{uris[0]}: no column of labels; known are {', '.join(LABELS)}, "
                f"it has {', '.join(self.schema.names)}"
            )
        columns = [open_parquet(uri).read(columns=[self.label])[self.label] for uri in uris]
        self.labels = [column.combine_chunks() for column in columns]

    def _image_column(self) -> tuple[str, str]:
        """Returns (name of the column of images, path of its bytes)."""
        for name in self.schema.names:
            type_ = self.schema.field(name).type
            if pa.types.is_struct(type_) and type_.get_field_index("bytes") >= 0:
                return name, f"{name}.bytes"
        for name in ("image", "image.bytes", "img", "jpg"):
            if name in self.schema.names and pa.types.is_binary(self.schema.field(name).type):
                return name, name
        raise UserError(
            f"{self.uris[0]}: no column of images; known are image.bytes and binary image, "
            f"it has {', '.join(self.schema.names)}"
        )

    @property
    def has_labels(self) -> bool:
        """Whether any image has a label: a word, or a number from 0."""
        return any(
            not pa.types.is_integer(found.type) or (len(found) and found.to_numpy().max() >= 0)
            for found in self.labels
        )

    def classes(self) -> list[str]:
        """The class names, by label."""
        described = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))
        names = described.get("info", {}).get("features", {}).get(self.label, {}).get("names")
        if names:
            return names
        if pa.types.is_integer(self.labels[0].type):
            largest = max(int(found.to_numpy().max()) for found in self.labels if len(found))
            return [str(label) for label in range(largest + 1)]
        return sorted({word for found in self.labels for word in found.to_pylist()})

    def split(self, classes: list[str]) -> Split:
        """The split's images, labelled by their place in `classes`."""
        index, parts = {name: label for label, name in enumerate(classes)}, []
        for number, (uri, found) in enumerate(zip(self.uris, self.labels, strict=True)):
            if found.null_count:
                raise UserError(f"{uri}: column {self.label}: {found.null_count} rows have no label")
            if pa.types.is_integer(found.type):
                labels = np.array(found.to_numpy(), np.int64)
            else:
                labels = np.array([index.get(word, -1) for word in found.to_pylist()], np.int64)
            if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
                raise UserError(
                    f"{uri}: column {self.label}: must be one of {len(classes)} classes; "
                    f"it has {labels.min()} to {labels.max()}"
                )
            stem = uri.rpartition("/")[2].removesuffix(".parquet")
            names = [f"{stem}/{row}" for row in range(len(labels))]
            parts.append(listing(names, labels, number, np.arange(len(labels))))
        return Split(pa.concat_tables(parts).combine_chunks(), ParquetRows(tuple(self.uris), self.leaf))


def open_parquet(uri: str) -> pq.ParquetFile:
    """Opens a Parquet file.

    Raises:
        UserError: the file cannot be read as Parquet.
    """
    filesystem, path = storage.open_uri(uri)
    try:
        return pq.ParquetFile(filesystem.open_input_file(path), pre_buffer=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{uri}: cannot be read as Parquet: {error}") from None


@dataclass(frozen=True)
class ParquetRows:
    """Reads image files from a Parquet column. `offset` is the row."""

    files: tuple[str, ...]
    column: str

    def read(self, images: pa.Table) -> Iterator[bytes]:
        numbers, rows = images["file"].to_numpy(), images["offset"].to_numpy()
        for number in np.unique(numbers):  # the listing is in the order of files and rows
            yield from self._read_file(self.files[number], rows[numbers == number])

    def _read_file(self, uri: str, rows: np.ndarray) -> Iterator[bytes]:
        file = open_parquet(uri)
        ends = np.cumsum([file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)])
        for group in np.unique(np.searchsorted(ends, rows, "right")):
            first = int(ends[group]) - file.metadata.row_group(int(group)).num_rows
            for batch in _batches(uri, file, int(group), self.column):
                wanted = rows[(rows >= first) & (rows < first + len(batch))] - first
                column = batch.column(0)
                column = column.field("bytes") if pa.types.is_struct(column.type) else column
                yield from (column[int(row)].as_py() or b"" for row in wanted)
                first += len(batch)


def _batches(uri: str, file: pq.ParquetFile, group: int, column: str) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(READ_ROWS, row_groups=[group], columns=[column], use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{uri}: row group {group} is damaged: {error}") from None


def arrays(uris: list[str], folder: str) -> Source:
    """Arrays of pixels: .npz or .npy files named like x_train and y_train, or CIFAR's batches."""
    names = {uri.rpartition("/")[2]: uri for uri in uris}
    if any(BATCH_FILE.fullmatch(name) for name in names):
        return _cifar_batches(names, folder)
    found = _find_arrays(names)
    pairs = {}
    for split in ("train", "test", "val"):
        for images, labels in ARRAY_NAMES:
            if images.format(split) in found and labels.format(split) in found:
                pairs[split] = found[images.format(split)], found[labels.format(split)]
    if "train" not in pairs:
        names = ", ".join(sorted(found)) if found else "none"
        raise UserError(
            f"{folder}: no arrays of training images; wanted are x_train and y_train, train_images and "
            f"train_labels or the like, found are {names}"
        )
    test, others = find_split(pairs)
    splits = {"train": _array_split(*pairs["train"], "train")}
    if test:
        splits["test"] = _array_split(*pairs[test], "test")
    classes = _numbered_classes(splits)
    if not test:
        splits = split_by_class(splits["train"].images, splits["train"].reader)
    return Source("arrays", classes, splits, [f"the arrays named {other} are not used" for other in others])


def _numbered_classes(splits: dict[str, Split]) -> list[str]:
    """The labels themselves as class names, from 0 to the largest."""
    largest = max(int(split.images["label"].to_numpy().max()) for split in splits.values())
    return [str(label) for label in range(largest + 1)]


@dataclass(frozen=True)
class Array:
    """An array in a .npy or .npz file. Single rows of it can be read.

    Attributes:
        uri: the file's URI.
        member: name in the .npz; None for a .npy file.
    """

    uri: str
    member: str | None

    def rows(self, wanted: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Yields the rows of these numbers, which must be in rising order; by default all rows."""
        with self._open() as stream:
            shape, dtype, begin = self._header(stream)
            size = int(np.prod(shape[1:])) * dtype.itemsize
            for row in np.arange(shape[0]) if wanted is None else wanted:
                stream.seek(begin + int(row) * size)
                yield np.frombuffer(stream.read(size), dtype).reshape(shape[1:])

    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        with self._open() as stream:
            return self._header(stream)[0]

    @contextlib.contextmanager
    def _open(self) -> Iterator:
        filesystem, path = storage.open_uri(self.uri)
        with filesystem.open_input_file(path) as file:
            if self.member is None:
                yield file
            else:
                with zipfile.ZipFile(file).open(self.member) as stream:
                    yield stream

    def _header(self, stream) -> tuple[tuple[int, ...], np.dtype, int]:
        """(shape, dtype, place of the first row in the stream)."""
        header = np.lib.format
        version = header.read_magic(stream)
        read = header.read_array_header_1_0 if version == (1, 0) else header.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if fortran or dtype.hasobject:
            raise UserError(f"{self.uri}: {self.member or 'the array'}: must hold numbers, in C order")
        return shape, dtype, stream.tell()


@dataclass(frozen=True)
class Pixels:
    """Reads RGB pixels from an array [images, height, width] or [images, height, width, channels].

    `offset` is the row.
    """

    images: Array

    def read(self, images: pa.Table) -> Iterator[np.ndarray]:
        yield from map(as_rgb, self.images.rows(images["offset"].to_numpy()))


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """RGB pixels, uint8 [height, width, 3], of grey or colour, without an alpha channel."""
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    channels = 3 if pixels.shape[2] >= 3 else 1
    return np.broadcast_to(pixels[:, :, :channels], (*pixels.shape[:2], 3))


def _find_arrays(names: dict[str, str]) -> dict[str, Array]:
    """The arrays of files, by name."""
    found = {}
    for name, uri in names.items():
        if name.endswith(".npy"):
            found[name.removesuffix(".npy")] = Array(uri, None)
        elif name.endswith(".npz"):
            filesystem, path = storage.open_uri(uri)
            with filesystem.open_input_file(path) as file:
                members = zipfile.ZipFile(file).namelist()
                found |= {member.removesuffix(".npy"): Array(uri, member) for member in members}
    return found


def _array_split(images: Array, labels: Array, split: str) -> Split:
    shape, values = images.shape(), np.array([int(np.ravel(row)[0]) for row in labels.rows()])
    if len(shape) not in (3, 4) or shape[0] != len(values) or len(values) == 0:
        raise UserError(
            f"{images.uri}: {split}: images of shape {list(shape)} and {len(values)} labels; "
            "must be [images, height, width] or [images, height, width, channels], and one label an image"
        )
    names = [f"{split}-{i:06d}" for i in range(shape[0])]
    return Split(listing(names, values, 0, np.arange(shape[0])), Pixels(images))


def _cifar_batches(names: dict[str, str], folder: str) -> Source:
    """CIFAR's Python version: pickled dictionaries with `data`, uint8 [images, 3 x 32 x 32], and `labels`.

    CIFAR-100 has `fine_labels` instead of `labels`.
    """
    batches = sorted(name for name in names if BATCH_FILE.fullmatch(name))
    members = {
        "train": [name for name in batches if not name.startswith("test")],
        "test": [name for name in batches if name.startswith("test")],
    }
    if not members["train"] or not members["test"]:
        raise UserError(f"{folder}: CIFAR's training and test batches are needed; found {', '.join(batches)}")
    reader, splits, key = CifarRows(tuple(names[name] for name in batches)), {}, b"labels"
    for split, of_split in members.items():
        parts = []
        for name in of_split:
            content = load_plain_pickle(names[name])
            key = b"fine_labels" if b"fine_labels" in content else b"labels"
            files = content.get(b"filenames", range(len(content[key])))
            files = [file.decode() if isinstance(file, bytes) else str(file) for file in files]
            parts.append(listing(files, content[key], batches.index(name), np.arange(len(files))))
        splits[split] = Split(pa.concat_tables(parts).combine_chunks(), reader)
    meta = next((names[name] for name in ("batches.meta", "meta") if name in names), None)
    described = load_plain_pickle(meta) if meta else {}
    classes = described.get(b"fine_label_names" if key == b"fine_labels" else b"label_names")
    classes = [name.decode() for name in classes] if classes else _numbered_classes(splits)
    return Source("arrays", classes, splits)


@dataclass(frozen=True)
class CifarRows:
    """Reads pixels from CIFAR's pickled batches. `offset` is the row."""

    files: tuple[str, ...]

    def read(self, images: pa.Table) -> Iterator[np.ndarray]:
        opened, data = None, None
        for number, row in zip(images["file"].to_pylist(), images["offset"].to_pylist(), strict=True):
            if number != opened:
                opened, data = number, load_plain_pickle(self.files[number])[b"data"]
            yield data[row].reshape(3, 32, 32).transpose(1, 2, 0)


PLAIN = {
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
}


class _PlainUnpickler(pickle.Unpickler):
    """Loads NumPy arrays and nothing else, so that a file cannot run code."""

    def find_class(self, module: str, name: str):
        if (module, name) not in PLAIN:
            raise pickle.UnpicklingError(f"holds {module}.{name}, which is not an array")
        return super().find_class(module, name)


def load_plain_pickle(uri: str) -> dict:
    """Loads a pickled dictionary of arrays, lists and words, with bytes as keys.

    Raises:
        UserError: the file holds anything else.
    """
    try:
        content = _PlainUnpickler(io.BytesIO(storage.read_bytes(uri)), encoding="bytes").load()
        return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
        raise UserError(f"{uri}: cannot be read as one of CIFAR's batches: {error}") from None
