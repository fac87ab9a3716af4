"""Sources that are folders of images: a folder for each class, in the forms that people have."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from deit_ray import storage
from deit_ray.data.listing import (
    EMPTY,
    TEST_FOLDERS,
    TEST_FRACTION,
    Files,
    Source,
    Split,
    Unused,
    decoded,
    listing,
    printable,
    split_by_class,
    split_of_folder,
)
from deit_ray.data.walk import Folder, scan, suffix_of
from deit_ray.errors import UserError
from deit_ray.terminal.format import counted

PACKED = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".zst", ".rar", ".7z")
TABLES = (".parquet", ".npz", ".npy")
LAYOUT = "a folder for each class, or train/ and test/ (or val/) with a folder for each class"
HOLDERS = {"images", "image", "imgs", "img", "unknown", "unlabelled", "unlabeled", "all", "data"}
NAMED = 5  # names in a message
KEPT = (
    f"test: {TEST_FRACTION:.0%} of each class are kept for testing, since no labelled test images were found"
)


def class_folders(uri: str) -> Source:
    """A folder for each class, in `uri` itself or in train/ and test/ (or val/) below it. Classes are sorted.

    Raises:
        UserError: the folders have no such form, with the reason.
    """
    unused = Unused()
    root = scan(uri, unused)
    found = [folder for folder in root.folders if folder.all_images()]
    train = [f for f in found if split_of_folder(f.name) == "train" and _class_folders(f)]
    if len(train) > 1:
        raise UserError(f"{uri}: {_names(train)} all mean training; keep one of them")
    for folder in root.folders:
        if folder not in found:
            _note_empty(folder, unused)
    for name, _ in root.others:
        unused.add(name, "beside the folders of images")
    if train:
        source = _with_splits(uri, root, found, train[0], unused)
    else:
        source = _without_splits(uri, root, found, unused)
    for name, _ in root.images:
        unused.add(name, "images beside the folders of images")
    source.notes.extend(unused.notes())
    return source


def _note_empty(folder: Folder, unused: Unused) -> None:
    files = len(folder.all_others())
    unused.add(f"{folder.path}/", "in folders without images" if files else EMPTY, files or None)


def _class_folders(folder: Folder) -> list[Folder]:
    """The folders of a folder that hold images."""
    return [inner for inner in folder.folders if inner.all_images()]


def _names(folders: list[Folder]) -> str:
    named = ", ".join(printable(folder.name) for folder in folders[:NAMED])
    return named + (f" and {len(folders) - NAMED} more" if len(folders) > NAMED else "")


# without folders for splits


def _without_splits(uri: str, root: Folder, found: list[Folder], unused: Unused) -> Source:
    _check_plain(uri, root, found)
    classes = _Classes(uri, root, unused)
    splits = split_by_class(classes.table(classes.names), classes.reader())
    notes, recognised = classes.notes, [f"all images: {classes.described()}", KEPT]
    for folder in found:
        if split_of_folder(folder.name):
            notes.append(f"the folder {printable(folder.name)} is a class, since it holds images")
    shared = [{inner.name for inner in _class_folders(folder)} for folder in found if not folder.images]
    if len(shared) == len(found) and len(names := set.intersection(*shared)) > 1:
        notes.append(
            f"each class holds the folders {', '.join(sorted(map(printable, names))[:NAMED])}; all their "
            "images belong to the class, the outer folder"
        )
    return Source("folders", classes.names, splits, notes, recognised)


def _check_plain(uri: str, root: Folder, found: list[Folder]) -> None:
    """Refuses what is not a folder for each class."""
    words = {folder.name: split_of_folder(folder.name) for folder in found}
    splits = [folder for folder in found if words[folder.name]]
    plain = [folder for folder in found if not words[folder.name]]
    if splits and not plain:
        flat = [folder for folder in splits if words[folder.name] == "train"]
        if flat:
            reason = f"{_names(flat)} holds images, but no folder for each class"
        else:
            reason = f"{_names(splits)} looks like a split for testing, and there is no folder train"
        raise UserError(f"{uri}: {reason}; wanted is {LAYOUT}")
    if splits and any(words[folder.name] != "train" or folder.folders for folder in splits):
        raise UserError(
            f"{uri}: {_names(splits)} looks like a split, and {_names(plain)} like a class; move the classes "
            "into a folder train, or the split elsewhere"
        )
    if not found:
        _refuse_without_images(uri, root)
    if len(found) == 1 and _class_folders(found[0]):
        deeper = found[0]
        while not deeper.images and len(_class_folders(deeper)) == 1 and _class_folders(deeper)[0].folders:
            deeper = _class_folders(deeper)[0]
        raise UserError(
            f"{uri}: holds only the folder {printable(found[0].name)}; what is wanted is "
            f"deeper: name {printable(storage.join(uri, deeper.path))}"
        )
    for folder in found:
        inner = {split_of_folder(inside.name) for inside in _class_folders(folder)}
        if "train" in inner and len(inner - {""}) > 1:
            raise UserError(
                f"{uri}: {printable(folder.name)} holds {_names(_class_folders(folder))}: the splits are "
                f"inside the classes; wanted is {LAYOUT}"
            )
    _check_two(uri, root, found)


def _refuse_without_images(uri: str, root: Folder) -> None:
    """Says why no folder holds images.

    Raises:
        UserError: always.
    """
    others = [path for path, _ in root.all_others()]
    if packed := [path for path in others if suffix_of(path) in PACKED]:
        raise UserError(f"{uri}: holds no images, but {printable(packed[0])}: unpack it first")
    if tables := [path for path in others if suffix_of(path) in TABLES]:
        raise UserError(
            f"{uri}: holds no images, but {printable(tables[0])}: name the folder that it is in, or its "
            "form with --format"
        )
    if others and not root.images:
        kinds = ", ".join(sorted({suffix_of(path) or "without a suffix" for path in others})[:NAMED])
        raise UserError(
            f"{uri}: holds {counted(len(others), 'file')}, and none is an image that Pillow reads ({kinds}); "
            f"wanted is {LAYOUT}"
        )
    held = f"holds {counted(len(root.images), 'image')}, but no" if root.images else "is empty: there are no"
    raise UserError(f"{uri}: {held} class folders; wanted is {LAYOUT}{_lists_there(uri, others)}")


def _lists_there(uri: str, others: list[str]) -> str:
    """Says that a list of labels is not read, with the columns that it has; empty where there is none."""
    lists = [path for path in others if suffix_of(path) in (".csv", ".tsv")]
    if not lists:
        return ""
    first = storage.read_bytes(storage.join(uri, lists[0])).partition(b"\n")[0]
    columns = ", ".join(map(printable, re.split(r"[,;\t]", first.decode("utf-8-sig", "replace").strip())))
    return (
        f". Labels are the names of folders: {printable(lists[0])} (columns: {columns}) is not read; move "
        "each image into a folder with the name of its class"
    )


def _check_two(uri: str, folder: Folder, found: list[Folder]) -> None:
    if len(found) >= 2:
        return
    empty = [inner for inner in folder.folders if not inner.all_images()]
    reason = f"; {_names(empty)}: holds no images" if empty else ""
    one = f"1 class folder ({_names(found)})" if found else "no class folders"
    raise UserError(f"{uri}: holds {one}; at least 2 are needed, each with its images{reason}")


# with folders for splits


def _with_splits(uri: str, root: Folder, found: list[Folder], train: Folder, unused: Unused) -> Source:
    train_uri = storage.join(uri, decoded(train.path))
    inner = _class_folders(train)
    if len(inner) == 1 and len(_class_folders(inner[0])) > 1:
        raise UserError(
            f"{train_uri}: holds only the folder {printable(inner[0].name)}; its folders are the classes: "
            "move them one folder up"
        )
    _check_two(train_uri, train, inner)
    classes = _Classes(uri, train, unused)
    notes, recognised = classes.notes, [f"train: {printable(train.name)}/: {classes.described()}"]
    order = {word: number for number, word in enumerate(TEST_FOLDERS)}
    candidates = [f for f in found if split_of_folder(f.name) in order]
    candidates.sort(key=lambda folder: (order[split_of_folder(folder.name)], folder.name))
    test = None
    for folder in candidates:
        if test:
            reason = f"{printable(test.root.name)} is the test split"
        elif labelled := _labelled(uri, folder, classes.names, unused):
            test = labelled
            continue
        else:
            reason = "its images have no labels (no folder for each class)"
        notes.append(_unused_folder(folder, reason))
    for folder in found:
        if folder not in (train, *candidates):
            notes.append(_unused_folder(folder, f"it is beside {printable(train.name)}"))
    if test:
        notes += test.notes
        recognised.append(f"test: {printable(test.root.name)}/: {test.described()}")
        splits = {
            "train": Split(classes.table(classes.names), classes.reader()),
            "test": Split(test.table(classes.names), test.reader()),
        }
    else:
        recognised.append(KEPT)
        splits = split_by_class(classes.table(classes.names), classes.reader())
    return Source("folders", classes.names, splits, notes, recognised)


def _unused_folder(folder: Folder, reason: str) -> str:
    images = counted(len(folder.all_images()), "image")
    return f"the folder {printable(folder.name)} ({images}) is not used: {reason}"


def _labelled(uri: str, folder: Folder, names: list[str], unused: Unused) -> "_Classes | None":
    """A test split's classes; None if its images have no labels.

    A single folder of a name such as unknown only holds the images.
    """
    inner = _class_folders(folder)
    if not inner or (len(inner) == 1 and _is_holder(inner[0].name) and _spelling(inner[0]) not in names):
        annotations = [name for name, _ in folder.others if "annotation" in name.lower()]
        if not annotations:
            return None
        found = _Classes(uri, folder, unused, by_annotation=annotations[0])
    else:
        found = _Classes(uri, folder, unused)
    strange = [name for name in found.names if name not in names]
    if strange:
        near = [name for name in names if name.casefold().strip() == strange[0].casefold().strip()]
        hint = f"; did you mean {printable(near[0])}?" if near else ""
        raise UserError(
            f"{storage.join(uri, decoded(folder.path))}: has the class '{printable(strange[0])}', which the "
            f"training images do not have{hint}"
        )
    return found


def _is_holder(name: str) -> bool:
    return name.lower() in HOLDERS or bool(split_of_folder(name))


def _spelling(folder: Folder) -> str:
    """A class's name: of the ways to spell an é in Unicode, always the same one."""
    return unicodedata.normalize("NFC", decoded(folder.name))


@dataclass(frozen=True)
class _Image:
    """An image of a class: its path below the split's folder, with surrogates for bytes that are no UTF-8."""

    path: str
    size: int


class _Classes:
    """The classes and images of one split's folder.

    Args:
        uri: the source.
        root: the split's folder.
        unused: gets the files that are no images, and the images beside the class folders.
        by_annotation: name of a file with lines `file name, class`; the folders are then no classes.

    Attributes:
        names: the classes, sorted.
        notes: what a person should know about them.
    """

    def __init__(self, uri: str, root: Folder, unused: Unused, by_annotation: str | None = None):
        self.uri, self.root, self.notes = uri, root, []
        self.images: dict[str, list[_Image]] = {}
        if by_annotation:
            self._read_annotation(by_annotation)
        else:
            self._read_folders(unused)
        self.names = sorted(self.images)
        self._note_spellings()
        if root.path:  # those beside the folders of splits are counted by the caller
            for name, _ in root.others:
                if name != by_annotation:
                    unused.add(f"{root.path}/{name}", "beside the class folders")
            for name, _ in root.images if not by_annotation else ():
                unused.add(f"{root.path}/{name}", "images beside the class folders")

    def _read_folders(self, unused: Unused) -> None:
        for folder in self.root.folders:
            folder.note_others(unused)
            found = folder.all_images()
            if not found:
                if self.root.path:
                    _note_empty(folder, unused)
                continue
            name = _spelling(folder)
            if name in self.images:
                self.notes.append(f"two folders are the class {printable(name)}: they spell it in two ways")
            inside = [_Image(self._inside(path), size) for path, size in found]
            self.images[name] = sorted([*self.images.get(name, ()), *inside], key=lambda image: image.path)

    def _inside(self, path: str) -> str:
        return path[len(self.root.path) + 1 :] if self.root.path else path

    def _read_annotation(self, name: str) -> None:
        where = storage.join(self.uri, self.root.path, name)
        lines = storage.read_bytes(where).decode(errors="replace").splitlines()
        rows = [re.split(r"[\t,; ]+", line.strip()) for line in lines if line.strip()]
        classes = {row[0].rpartition("/")[2]: row[1] for row in rows if len(row) > 1}
        for path, size in self.root.all_images():
            if path.rpartition("/")[2] not in classes:
                raise UserError(f"{where}: has no line for {printable(path)}; a line is: file name, class")
            found = self.images.setdefault(classes[path.rpartition("/")[2]], [])
            found.append(_Image(self._inside(path), size))
        self.notes.append(f"the labels of {printable(self.root.name)} are those of {printable(name)}")

    def _note_spellings(self) -> None:
        alike = Counter(name.casefold().strip() for name in self.names)
        for spelling, count in alike.items():
            if count > 1:
                names = [printable(name) for name in self.names if name.casefold().strip() == spelling]
                self.notes.append(f"{' and '.join(names)} are different classes: are they the same?")

    def table(self, names: list[str]) -> pa.Table:
        """The listing, with labels by the places of the classes in `names`."""
        parts = []
        places = {path: number for number, path in enumerate(self._odd(), 1)}
        for label, name in enumerate(names):
            if found := self.images.get(name):
                paths = [image.path for image in found]
                offsets = np.array([places.get(path, 0) for path in paths], np.int64)
                sizes = np.array([image.size for image in found], np.int64)
                parts.append(listing([decoded(path) for path in paths], label, 0, offsets, sizes))
        return pa.concat_tables(parts).combine_chunks()

    def reader(self) -> Files:
        folder = storage.join(self.uri, self.root.path) if self.root.path else self.uri
        odd = tuple(path.encode(errors="surrogateescape") for path in self._odd())
        return Files((folder,), odd)

    def _odd(self) -> list[str]:
        """The paths that are no UTF-8."""
        paths = [image.path for name in self.names for image in self.images[name]]
        return [path for path in paths if decoded(path) != path]

    def described(self) -> str:
        """Counts images, classes and suffixes."""
        images = [image for found in self.images.values() for image in found]
        suffixes = Counter(suffix_of(image.path) or "without a suffix" for image in images)
        listed = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
        return f"{counted(len(images), 'image')} of {counted(len(self.names), 'class', 'classes')} ({listed})"
