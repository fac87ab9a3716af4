"""Lists everything below a folder once: what is an image, what is another file, and what is left out and why.

Links are followed, but no folder is read twice. So a loop ends, and two links to a folder do not double it.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pyarrow import fs

from deit_ray import storage
from deit_ray.data.listing import Unused
from deit_ray.errors import UnavailableError

FORMATS = (
    *("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO"),
    *("PCX", "SGI", "QOI", "PSD"),
)  # of those that Pillow reads, the formats of single images; EPS, for one, is a program
SYSTEM_FOLDERS = {
    *("@eadir", "__macosx", "lost+found", "$recycle.bin", "#recycle", "@recycle", "#snapshot"),
    *("system volume information", "__pycache__"),
}
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
SUFFIX = re.compile(r"\.[a-z][a-z0-9]{0,9}$")
SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|BM.{4}\0\0\0\0|RIFF.{4}WEBP|II\*\0|MM\0\*|.{4}ftypavif", re.DOTALL
)
SYSTEM, HIDDEN = "made by other programs", "hidden"
NOWHERE = "links that lead nowhere"
AGAIN = "links to folders that are read already"


@dataclass
class Folder:
    """A folder below a source.

    Attributes:
        path: the path below the source; bytes that are not UTF-8 are surrogates, as in `os.fsdecode`.
        images, others: (name, size in bytes) of the files that have the suffix or content of an image, and of
            other files.
        folders: the folders in it.
    """

    path: str
    images: list[tuple[str, int]] = field(default_factory=list)
    others: list[tuple[str, int]] = field(default_factory=list)
    folders: list["Folder"] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def below(self) -> Iterator["Folder"]:
        """The folder itself and all folders below it."""
        yield self
        for folder in self.folders:
            yield from folder.below()

    def all_images(self) -> list[tuple[str, int]]:
        """(path below the source, size in bytes) of all images below, sorted."""
        return sorted((join(f.path, name), size) for f in self.below() for name, size in f.images)

    def all_others(self) -> list[tuple[str, int]]:
        """(path below the source, size in bytes) of all other files below, sorted."""
        return sorted((join(f.path, name), size) for f in self.below() for name, size in f.others)

    def all_files(self) -> list[str]:
        """The paths of all files below, sorted."""
        return sorted(path for path, _ in [*self.all_images(), *self.all_others()])

    def note_others(self, unused: Unused) -> None:
        """Counts all files below that are no images as not used."""
        for path, _ in self.all_others():
            suffix = suffix_of(path) or "without a suffix"
            unused.add(path, f"no image that Pillow reads: {suffix}")

    def add(self, name: str, size: int, is_image: bool) -> None:
        (self.images if is_image else self.others).append((name, size))


def join(folder: str, name: str) -> str:
    """The path of an entry of a folder below the source."""
    return f"{folder}/{name}" if folder else name


def suffix_of(name: str) -> str:
    """The suffix of a file name in lower case, such as .tar; empty where there is none."""
    found = SUFFIX.search(name.lower())
    return found[0] if found else ""


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of the images that Pillow reads here, such as .jpg."""
    from PIL import Image

    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in known if name in FORMATS and name in Image.OPEN)


def scan(uri: str, unused: Unused) -> Folder:
    """Reads a folder and all folders below it.

    Args:
        unused: gets what is left out: hidden files, leftovers of other programs, links that lead nowhere.

    Raises:
        UnavailableError: the folder cannot be read.
    """
    if storage.is_local(uri):
        return _LocalScan(storage.local_path(uri), unused).read_all()
    return _scan_remote(uri, unused)


def reason_to_skip(name: str, is_folder: bool) -> str | None:
    """Why a file or folder of this name is no part of a source, None if it can be one."""
    if name.startswith("._") or name.lower() in (SYSTEM_FOLDERS if is_folder else SYSTEM_FILES):
        return SYSTEM
    return HIDDEN if name.startswith(".") else None


class _LocalScan:
    """Reads a folder of this machine. Real folders come before links, so a link never hides a folder."""

    def __init__(self, root: str, unused: Unused):
        self.root, self.unused = root, unused
        # a link to a folder above the source leads back to the source
        self.seen = {_identity(folder) for folder in (Path(root), *Path(os.path.realpath(root)).parents)}
        self.links: list[tuple[Folder, str, str]] = []

    def read_all(self) -> Folder:
        try:
            os.listdir(self.root)
        except OSError as error:
            raise UnavailableError(f"{self.root}: cannot be read: {error.strerror}") from None
        found = self._read(self.root, "")
        while self.links:
            parent, path, inner = self.links.pop(0)
            if _identity(path) in self.seen:
                self.unused.add(inner, AGAIN)
                continue
            parent.folders.append(self._read(path, inner))
        for folder in found.below():
            folder.folders.sort(key=lambda inside: inside.path)
        return found

    def _read(self, path: str, place: str) -> Folder:
        folder = Folder(place)
        self.seen.add(_identity(path))
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            self.unused.add(place + "/", f"cannot be read: {error.strerror}")
            return folder
        for entry in entries:
            inner = join(place, entry.name)
            try:
                found = entry.stat()
            except OSError as error:
                if entry.is_symlink():
                    self.unused.add(inner, NOWHERE)
                else:
                    self.unused.add(inner, f"cannot be read: {error.strerror}")
                continue
            self._add(folder, entry, inner, found)
        return folder

    def _add(self, folder: Folder, entry: os.DirEntry, inner: str, found: os.stat_result) -> None:
        is_folder = stat.S_ISDIR(found.st_mode)
        if reason := reason_to_skip(entry.name, is_folder):
            if not is_folder or entry.is_symlink():
                self.unused.add(inner, reason)
            elif count := sum(len(names) for _, _, names in os.walk(entry.path)):
                self.unused.add(inner + "/", reason, count)
        elif is_folder and entry.is_symlink():
            self.links.append((folder, entry.path, inner))
        elif is_folder and (found.st_dev, found.st_ino) in self.seen:
            self.unused.add(inner, AGAIN)
        elif is_folder:
            folder.folders.append(self._read(entry.path, inner))
        elif stat.S_ISREG(found.st_mode):
            folder.add(entry.name, found.st_size, _is_image(entry.name, entry.path))
        else:
            self.unused.add(inner, "neither files nor folders")


def _identity(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _is_image(name: str, path: str) -> bool:
    """Whether a file is an image by its suffix; without any suffix, by its first bytes."""
    if suffix := suffix_of(name):
        return suffix in image_suffixes()
    try:
        with open(path, "rb") as file:
            return bool(SIGNATURES.match(file.read(16)))
    except OSError:
        return True  # whoever reads it reports why it cannot be read


def _scan_remote(uri: str, unused: Unused) -> Folder:
    filesystem, place = storage.open_uri(uri)
    root, place = Folder(""), place.rstrip("/")
    known = {"": root}
    try:
        found = filesystem.get_file_info(fs.FileSelector(place, recursive=True))
    except OSError as error:
        raise UnavailableError(f"{uri}: cannot be read: {error}") from None
    for info in sorted(found, key=lambda info: info.path):
        path = info.path[len(place) + 1 :]
        folders, _, name = path.rpartition("/")
        parts = folders.split("/") if folders else []
        reasons = [reason_to_skip(part, True) for part in parts] + [reason_to_skip(name, not info.is_file)]
        if not info.is_file:
            if not any(reasons):
                _folder_at(known, path)
            continue
        if reason := next((reason for reason in reasons if reason), None):
            unused.add(path, reason)
            continue
        suffix = suffix_of(name)
        is_image = suffix in image_suffixes() if suffix else _starts_as_image(filesystem, info.path)
        _folder_at(known, folders).add(name, info.size, is_image)
    return root


def _folder_at(known: dict[str, Folder], path: str) -> Folder:
    """The folder at a path below the source, made with the folders above it."""
    if path not in known:
        known[path] = Folder(path)
        _folder_at(known, path.rpartition("/")[0]).folders.append(known[path])
    return known[path]


def _starts_as_image(filesystem: fs.FileSystem, path: str) -> bool:
    with filesystem.open_input_file(path) as file:
        return bool(SIGNATURES.match(file.read(16)))
