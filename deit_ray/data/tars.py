"""Sources that are tars: ILSVRC2012's own archives, and WebDataset. They are indexed by their headers, never unpacked."""

import io
import re
import tarfile
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from deit_ray import storage
from deit_ray.data.listing import Ranges, Source, Split, find_split, listing, split_by_class
from deit_ray.errors import UserError

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH, META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
IMAGES = ("jpg", "jpeg", "png", "webp", "ppm")  # WebDataset's extensions for an image
CLASS_FILES = ("classnames.txt", "classes.txt")
LOCAL_BUFFER, REMOTE_BUFFER = 4096, 1 << 20  # bytes: a header on a disk, and a request worth its wait


def ilsvrc2012(folder: str, labels: str | None) -> Source:
    """The folder with ILSVRC2012_img_train.tar, a tar of class tars, and ILSVRC2012_img_val.tar with its labels.

    Args:
        labels: of the validation images: a text file of `name synset` lines, or of synsets in the order of the names. By
            default the devkit's, as ILSVRC2012_devkit_t12.tar.gz or unpacked, beside the tars.
    """
    names = storage.list_names(folder)
    if TRAIN_TAR not in names:
        raise UserError(f"{folder}: holds no {TRAIN_TAR}")
    uri = storage.join(folder, TRAIN_TAR)
    tars = sorted(
        (name.removesuffix(".tar"), offset, size)
        for name, offset, size in members(uri)
        if name.endswith(".tar")
    )
    classes = [name.rpartition("/")[2] for name, _, _ in tars]
    if len(classes) < 2:
        raise UserError(
            f"{uri}: holds {len(classes)} class tars; ILSVRC2012's holds 1,000, such as n01440764.tar"
        )
    parts = []
    for label, (_, start, size) in enumerate(tars):
        found = sorted(members(uri, start, size))
        if not found:
            raise UserError(f"{uri}: {classes[label]}.tar holds no images")
        inner, offsets, sizes = zip(*found, strict=True)
        parts.append(listing(list(inner), label, 0, offsets, sizes))
    train = pa.concat_tables(parts).combine_chunks()
    if VAL_TAR not in names:
        note = f"no {VAL_TAR} there: a fifth of each class of the training images is kept for testing"
        return Source("ilsvrc2012", classes, split_by_class(train, Ranges((uri,))), [note])
    val_uri = storage.join(folder, VAL_TAR)
    inner, offsets, sizes = zip(*sorted(members(val_uri)), strict=True)
    val_labels = (
        _given_labels(labels, inner, classes) if labels else _devkit_labels(folder, names, inner, classes)
    )
    test = Split(listing(list(inner), val_labels, 0, offsets, sizes), Ranges((val_uri,)))
    return Source("ilsvrc2012", classes, {"train": Split(train, Ranges((uri,))), "test": test})


def _devkit_labels(folder: str, names: list[str], images: tuple[str, ...], classes: list[str]) -> list[int]:
    """The labels in the order of the images: line i of the ground truth is the ILSVRC2012_ID of image i, which meta.mat maps to a synset.

    The ids are not the order of the synsets.
    """
    from scipy.io import loadmat

    if DEVKIT in names:
        truth, meta = (
            storage.read_bytes(storage.join(folder, DEVKIT, file)) for file in (GROUND_TRUTH, META)
        )
    elif f"{DEVKIT}.tar.gz" in names:
        with tarfile.open(
            fileobj=io.BytesIO(storage.read_bytes(storage.join(folder, f"{DEVKIT}.tar.gz")))
        ) as tar:
            truth, meta = (tar.extractfile(f"{DEVKIT}/{file}").read() for file in (GROUND_TRUTH, META))
    else:
        raise UserError(
            f"{folder}: the labels of {VAL_TAR} are missing: put {DEVKIT}.tar.gz beside it, or name a file with --labels FILE "
            "(lines of: name synset)"
        )
    synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
    synset_of = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
    found = [synset_of.get(int(line), line) for line in truth.decode().split()]
    return _to_labels(f"the devkit's {GROUND_TRUTH}", found, images, classes)


def _given_labels(uri: str, images: tuple[str, ...], classes: list[str]) -> list[int]:
    try:
        lines = [
            re.split(r"[,\s]+", line.strip())
            for line in storage.read_bytes(uri).decode().splitlines()
            if line.strip()
        ]
    except FileNotFoundError:
        raise UserError(f"--labels {uri}: no such file") from None
    if all(len(words) == 1 for words in lines):
        return _to_labels(uri, [words[0] for words in lines], images, classes)
    by_name = {words[0].rpartition("/")[2].partition(".")[0]: words[1] for words in lines if len(words) > 1}
    keys = [name.rpartition("/")[2].partition(".")[0] for name in images]
    if missing := [key for key in keys if key not in by_name]:
        raise UserError(
            f"--labels {uri}: has no line for {missing[0]} and {len(missing) - 1} others; a line is: name synset"
        )
    return _to_labels(uri, [by_name[key] for key in keys], images, classes)


def _to_labels(where: str, synsets: list[str], images: tuple[str, ...], classes: list[str]) -> list[int]:
    if len(synsets) != len(images):
        raise UserError(f"{where}: has {len(synsets)} labels, but {VAL_TAR} holds {len(images)} images")
    index = {name: label for label, name in enumerate(classes)}
    if strange := sorted(set(synsets) - set(index)):
        raise UserError(
            f"{where}: {strange[0]!r} is no class of {TRAIN_TAR}, whose classes are {classes[0]} to {classes[-1]}"
        )
    return [index[synset] for synset in synsets]


def webdataset(uris: list[str], folder: str) -> Source:
    """Tars whose samples are KEY.jpg and KEY.cls, the label as a number. A tar's split is in its name or its folder's.

    Class names come from classnames.txt (or classes.txt) in the folder, else they are the numbers.
    """
    by_split: dict[str, list[str]] = {}
    for uri in uris:
        by_split.setdefault(_split_word(uri[len(folder) :]), []).append(uri)
    test, others = find_split(by_split)
    chosen = {"train": by_split.get("train", [])} | ({"test": by_split[test]} if test else {})
    if not chosen["train"] and not test:
        chosen = {"train": uris}
    elif not chosen["train"]:
        raise UserError(f"{folder}: has tars named {test}, but none named train, such as train-000000.tar")
    splits = {split: _webdataset_split(files) for split, files in chosen.items()}
    most = max(int(split.images["label"].to_numpy().max()) for split in splits.values()) + 1
    names = set(storage.list_names(folder))
    classes = next(
        (read_class_names(storage.join(folder, name), most) for name in CLASS_FILES if name in names), None
    )
    if "test" not in splits:
        splits = split_by_class(splits["train"].images, splits["train"].reader)
    notes = [f"the tars named {other} are not used: {test} is the test split" for other in others]
    return Source("webdataset", classes or [str(label) for label in range(most)], splits, notes)


def _split_word(path: str) -> str:
    """train, or one of the words for test images, where a path holds it as a word; else nothing."""
    words = re.split(r"[^a-z]+", path.lower())
    return next((word for word in words if word in ("train", "test", "val", "valid", "validation")), "")


def _webdataset_split(uris: list[str]) -> Split:
    parts = []
    for index, uri in enumerate(uris):
        images, labels = {}, {}
        for name, offset, size in members(uri):
            folder, _, base = name.rpartition("/")
            key, _, extension = base.partition(".")
            key = f"{folder}/{key}" if folder else key
            if extension.lower() in IMAGES:
                images[key] = (name, offset, size)
            elif extension.lower() == "cls":
                labels[key] = (offset, size)
        if lone := sorted(images.keys() - labels.keys()):
            raise UserError(f"{uri}: {images[lone[0]][0]} has no label; a sample is KEY.jpg and KEY.cls")
        if not images:
            raise UserError(f"{uri}: holds no samples; a sample is KEY.jpg and KEY.cls")
        reader = Ranges((uri,))
        offsets, sizes = zip(*(labels[key] for key in images), strict=True)
        texts = reader.read(listing(list(images), 0, 0, offsets, sizes))
        numbers = []
        for key, text in zip(images, texts, strict=True):
            if not (isinstance(text, bytes) and text.strip().isdigit()):
                raise UserError(f"{uri}: {key}.cls: is {text!r}; must be the number of the class, from 0")
            numbers.append(int(text))
        names, offsets, sizes = zip(*images.values(), strict=True)
        parts.append(listing(list(names), numbers, index, offsets, sizes))
    return Split(pa.concat_tables(parts).combine_chunks(), Ranges(tuple(uris)))


def read_class_names(uri: str, least: int) -> list[str]:
    """A class name a line."""
    names = [line.strip() for line in storage.read_bytes(uri).decode().splitlines() if line.strip()]
    if len(names) < least:
        raise UserError(f"{uri}: has {len(names)} class names, but there are labels up to {least - 1}")
    return names


def members(uri: str, start: int = 0, size: int | None = None) -> Iterator[tuple[str, int, int]]:
    """(name, offset in the file, size) of each regular file of a tar; with `start` and `size`, of a tar within a file.

    Raises:
        UserError: it is compressed, no tar, or ends too early.
    """
    filesystem, path = storage.open_uri(uri)
    with filesystem.open_input_file(path) as file:
        window = io.BufferedReader(
            Window(file, start, size), LOCAL_BUFFER if storage.is_local(uri) else REMOTE_BUFFER
        )
        try:
            with tarfile.open(fileobj=window, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    if member.offset_data + member.size > window.raw.size:
                        raise tarfile.ReadError(f"it ends within {member.name}")
                    if member.isreg():
                        yield member.name, start + member.offset_data, member.size
                    tar.members.clear()  # or it would keep them all
        except tarfile.TarError as error:
            raise UserError(
                f"{uri}: cannot be read as an uncompressed tar ({error}); unpack a .tar.gz to .tar first"
            ) from None


class Window(io.RawIOBase):
    """A stretch of a random-access file as a file of its own."""

    def __init__(self, file: pa.NativeFile, start: int = 0, size: int | None = None):
        self.file, self.start, self.size, self.place = (
            file,
            start,
            file.size() - start if size is None else size,
            0,
        )

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer) -> int:
        content = self.file.read_at(max(0, min(len(buffer), self.size - self.place)), self.start + self.place)
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)
