"""Sources that are tars: ILSVRC2012's own archives, and WebDataset.

Only headers are read to list the images; nothing is unpacked.
"""

import io
import re
import tarfile
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from deit_ray import storage
from deit_ray.data.listing import Ranges, Source, Split, find_split, listing, split_by_class, split_word
from deit_ray.errors import UserError

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH, META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
IMAGES = ("jpg", "jpeg", "png", "webp", "ppm")  # WebDataset's extensions for an image
CLASS_FILES = ("classnames.txt", "classes.txt")
LOCAL_BUFFER = 4096  # bytes read at once from a disk: a few headers
REMOTE_BUFFER = 1 << 20  # bytes read at once from an object store, where every request waits long


def ilsvrc2012(folder: str, labels: str | None) -> Source:
    """ILSVRC2012: ILSVRC2012_img_train.tar, a tar of class tars, and ILSVRC2012_img_val.tar with its labels.

    Args:
        folder: the folder that holds the two tars.
        labels: a text file with the labels of the validation images: lines of `name synset`, or synsets in
            the order of the names. By default the labels come from the devkit beside the tars
            (ILSVRC2012_devkit_t12.tar.gz, or unpacked).

    Raises:
        UserError: a tar or a label is missing or broken.
    """
    names = storage.list_names(folder)
    if TRAIN_TAR not in names:
        raise UserError(f"{folder}: holds no {TRAIN_TAR}")
    uri = storage.join(folder, TRAIN_TAR)
    inside = members(uri)
    tars = sorted((name.removesuffix(".tar"), *place) for name, *place in inside if name.endswith(".tar"))
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
    synsets = _given_synsets(labels, inner) if labels else _devkit_synsets(folder, names)
    where = labels or f"the devkit's {GROUND_TRUTH}"
    test_labels = _to_labels(where, synsets, inner, classes)
    test = Split(listing(list(inner), test_labels, 0, offsets, sizes), Ranges((val_uri,)))
    return Source("ilsvrc2012", classes, {"train": Split(train, Ranges((uri,))), "test": test})


def _devkit_synsets(folder: str, names: list[str]) -> list[str]:
    """The synsets of the validation images, in the order of the images, from the devkit.

    Line i of the ground truth is the ILSVRC2012_ID of image i, and meta.mat maps the id to a synset. Ids and
    synsets are in different orders.
    """
    from scipy.io import loadmat

    if DEVKIT in names:
        where = storage.join(folder, DEVKIT)
        truth, meta = (storage.read_bytes(storage.join(where, file)) for file in (GROUND_TRUTH, META))
    elif f"{DEVKIT}.tar.gz" in names:
        packed = io.BytesIO(storage.read_bytes(storage.join(folder, f"{DEVKIT}.tar.gz")))
        with tarfile.open(fileobj=packed) as tar:
            truth, meta = (tar.extractfile(f"{DEVKIT}/{file}").read() for file in (GROUND_TRUTH, META))
    else:
        raise UserError(
            f"{folder}: the labels of {VAL_TAR} are missing: put {DEVKIT}.tar.gz beside it, "
            "or name a file with --labels FILE (lines of: name synset)"
        )
    synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
    synset_of = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
    return [synset_of.get(int(line), line) for line in truth.decode().split()]


def _given_synsets(uri: str, images: tuple[str, ...]) -> list[str]:
    """The synsets of the validation images, in the order of the images, from the file of --labels."""
    try:
        text = storage.read_bytes(uri).decode()
    except FileNotFoundError:
        raise UserError(f"--labels {uri}: no such file") from None
    lines = [re.split(r"[,\s]+", line.strip()) for line in text.splitlines() if line.strip()]
    if all(len(words) == 1 for words in lines):
        return [words[0] for words in lines]
    by_name = {words[0].rpartition("/")[2].partition(".")[0]: words[1] for words in lines if len(words) > 1}
    keys = [name.rpartition("/")[2].partition(".")[0] for name in images]
    if missing := [key for key in keys if key not in by_name]:
        raise UserError(
            f"--labels {uri}: has no line for {missing[0]} and {len(missing) - 1} others; "
            "a line is: name synset"
        )
    return [by_name[key] for key in keys]


def _to_labels(where: str, synsets: list[str], images: tuple[str, ...], classes: list[str]) -> list[int]:
    """The labels of synsets, one for each image. Errors name `where`, the file of the synsets."""
    if len(synsets) != len(images):
        raise UserError(f"{where}: has {len(synsets)} labels, but {VAL_TAR} holds {len(images)} images")
    index = {name: label for label, name in enumerate(classes)}
    if strange := sorted(set(synsets) - set(index)):
        raise UserError(
            f"{where}: {strange[0]!r} is no class of {TRAIN_TAR}, "
            f"whose classes are {classes[0]} to {classes[-1]}"
        )
    return [index[synset] for synset in synsets]


def webdataset(uris: list[str], folder: str) -> Source:
    """WebDataset: tars of samples KEY.jpg and KEY.cls, the label as a number.

    A word in a tar's name or folder names its split. Class names come from classnames.txt (or classes.txt) in
    the folder; without such a file, the labels are the class names.

    Raises:
        UserError: a tar or a sample is broken, or no tar belongs to the training split.
    """
    by_split: dict[str, list[str]] = {}
    for uri in uris:
        by_split.setdefault(split_word(uri[len(folder) :]), []).append(uri)
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
    """The class names of a file with one name on each line."""
    names = [line.strip() for line in storage.read_bytes(uri).decode().splitlines() if line.strip()]
    if len(names) < least:
        raise UserError(f"{uri}: has {len(names)} class names, but there are labels up to {least - 1}")
    return names


def members(uri: str, start: int = 0, size: int | None = None) -> Iterator[tuple[str, int, int]]:
    """Yields (name, offset in the file, size) of each regular file in a tar.

    Args:
        uri: the file's URI.
        start, size: place of the tar in that file; by default the whole file.

    Raises:
        UserError: the file is compressed, is not a tar, or ends too early.
    """
    filesystem, path = storage.open_uri(uri)
    buffer = LOCAL_BUFFER if storage.is_local(uri) else REMOTE_BUFFER
    with filesystem.open_input_file(path) as file:
        window = io.BufferedReader(Window(file, start, size), buffer)
        try:
            with tarfile.open(fileobj=window, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    if member.offset_data + member.size > window.raw.size:
                        raise tarfile.ReadError(f"it ends within {member.name}")
                    if member.isreg():
                        yield member.name, start + member.offset_data, member.size
                    tar.members.clear()  # tarfile would keep them all
        except tarfile.TarError as error:
            raise UserError(
                f"{uri}: cannot be read as an uncompressed tar ({error}); unpack a .tar.gz to .tar first"
            ) from None


class Window(io.RawIOBase):
    """A part of a random-access file, as a file."""

    def __init__(self, file: pa.NativeFile, start: int = 0, size: int | None = None):
        self.file, self.start, self.place = file, start, 0
        self.size = file.size() - start if size is None else size

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
