"""What one task of the stream does: read row groups, decode each image once, cut its views, and pack blocks.

A block is an Arrow table of one row, so that Ray Data hands it on whole: the samples of one rank for a few steps.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from deit_ray.augment import kernel_cv2
from deit_ray.augment.policy import Photometric
from deit_ray.data import crop
from deit_ray.data.shards import read_row_groups
from deit_ray.data.worklist import MASKED, Task

READERS = (
    16  # shards read at once: on an object store each takes many round trips, and a pool has about 70 of them
)
HELD_BY_NOBODY = 3  # references: of the list, of the loop that looks, and of the call that counts


@dataclass(frozen=True)
class Samples:
    """Samples of one rank, in the order of training. All arrays have the same first dimension.

    Attributes:
        images: uint8 [samples, size, size, 3].
        labels, ids, views: int64 [samples].
        valid: bool [samples]; False where the row is padding or its image could not be decoded.
        split, epoch: which part of the run they belong to.
        first_step: of the first sample's batch.
        crops: the images before the photometric work, where the teacher is to see them and the stream does that work.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    views: np.ndarray
    valid: np.ndarray
    split: str
    epoch: int
    first_step: int
    crops: np.ndarray | None = None

    def slice(self, start: int, stop: int, step: int) -> "Samples":
        arrays = (a[start:stop] for a in (self.images, self.labels, self.ids, self.views, self.valid))
        return Samples(
            *arrays, self.split, self.epoch, step, None if self.crops is None else self.crops[start:stop]
        )


@dataclass(frozen=True)
class Recipe:
    """What the stream does to every sample: the geometry, and the photometric work where it is done in the stream."""

    geometry: crop.Geometry
    photometric: Photometric | None  # None where the device does it
    keep_crops: bool = False  # beside the images, where the stream changes these

    @property
    def sample_bytes(self) -> int:
        """Of one sample in a block."""
        return (2 if self.keep_crops and self.photometric else 1) * 3 * self.geometry.size**2


def make_samples(
    task: Task, recipe: Recipe, batch_size: int, world_size: int, block_steps: int = 1
) -> Iterator[Samples]:
    """The task's samples, block by block: for each stretch of `block_steps` steps, one block for each rank in turn."""
    jpegs, labels, ids = _read(task)
    local = batch_size // world_size
    task_rows, task_views = task.samples()
    decoded_row, decoded, buffer, memory = None, None, np.empty(crop.BUFFER, np.uint8), Memory()
    for first in range(0, task.steps, block_steps):
        stretch = range(first, min(first + block_steps, task.steps))
        # a rank's samples of a batch are neighbours, so that the views of an image stay together
        places = [
            np.concatenate(
                [
                    np.arange(s * batch_size + rank * local, s * batch_size + (rank + 1) * local)
                    for s in stretch
                ]
            )
            for rank in range(world_size)
        ]
        for place in places:
            rows, views = task_rows[place], task_views[place]
            images = memory.take((len(place), recipe.geometry.size, recipe.geometry.size, 3))
            known = rows != MASKED
            valid = known.copy()
            draws = (
                crop.draw(recipe.geometry, task.epoch, ids[rows], views).tolist()
                if task.split == "train"
                else None
            )
            for i, row in enumerate(rows):
                if row != decoded_row:
                    decoded_row, decoded = row, None if row == MASKED else crop.decode(jpegs[row], buffer)
                if decoded is None:
                    valid[i], images[i] = False, 0
                elif task.split == "train":
                    crop.crop_view(decoded, recipe.geometry, draws[i], images[i])
                else:
                    crop.crop_centre(decoded, recipe.geometry, images[i])
            crops = None
            if task.split == "train" and recipe.photometric:
                crops = images.copy() if recipe.keep_crops else None
                kernel_cv2.augment_images(
                    images, recipe.photometric.stages(task.epoch, ids[rows], views, *images.shape[1:3])
                )
            yield Samples(
                images,
                np.where(known, labels[rows], 0),
                np.where(known, ids[rows], -1),
                views,
                valid,
                task.split,
                task.epoch,
                task.first_step + first,
                crops,
            )


class Memory:
    """uint8 arrays that are given out again once nobody holds them. Fresh memory of this size is cleared by the system first,
    which takes a tenth of the time of a sample."""

    def __init__(self):
        self._arrays: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of whatever bytes."""
        for array in self._arrays:
            if (
                len(array) >= shape[0]
                and array.shape[1:] == shape[1:]
                and sys.getrefcount(array) == HELD_BY_NOBODY
            ):
                return array[: shape[0]]
        self._arrays.append(np.empty(shape, np.uint8))
        return self._arrays[-1][:]


def _read(task: Task) -> tuple[list, np.ndarray, np.ndarray]:
    """(the bytes, label and id of each image of the task's sources)."""
    places: dict[str, list[int]] = {}  # of each shard's row groups among the sources
    for place, (file, *_) in enumerate(task.sources):
        places.setdefault(file, []).append(place)
    tables: dict[int, pa.Table] = {}
    with ThreadPoolExecutor(READERS) as pool:
        read = pool.map(
            lambda file: read_row_groups(file, [task.sources[place][1] for place in places[file]]), places
        )
        for file, found in zip(places, read, strict=True):
            tables |= dict(zip(places[file], found, strict=True))
    jpegs, labels, ids = [], [], []
    for place, (_, _, start, rows, first_id) in enumerate(task.sources):
        table = tables[place].slice(start, rows)
        jpegs += _rows(table["image"])
        labels.append(table["label"].to_numpy())
        ids.append(np.arange(first_id, first_id + rows))
    return jpegs, np.concatenate(labels).astype(np.int64), np.concatenate(ids)


def _rows(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The bytes of each row, not copied."""
    rows = []
    for chunk in column.chunks:
        ends = np.frombuffer(chunk.buffers()[1], np.int32)[
            chunk.offset : chunk.offset + len(chunk) + 1
        ].tolist()
        data = np.frombuffer(chunk.buffers()[2], np.uint8)
        rows += [data[begin:end] for begin, end in pairwise(ends)]
    return rows


def pack(samples: Samples) -> pa.Table:
    """The samples as a table of one row; arrays are not copied."""
    columns = {
        name: _binary(getattr(samples, name)) for name in ("images", "labels", "ids", "views", "valid")
    }
    for name in ("split", "epoch", "first_step"):
        columns[name] = pa.array([getattr(samples, name)])
    columns["size"] = pa.array([samples.images.shape[1]])
    if samples.crops is not None:
        columns["crops"] = _binary(samples.crops)
    return pa.table(columns)


def unpack(block: pa.Table) -> Samples:
    """The inverse of `pack`; arrays are read-only views of the block."""
    size = block["size"][0].as_py()
    types = {
        "images": np.uint8,
        "labels": np.int64,
        "ids": np.int64,
        "views": np.int64,
        "valid": np.bool_,
        "crops": np.uint8,
    }
    arrays = {
        name: np.frombuffer(_bytes(block[name]), dtype)
        for name, dtype in types.items()
        if name in block.column_names
    }
    arrays |= {
        name: arrays[name].reshape(-1, size, size, 3) for name in ("images", "crops") if name in arrays
    }
    return Samples(**arrays, **{name: block[name][0].as_py() for name in ("split", "epoch", "first_step")})


def _bytes(column: pa.ChunkedArray) -> pa.Buffer:
    """Those of a column's only row; asking Arrow for the row would copy them."""
    (chunk,) = column.chunks
    begin, end = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + 2].tolist()
    return chunk.buffers()[2].slice(begin, end - begin)


def _binary(array: np.ndarray) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(array))
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])
