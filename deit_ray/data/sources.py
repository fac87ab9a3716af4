"""Opens a source of images: recognises its format, and lists its splits, classes and images."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyarrow import fs

from deit_ray import storage
from deit_ray.data import arrays, tables, tars
from deit_ray.data.folders import PACKED, class_folders
from deit_ray.data.listing import Source, Unused, listing, split_by_class, split_of_folder
from deit_ray.data.walk import reason_to_skip, scan, suffix_of
from deit_ray.data.webdataset import webdataset
from deit_ray.errors import UserError

FORMATS = ("ilsvrc2012", "folders", "parquet", "webdataset", "arrays", "digits")
BY_SUFFIX = {".tar": "webdataset", ".parquet": "parquet", ".npz": "arrays", ".npy": "arrays"}  # formats
CLASS_FILES = ("classnames.txt", "classes.txt")
NAMED = "a folder of class folders, of tars, of Parquet or of arrays, or the word digits"
DIGIT_SIZE = 16  # pixels
DIGITS = "digits"


def open_source(
    source: str, format: str | None = None, labels: str | None = None, image: str | None = None
) -> Source:
    """Opens the source that a word, a file or a folder names.

    Args:
        source: `digits`, or the path or URI of a folder or file.
        format: one of FORMATS; by default it is recognised.
        labels: a file with the labels of ILSVRC2012's validation images, instead of the devkit's.
        image: which image of a WebDataset sample to use, see `webdataset.webdataset`.

    Raises:
        UserError: the source is of no known format, or broken.
    """
    if format not in (None, *FORMATS):
        raise UserError(f"--format {format}: must be one of {', '.join(FORMATS)}")
    if source == DIGITS:
        return digits()
    uri = storage.absolute(source)
    format = format or recognise(uri)
    _check_options(source, format, labels, image)
    if format == "folders":
        _check_folder(uri)
        return class_folders(uri)
    if format == "ilsvrc2012":
        folder = uri.rpartition("/")[0] if uri.endswith(".tar") else uri
        return tars.ilsvrc2012(folder, labels and storage.absolute(labels))
    unused = Unused()
    folder, files = _files(uri, unused)
    suffixes = (
        (".npz", ".npy") if format == "arrays" else (f".{'tar' if format == 'webdataset' else format}",)
    )
    chosen = [file for file in files if file.lower().endswith(suffixes)]
    if format == "arrays":
        names = ("meta", "batches.meta")
        batches = [file for file in files if arrays.BATCH_FILE.fullmatch(file.rpartition("/")[2])]
        chosen += [*batches, *(file for file in files if file.rpartition("/")[2] in names)]
        found = arrays.arrays(files, folder)
    elif not chosen:
        raise UserError(f"{source}: holds no {suffixes[0]} files")
    elif format == "webdataset":
        found = webdataset(chosen, folder, image)
        chosen += [storage.join(folder, name) for name in CLASS_FILES]
    else:
        found = tables.parquet(chosen, folder)
    for file in sorted({*files} - {*chosen}):
        unused.add(file[len(folder) + 1 :], f"no {' or '.join(suffixes)} file")
    found.notes.extend(unused.notes())
    return found


def _check_options(source: str, format: str, labels: str | None, image: str | None) -> None:
    if labels and format != "ilsvrc2012":
        raise UserError(
            f"--labels {labels}: only ILSVRC2012's tars need labels from a file; "
            f"{source} is of the format {format}"
        )
    if image and format != "webdataset":
        raise UserError(
            f"--image {image}: chooses among the images of a WebDataset sample; "
            f"{source} is of the format {format}"
        )
    if format == "digits":
        raise UserError(f"--format digits: SOURCE must be the word digits, not {source}")


def _check_folder(uri: str) -> None:
    if _type(uri) != fs.FileType.Directory:
        raise UserError(f"{uri}: no such folder; SOURCE is {NAMED}")


def recognise(uri: str) -> str:
    """Recognises the format of a folder or file by the names in it.

    Where folders are classes, an archive or array beside them decides nothing.

    Raises:
        UserError: there is no such folder or file, or a file is of no known format.
    """
    kind, name = _type(uri), uri.rpartition("/")[2]
    if kind == fs.FileType.NotFound:
        braces = "; braces are not expanded: name the folder that holds the tars" if "{" in uri else ""
        raise UserError(f"{uri}: no such folder or file; SOURCE is {NAMED}{braces}")
    if name == tars.TRAIN_TAR:
        return "ilsvrc2012"
    names = [name] if kind == fs.FileType.File else storage.list_names(uri)
    if tars.TRAIN_TAR in names:
        return "ilsvrc2012"
    format = "arrays" if any(map(_is_batch, names)) else _by_suffix(names)
    if kind == fs.FileType.File:
        if format is None:
            packed = suffix_of(name) in PACKED
            hint = "unpack it first, and name the folder" if packed else f"SOURCE is {NAMED}"
            raise UserError(f"{uri}: a file of no known kind; known are {', '.join(BY_SUFFIX)}; {hint}")
        return format
    folders = [found for found in _folders(uri) if not reason_to_skip(found, True)]
    if format and not _are_classes(uri, folders):
        return format
    return _format_below(uri, folders) or "folders"


def _format_below(uri: str, folders: list[str]) -> str | None:
    """The format of tars or tables in a folder for each split, or in the folders of the Hugging Face hub."""
    for folder in folders:
        if folder.lower() == "data" or split_of_folder(folder):
            inside = storage.join(uri, folder)
            found = _by_suffix(storage.list_names(inside))
            if found not in ("webdataset", "parquet"):
                found = _format_below(inside, _folders(inside)) if folder.lower() == "data" else None
            if found:
                return found
    return None


def _is_batch(name: str) -> bool:
    """Whether a file name is one of CIFAR's batches, or describes them."""
    return name == "meta" or (name not in ("train", "test") and bool(arrays.BATCH_FILE.fullmatch(name)))


def _by_suffix(names: list[str]) -> str | None:
    """The format of the files with these names."""
    suffixes = {name[name.rfind(".") :].lower() for name in names if "." in name}
    return next((format for suffix, format in BY_SUFFIX.items() if suffix in suffixes), None)


def _are_classes(uri: str, folders: list[str]) -> bool:
    """Whether several folders hold images, or a folder for training holds folders of images."""
    holding = 0
    for folder in folders:
        inner = storage.join(uri, folder)
        if split_of_folder(folder) == "train" and _are_classes(inner, _folders(inner)):
            return True
        holding += bool(scan(inner, Unused()).all_images())
        if holding > 1:
            return True
    return False


def _folders(uri: str) -> list[str]:
    """The names of the folders in a folder, sorted."""
    if storage.is_local(uri):
        return sorted(entry.name for entry in os.scandir(storage.local_path(uri)) if entry.is_dir())
    filesystem, path = storage.open_uri(uri)
    found = filesystem.get_file_info(fs.FileSelector(path))
    return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)


def _type(uri: str) -> fs.FileType:
    filesystem, path = storage.open_uri(uri)
    return filesystem.get_file_info(path).type


def _files(uri: str, unused: Unused) -> tuple[str, list[str]]:
    """Returns (folder, sorted URIs of all files below it); for a file, its folder and that file alone."""
    if _type(uri) == fs.FileType.File:
        return uri.rpartition("/")[0], [uri]
    return uri, [storage.join(uri, path) for path in scan(uri, unused).all_files()]


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
            yield arrays.as_rgb(
                cv2.resize(grey, (DIGIT_SIZE, DIGIT_SIZE), interpolation=cv2.INTER_CUBIC), "HW"
            )
