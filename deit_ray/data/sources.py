"""Opens a source of images: recognises its format, and lists its splits, classes and images."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyarrow import fs

from deit_ray import storage
from deit_ray.data import tables, tars
from deit_ray.data.listing import Files, Source, Split, find_split, listing, split_by_class
from deit_ray.errors import UserError

FORMATS = ("ilsvrc2012", "folders", "parquet", "webdataset", "arrays", "digits")
BY_SUFFIX = {".tar": "webdataset", ".parquet": "parquet", ".npz": "arrays", ".npy": "arrays"}  # formats
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
DIGIT_SIZE = 16  # pixels
DIGITS = "digits"


def open_source(source: str, format: str | None = None, labels: str | None = None) -> Source:
    """Opens the source that a word, a file or a folder names.

    Args:
        source: `digits`, or the path or URI of a folder or file.
        format: one of FORMATS; by default it is recognised.
        labels: a file with the labels of ILSVRC2012's validation images, instead of the devkit's.

    Raises:
        UserError: the source is of no known format, or broken.
    """
    if format not in (None, *FORMATS):
        raise UserError(f"--format {format}: must be one of {', '.join(FORMATS)}")
    if source == DIGITS:
        return digits()
    uri = storage.absolute(source)
    format = format or recognise(uri)
    if labels and format != "ilsvrc2012":
        raise UserError(
            f"--labels {labels}: only ILSVRC2012's tars need labels from a file; "
            f"{source} is of the format {format}"
        )
    if format == "digits":
        raise UserError(f"--format digits: SOURCE must be the word digits, not {source}")
    if format == "folders":
        return class_folders(uri)
    if format == "ilsvrc2012":
        folder = uri.rpartition("/")[0] if uri.endswith(".tar") else uri
        return tars.ilsvrc2012(folder, labels and storage.absolute(labels))
    folder, files = _files(uri)
    if format == "webdataset":
        return tars.webdataset(_named(source, files, ".tar"), folder)
    if format == "parquet":
        return tables.parquet(_named(source, files, ".parquet"), folder)
    return tables.arrays(files, folder)


def recognise(uri: str) -> str:
    """Recognises the format of a folder or file by the names in it.

    Raises:
        UserError: there is no such folder or file, or a file is of no known format.
    """
    if _type(uri) == fs.FileType.NotFound:
        raise UserError(
            f"{uri}: no such folder or file; SOURCE is a folder of class folders, of tars, of Parquet or of "
            "arrays, or the word digits"
        )
    if uri.rpartition("/")[2] == tars.TRAIN_TAR:
        return "ilsvrc2012"
    names = [uri.rpartition("/")[2]] if _type(uri) == fs.FileType.File else storage.list_names(uri)
    if tars.TRAIN_TAR in names:
        return "ilsvrc2012"
    batches = [name for name in names if name not in ("train", "test") and tables.BATCH_FILE.fullmatch(name)]
    if batches or "meta" in names:
        return "arrays"
    suffixes = _suffixes(names)
    for suffix, format in BY_SUFFIX.items():
        if suffix in suffixes:
            return format
    if _type(uri) == fs.FileType.File:
        raise UserError(f"{uri}: a file of no known kind; known are .tar, .parquet, .npz and .npy")
    for name in ("data", "train"):  # a folder for each split, or the layout of the Hugging Face hub
        if name in names:
            inner = _suffixes(storage.list_names(storage.join(uri, name)))
            for suffix in (".tar", ".parquet"):
                if suffix in inner:
                    return BY_SUFFIX[suffix]
    return "folders"


def _suffixes(names: list[str]) -> set[str]:
    """The suffixes of names in lower case, such as .tar."""
    return {name[name.rfind(".") :].lower() for name in names if "." in name}


def _type(uri: str) -> fs.FileType:
    filesystem, path = storage.open_uri(uri)
    return filesystem.get_file_info(path).type


def _files(uri: str) -> tuple[str, list[str]]:
    """Returns (folder, sorted URIs of all files below it); for a file, its folder and that file alone."""
    if _type(uri) == fs.FileType.File:
        return uri.rpartition("/")[0], [uri]
    return uri, [storage.join(uri, path) for path, _ in _walk(uri)]


def _named(source: str, files: list[str], suffix: str) -> list[str]:
    """The files with a suffix."""
    found = [file for file in files if file.lower().endswith(suffix)]
    if not found:
        raise UserError(f"{source}: holds no {suffix} files")
    return found


def _walk(uri: str) -> list[tuple[str, int]]:
    """(path below the folder, size in bytes) of every file, sorted. Hidden files and folders are left out."""
    filesystem, folder = storage.open_uri(uri)
    found = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
    inside = [(info.path[len(folder.rstrip("/")) + 1 :], info.size) for info in found if info.is_file]
    hidden = [any(part.startswith(".") for part in path.split("/")) for path, _ in inside]
    return sorted(entry for entry, is_hidden in zip(inside, hidden, strict=True) if not is_hidden)


def digits() -> Source:
    """scikit-learn's load_digits: 1,797 scans of handwritten digits, 8x8 pixels, scaled to RGB 16x16."""
    from sklearn.datasets import load_digits

    labels = load_digits().target
    images = listing([f"digit-{i:04d}" for i in range(len(labels))], labels, 0, np.arange(len(labels)))
    return Source("digits", [str(digit) for digit in range(10)], split_by_class(images, Digits()))


@dataclass(frozen=True)
class Digits:
    """Reads scikit-learn's digits; `offset` is the number of the scan."""

    def read(self, images: pa.Table) -> Iterator[np.ndarray]:
        import cv2
        from sklearn.datasets import load_digits

        scans = load_digits().images
        for number in images["offset"].to_pylist():
            grey = np.clip(scans[number] * (255 / 16), 0, 255).astype(np.uint8)
            yield tables.as_rgb(cv2.resize(grey, (DIGIT_SIZE, DIGIT_SIZE), interpolation=cv2.INTER_CUBIC))


def class_folders(folder: str) -> Source:
    """A folder for each class, in `folder` itself or in train/ and test/ (or val/) below it.

    Classes are sorted.
    """
    if _type(folder) != fs.FileType.Directory:
        raise UserError(
            f"{folder}: no such folder; SOURCE is a folder with one folder of images per class, "
            "or the word digits"
        )
    names = {name.lower(): storage.join(folder, name) for name in _folders(folder)}
    test, others = find_split(names)
    if "train" not in names or not test:
        classes, images = _read_classes(folder)
        return Source("folders", classes, split_by_class(images, Files((folder,))))
    classes, images = _read_classes(names["train"])
    test_classes, test_images = _read_classes(names[test], least=1)
    if strange := sorted(set(test_classes) - set(classes)):
        raise UserError(f"{names[test]}: has the class {strange[0]!r}, which {names['train']} does not have")
    train_labels = np.array([classes.index(name) for name in test_classes], np.int32)
    renumbered = train_labels[test_images["label"].to_numpy()]
    test_images = test_images.set_column(1, "label", pa.array(renumbered))
    splits = {
        "train": Split(images, Files((names["train"],))),
        "test": Split(test_images, Files((names[test],))),
    }
    notes = [f"the folder {other} is not used: {test} is the test split" for other in others]
    return Source("folders", classes, splits, notes)


def _folders(uri: str) -> list[str]:
    """The names of the folders in a folder, sorted, without hidden ones."""
    filesystem, path = storage.open_uri(uri)
    found = filesystem.get_file_info(fs.FileSelector(path))
    names = [info.base_name for info in found if info.type == fs.FileType.Directory]
    return sorted(name for name in names if not name.startswith("."))


def _read_classes(folder: str, least: int = 2) -> tuple[list[str], pa.Table]:
    """Returns (classes, listing) of a folder that holds at least `least` class folders."""
    classes, parts = _folders(folder), []
    for label, name in enumerate(classes):
        files = _walk(storage.join(folder, name))
        found = [(f"{name}/{path}", size) for path, size in files if path.lower().endswith(SUFFIXES)]
        if not found and len(classes) >= least:
            raise UserError(f"{storage.join(folder, name)}: holds no images; known are {', '.join(SUFFIXES)}")
        names, sizes = zip(*found, strict=True) if found else ((), ())
        parts.append(listing(list(names), label, 0, 0, np.array(sizes, np.int64)))
    if len(classes) < least:
        raise UserError(
            f"{folder}: holds {len(classes)} class folders; at least {least} are needed, each with its images"
        )
    return classes, pa.concat_tables(parts).combine_chunks()
