"""Sources that are arrays of pixels: .npy and .npz files, and CIFAR's pickled batches."""

import contextlib
import io
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from deit_ray import storage
from deit_ray.data import labels as label_rule
from deit_ray.data.listing import TEST_FOLDERS, Source, Split, find_split, listing, split_by_class, split_word
from deit_ray.errors import UserError
from deit_ray.terminal.format import counted

BATCH_FILE = re.compile(r"(data|test)_batch(_\d+)?|train|test")
IMAGE_WORDS = {"x", "image", "images", "img", "imgs", "pixels", "data"}
LABEL_WORDS = {"y", "label", "labels", "target", "targets", "cls"}
CHANNELS = (1, 3, 4)
SHAPES = (
    "[images, height, width] or [images, height, width, channels] (1, 3 or 4 channels, or channels first)"
)


def arrays(uris: list[str], folder: str) -> Source:
    """Arrays of pixels: .npz or .npy files with names like x_train and y_train, or CIFAR's batches."""
    names = {uri.rpartition("/")[2]: uri for uri in uris}
    if any(BATCH_FILE.fullmatch(name) for name in names):
        return _cifar_batches(names, folder)
    found, unknown = _find_arrays(uris, folder)
    used = {split for split, kind in found if kind == "images" and (split, "labels") in found}
    train = next((split for split in ("train", "") if split in used), None)
    if train is None:
        raise UserError(_no_training_arrays(folder, found, unknown))
    test, others = find_split(used)
    chosen = {"train": train} | ({"test": test} if test else {})
    splits, parts, recognised, notes = {}, [], [], []
    for split, word in chosen.items():
        images, labels = found[word, "images"], found[word, "labels"]
        opened = _open_split(images, labels, split)
        if split == "test" and label_rule.has_none(opened.labels):
            notes.append(f"{images.name} is not used: {labels.name} has no labels")
            continue
        parts.append((labels, opened.labels))
        splits[split] = opened
        count = counted(opened.rows, "image")
        recognised.append(f"{split}: {count} from {images.name} ({opened.described}), "
                          f"labels from {labels.name}")  # fmt: skip
    notes += [note for opened in splits.values() for note in opened.notes]
    classes = _classes(parts)
    ready = {split: opened.split(classes) for split, opened in splits.items()}
    if "test" not in ready:
        ready = split_by_class(ready["train"].images, ready["train"].reader)
    notes += [f"the arrays named {other} are not used" for other in others]
    lone = [array for (split, _), array in found.items() if split not in (*chosen.values(), *others)]
    notes += [f"{array.name} is not used" for array in [*lone, *unknown]]
    return Source("arrays", classes, ready, notes, recognised)


def _no_training_arrays(folder: str, found: dict, unknown: list["Array"]) -> str:
    names = sorted([array.name for array in found.values()] + [array.name for array in unknown])
    for split, kind in (("train", "images"), ("train", "labels"), ("", "images"), ("", "labels")):
        if (split, kind) in found:
            other = "labels" if kind == "images" else "images"
            return (
                f"{found[split, kind].where}: no array holds its {other}; wanted are x_train and y_train, "
                f"train_images and train_labels or the like; found are {', '.join(names)}"
            )
    return (
        f"{folder}: no arrays of training images; wanted are x_train and y_train, train_images and "
        f"train_labels or the like, found are {', '.join(names) or 'none'}"
    )


@dataclass(frozen=True)
class Array:
    """An array in a .npy or .npz file. Single rows of it can be read.

    Attributes:
        uri: the file's URI.
        member: name in the .npz; None for a .npy file.
    """

    uri: str
    member: str | None

    @property
    def name(self) -> str:
        """The array's name, without a suffix."""
        return (self.member or self.uri.rpartition("/")[2]).removesuffix(".npy")

    @property
    def where(self) -> str:
        """File and name, for messages."""
        return f"{self.uri}: {self.name}" if self.member else self.uri

    def rows(self, wanted: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Yields the rows of these numbers, which must be in rising order; by default all rows.

        Raises:
            UserError: the file is damaged.
        """
        with self._open() as (stream, _):
            shape, dtype, begin = self._header(stream)
            size = int(np.prod(shape[1:])) * dtype.itemsize
            for row in range(shape[0]) if wanted is None else wanted:
                try:
                    stream.seek(begin + int(row) * size)
                    content = stream.read(size)
                except (zlib.error, zipfile.BadZipFile, OSError, EOFError):
                    content = b""
                if len(content) < size:
                    raise UserError(f"{self.where}: row {row} cannot be read: the file is damaged")
                yield np.frombuffer(content, dtype).reshape(shape[1:])

    def values(self) -> np.ndarray:
        """The whole array, for labels."""
        shape, dtype = self.header()
        with self._open() as (stream, _):
            stream.seek(self._header(stream)[2])
            content = stream.read(int(np.prod(shape)) * dtype.itemsize)
        return np.frombuffer(content, dtype).reshape(shape)

    def header(self) -> tuple[tuple[int, ...], np.dtype]:
        """The array's shape and dtype.

        Raises:
            UserError: the file is no array, or shorter than its header says, or holds pickled objects.
        """
        with self._open() as (stream, length):
            shape, dtype, begin = self._header(stream)
        needed = begin + int(np.prod([int(side) for side in shape], dtype=object)) * dtype.itemsize
        if length < needed:
            raise UserError(f"{self.where}: is cut off: it has {length} bytes of {needed}")
        return shape, dtype

    @contextlib.contextmanager
    def _open(self) -> Iterator:
        """Yields (the array's stream, its length in bytes)."""
        filesystem, path = storage.open_uri(self.uri)
        with filesystem.open_input_file(path) as file:
            if self.member is None:
                yield file, file.size()
            else:
                try:
                    packed = zipfile.ZipFile(file)
                    opened = packed.open(self.member)
                except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
                    raise UserError(f"{self.where}: cannot be unpacked: {error}") from None
                with opened as stream:
                    yield stream, packed.getinfo(self.member).file_size

    def _header(self, stream) -> tuple[tuple[int, ...], np.dtype, int]:
        """(shape, dtype, place of the first row in the stream)."""
        header = np.lib.format
        try:
            version = header.read_magic(stream)
            read = header.read_array_header_1_0 if version == (1, 0) else header.read_array_header_2_0
            shape, fortran, dtype = read(stream)
        except (ValueError, SyntaxError, EOFError, OSError, zlib.error, zipfile.BadZipFile, UnicodeError):
            raise UserError(f"{self.where}: cannot be read as a NumPy array of numbers or words") from None
        if dtype.hasobject:
            raise UserError(
                f"{self.where}: holds pickled objects, which are not read since they could run code; save "
                "an array of numbers or words, such as one made of x.tolist()"
            )
        if fortran and len(shape) > 1:
            raise UserError(f"{self.where}: is in Fortran's order; save x.copy(order='C')")
        return shape, dtype, stream.tell()


@dataclass(frozen=True)
class Pixels:
    """Reads RGB pixels from an array [images, height, width], or with channels; `offset` is the row.

    Attributes:
        images: the array.
        axes: HW, HWC or CHW.
    """

    images: Array
    axes: str = "HWC"

    def read(self, images: pa.Table) -> Iterator[np.ndarray]:
        for row in self.images.rows(images["offset"].to_numpy()):
            yield as_rgb(row, self.axes)


def as_rgb(pixels: np.ndarray, axes: str) -> np.ndarray:
    """RGB pixels [height, width, 3] of grey or colour, without an alpha channel, of the same dtype.

    Args:
        axes: HW, HWC or CHW.
    """
    pixels = pixels[:, :, None] if axes == "HW" else pixels
    pixels = pixels.transpose(1, 2, 0) if axes == "CHW" else pixels
    return np.broadcast_to(pixels[:, :, : min(3, pixels.shape[2])], (*pixels.shape[:2], 3))


def axes_of(shape: tuple[int, ...], where: str) -> str:
    """The order of an image's axes, where its shape leaves no doubt: HW, HWC or CHW.

    Args:
        shape: of one image.

    Raises:
        UserError: the shape is of no image, or fits two orders.
    """
    if 0 not in shape and len(shape) == 2 and shape[1] not in CHANNELS:
        return "HW"
    if 0 not in shape and len(shape) == 3:
        is_last, is_first = shape[2] in CHANNELS, shape[0] in CHANNELS
        if is_last != is_first:
            return "HWC" if is_last else "CHW"
        if is_last:
            raise UserError(
                f"{where}: its images have the shape {list(shape)}: the channels can be the first or the "
                "last axis; save images that are larger, or as files"
            )
    raise UserError(f"{where}: its images have the shape {list(shape)}; wanted are {SHAPES}")


def check_dtype(dtype: np.dtype, where: str) -> None:
    """Refuses pixels whose range their type does not declare.

    Raises:
        UserError: naming the type, and how to save 8 bits.
    """
    if dtype.kind == "b" or (dtype.kind == "u" and dtype.itemsize <= 2):
        return
    if dtype.kind == "f":
        cure = "where 0 to 1 is meant, save (255 * x).round().astype('uint8')"
    else:
        cure = "where 0 to 255 is meant, save x.astype('uint8')"
    raise UserError(f"{where}: has pixels of the type {dtype.name}, whose range is not declared; {cure}")


@dataclass(frozen=True)
class _Opened:
    """The arrays of a split, checked: their labels, and how to read their images."""

    images: Array
    labels: pa.Array
    where: str
    name: str
    rows: int
    axes: str
    described: str
    notes: list[str]

    def split(self, classes: list[str]) -> Split:
        names = [f"{self.name}-{i:06d}" for i in range(self.rows)]
        labels = label_rule.places(self.labels, classes, self.where)
        return Split(listing(names, labels, 0, np.arange(self.rows)), Pixels(self.images, self.axes))


def _open_split(images: Array, labels: Array, name: str) -> _Opened:
    """Checks the arrays of a split against each other."""
    (shape, dtype), (label_shape, _) = images.header(), labels.header()
    if not shape or not label_shape or shape[0] == 0 or shape[0] != label_shape[0]:
        last = bool(shape) and label_shape and shape[-1] == label_shape[0]
        hint = "; its last axis counts the images: move it to the front" if last else ""
        raise UserError(
            f"{images.where}: has the shape {list(shape)}, and {labels.name} the shape {list(label_shape)}; "
            f"wanted are {SHAPES}, and one label for each image{hint}"
        )
    check_dtype(dtype, images.where)
    axes = axes_of(shape[1:], images.where)
    height, width = shape[2:4] if axes == "CHW" else shape[1:3]
    first = ", channels first" if axes == "CHW" else ""
    notes = []
    if dtype.kind == "b":
        notes.append(f"{images.name}: False becomes black (0), True becomes white (255)")
    if 4 in (shape[1:2] if axes == "CHW" else shape[3:]):
        notes.append(f"{images.name}: the fourth channel is taken for transparency, and dropped")
    values = label_rule.of_array(labels.values(), labels.where)
    described = f"{dtype.name}, {height}x{width}{first}"
    return _Opened(images, values, labels.where, name, shape[0], axes, described, notes)


def _classes(parts: list[tuple[Array, pa.Array]]) -> list[str]:
    """The class names of all splits' labels: numbers, or sorted words.

    Args:
        parts: the labels of train, then those of test, if they are used.
    """
    for array, found in parts:
        label_rule.check_all_there(found, array.where)
    if len({found.type for _, found in parts}) > 1:
        raise UserError(
            f"{parts[1][0].where}: has numbers and {parts[0][0].name} words, or the other way round"
        )
    if parts[0][1].type != pa.int64():
        return label_rule.words_of([parts[0][1]])
    sized = [label_rule.numbered_classes(found.to_numpy(), array.where) for array, found in parts]
    return max(sized, key=len)


def _find_arrays(uris: list[str], folder: str) -> tuple[dict[tuple[str, str], Array], list[Array]]:
    """Returns (the arrays by split and kind, which is images or labels; the arrays with other names).

    A split is train, a word of TEST_FOLDERS, or empty where no name says it.
    """
    found, unknown = {}, []
    for uri in uris:
        path = uri[len(folder) :].strip("/")
        inside = _arrays_in(uri)
        for array in inside:
            place = path.rpartition(".")[0]
            own = array.name if array.member else place.rpartition("/")[2]
            kind = _kind(own) or (_kind(place) if len(inside) == 1 else None)
            split = split_word(_spaced(own)) or split_word(_spaced(place))
            if kind is None:
                unknown.append(array)
            elif (split, kind) in found:
                raise UserError(
                    f"{array.where}: {kind} of {split or 'training'} too, as {found[split, kind].where}; "
                    "join them, or remove one"
                )
            else:
                found[split, kind] = array
    return found, unknown


def _arrays_in(uri: str) -> list[Array]:
    """The arrays of a file: one of a .npy, some of an .npz, none of another file."""
    if uri.lower().endswith(".npy"):
        return [Array(uri, None)]
    if not uri.lower().endswith(".npz"):
        return []
    filesystem, path = storage.open_uri(uri)
    with filesystem.open_input_file(path) as file:
        try:
            return [Array(uri, member) for member in zipfile.ZipFile(file).namelist()]
        except (zipfile.BadZipFile, OSError):
            raise UserError(f"{uri}: cannot be read as an .npz: it is cut off, damaged, or no .npz") from None


def _spaced(name: str) -> str:
    """The words of a name, apart: x train for xTrain, x_train and Xtrain."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    splits = "|".join(("train", *TEST_FOLDERS))
    return re.sub(rf"\b([xy])({splits})\b", r"\1 \2", name.lower().replace("_", " "))


def _kind(name: str) -> str | None:
    """Whether a name says images or labels; None where it says neither."""
    words = set(re.split(r"[^a-z]+", _spaced(name)))
    if words & LABEL_WORDS:
        return "labels"
    return "images" if words & IMAGE_WORDS else None


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
    opened = {name: _Batch.open(names[name]) for name in batches}
    meta = next((names[name] for name in ("batches.meta", "meta") if name in names), None)
    described = load_plain_pickle(meta) if meta else {}
    key = opened[members["train"][0]].key
    known = described.get(b"fine_label_names" if key == b"fine_labels" else b"label_names")
    if known:
        classes = [name.decode() if isinstance(name, bytes) else str(name) for name in known]
    else:
        classes = max(
            (label_rule.numbered_classes(batch.labels.to_numpy(), batch.uri) for batch in opened.values()),
            key=len,
        )
    reader, splits = CifarRows(tuple(names[name] for name in batches)), {}
    for split, of_split in members.items():
        parts = []
        for name in of_split:
            batch = opened[name]
            labels = label_rule.places(batch.labels, classes, batch.uri)
            parts.append(listing(batch.files, labels, batches.index(name), np.arange(len(labels))))
        splits[split] = Split(pa.concat_tables(parts).combine_chunks(), reader)
    return Source("arrays", classes, splits)


@dataclass(frozen=True)
class _Batch:
    """One of CIFAR's batches: its labels, and the names of its images."""

    uri: str
    key: bytes
    labels: pa.Array
    files: list[str]

    @classmethod
    def open(cls, uri: str) -> "_Batch":
        content = load_plain_pickle(uri)
        key = b"fine_labels" if b"fine_labels" in content else b"labels"
        data = content.get(b"data")
        if key not in content or not isinstance(data, np.ndarray):
            raise UserError(f"{uri}: not one of CIFAR's batches: it has no data or no labels")
        labels = label_rule.of_list(content[key], uri)
        label_rule.check_all_there(labels, uri)
        if data.dtype != np.uint8 or data.shape != (len(labels), 3072) or labels.type != pa.int64():
            raise UserError(
                f"{uri}: data is {data.dtype.name} {list(data.shape)} with {len(labels)} labels; CIFAR's is "
                "uint8 [images, 3072], with a number for each image"
            )
        files = content.get(b"filenames", range(len(labels)))
        files = [file.decode() if isinstance(file, bytes) else str(file) for file in files]
        return cls(uri, key, labels, files)


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
    except pickle.UnpicklingError as error:
        raise UserError(f"{uri}: cannot be read as one of CIFAR's batches: {error}") from None
    except Exception:  # pickle raises any kind on bytes that are no pickle
        raise UserError(f"{uri}: cannot be read as one of CIFAR's batches") from None
