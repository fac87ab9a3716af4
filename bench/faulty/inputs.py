"""Small inputs for bench/faults.py, all generated: images and their true pixels, in each form of a source."""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from bench.faulty.expect import Sample


def scene(number: int, height: int = 44, width: int = 52) -> np.ndarray:
    """A smooth image, uint8 [height, width, 3]; each number has its own colours and waves."""
    random = np.random.default_rng(1000 + number)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j][:, :, :, None]
    low, high = random.uniform(20, 110, 3), random.uniform(140, 235, 3)
    waves = np.sin(random.uniform(2, 7, 3) * x + random.uniform(2, 7, 3) * y + random.uniform(0, 6, 3))
    return (low + (high - low) * (waves + 1) / 2).round().astype(np.uint8)


def packed(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    """An image file of pixels."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def seen_by_pil(content: bytes | Path) -> np.ndarray:
    """The pixels that an image must have."""
    file = content if isinstance(content, Path) else io.BytesIO(content)
    return np.asarray(Image.open(file).convert("RGB"))


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def class_folders(
    folder: Path,
    names: Sequence[str] = ("apple", "pear"),
    each: int = 10,
    first: int = 0,
    suffix: str = "png",
) -> list[Sample]:
    """Writes a folder for each class; returns the samples."""
    samples = []
    for place, name in enumerate(names):
        for i in range(each):
            content = packed(scene(first + place * 500 + i))
            write(folder / name / f"{i:02d}.{suffix}", content)
            samples.append(Sample(seen_by_pil(content), name))
    return samples


def one_image_folders(folder: Path, make, each: int = 8, suffix: str = "png") -> list[Sample]:
    """Class folders a and b whose files are `make(number)`; the truth is what PIL sees."""
    samples = []
    for place, name in enumerate("ab"):
        for i in range(each):
            content = make(place * each + i)
            write(folder / name / f"{i}.{suffix}", content)
            samples.append(Sample(seen_by_pil(content), name))
    return samples


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], kind: str = "w", **options) -> bytes:
    """Writes a tar; returns its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, kind, **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def tar_samples(first: int, count: int, classes: int = 2) -> tuple[list[tuple[str, bytes]], list[Sample]]:
    """Members KEY.jpg and KEY.cls of a WebDataset, and their samples; classes are numbers."""
    members, samples = [], []
    for i in range(first, first + count):
        content = packed(scene(i), "JPEG", quality=95)
        members += [(f"k{i:04d}.jpg", content), (f"k{i:04d}.cls", str(i % classes).encode())]
        samples.append(Sample(seen_by_pil(content), str(i % classes)))
    return members, samples


def image_cells(count: int, first: int = 0, kind: str = "PNG") -> list[bytes]:
    return [packed(scene(first + i), kind) for i in range(count)]


def write_table(path: Path, hub: dict | None = None, **columns) -> None:
    """Writes a Parquet file of columns; `hub` is the description of features that the hub writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if hub:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": hub}})})
    pq.write_table(table, path)


def truth_of(cells: Sequence[bytes | None], labels: Sequence) -> list[Sample]:
    """The samples of image files and labels; a label's class is its text."""
    return [
        Sample(seen_by_pil(cell), str(label))
        for cell, label in zip(cells, labels, strict=True)
        if cell is not None and label is not None
    ]


def stack(count: int, height: int = 36, width: int = 36, first: int = 0) -> np.ndarray:
    """Images, uint8 [count, height, width, 3]."""
    return np.stack([scene(first + i, height, width) for i in range(count)])


def write_arrays(
    path: Path, images: np.ndarray, labels: np.ndarray, test: int = 6, names: Sequence[str] = ("x", "y")
) -> None:
    """Writes a .npz with the images as training images, and the first `test` of them as test images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image, label = names
    arrays = {f"{image}_train": images, f"{label}_train": labels}
    if test:
        arrays |= {f"{image}_test": images[:test], f"{label}_test": labels[:test]}
    np.savez(path, **arrays)


def array_truth(pixels: np.ndarray, labels: Sequence, test: int = 6) -> dict[str, list[Sample]]:
    """The splits that `write_arrays` writes, from their uint8 pixels [n, height, width, 3]."""
    samples = [Sample(image, str(label)) for image, label in zip(pixels, labels, strict=True)]
    return {"train": samples, "test": samples[:test]} if test else {"all": samples}


def write_model(source: Path, target: Path, rename=lambda tensors: tensors, **description) -> Path:
    """Copies a model.safetensors with changed tensors, or with changed values in its description."""
    with safe_open(source, framework="np") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    described = json.loads(metadata["deit_ray"]) | description
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(rename(tensors), target, metadata={"format": "pt", "deit_ray": json.dumps(described)})
    return target
