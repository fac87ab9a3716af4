"""Writes small sources of images, as people have them: folders, tars, and files that are no images."""

import gzip
import io
import os
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (12, 14)  # height, width


@cache
def encoded(seed: int, kind: str = "JPEG") -> bytes:
    """An image file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_classes(folder: Path, counts: dict[str, int], first: int = 0, suffix: str = ".png") -> None:
    """Writes a folder of images for each class; no two images are equal."""
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            write(folder / name / f"{i}{suffix}", encoded(first + 100 * label + i, "PNG"))


def samples(first: int, count: int, label: str = "{}") -> list[tuple[str, bytes]]:
    """The members of WebDataset samples of two classes."""
    members = []
    for i in range(first, first + count):
        members += [(f"s{i:03d}.jpg", encoded(i)), (f"s{i:03d}.cls", label.format(i % 2).encode())]
    return members


def tar_of(members: Iterable, format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of (name, content), or of (name, TarInfo's attributes) for links, folders and devices."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, dict):
                for key, value in content.items():
                    setattr(info, key, value)
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def sparse_tar(folder: Path) -> bytes:
    """A tar made by GNU tar of a sample whose image is a file with holes."""
    write(folder / "s000.cls", b"0")
    with open(folder / "s000.jpg", "wb") as file:
        file.write(encoded(0))
        file.truncate(1 << 20)
    command = ["tar", "-C", folder, "--sparse", "--format=gnu", "-cf", "-", "s000.cls", "s000.jpg"]
    return subprocess.run(command, check=True, capture_output=True).stdout


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content)


def zipped(members: Iterable[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


def snapshot(folder: Path) -> dict[bytes, bytes | str]:
    """Every file and link below a folder with its content or target."""
    found = {}
    for path, folders, files in os.walk(os.fsencode(folder)):
        for name in [*folders, *files]:
            full = os.path.join(path, name)
            if os.path.islink(full):
                found[full] = os.readlink(full)
            elif os.path.isfile(full):
                found[full] = Path(os.fsdecode(full)).read_bytes()
            else:
                found[full] = b"folder"
    return found
