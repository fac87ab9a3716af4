"""One task of the stream: reads row groups, decodes each image once, cuts its views, and packs blocks.

A block holds the samples of one rank for a few steps. It is an Arrow table of one row, so Ray Data never
splits it.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from deit_ray.augment import kernel_cv2
from deit_ray.augment.policy import Photometric
from deit_ray.data import crop
from deit_ray.data.memory import Memory
from deit_ray.data.shards import read_row_groups
from deit_ray.data.worklist import MASKED, Task

# Shards read at once. Reading from an object store takes many round trips, and the row groups of a pool lie
# in about 70 shards.
READERS = 16
HEADER = "header"  # the column of a block that describes its other columns


@dataclass(frozen=True)
class Samples:
    """Samples of one rank, in the order of training.

    Attributes:
        arrays: by name, all with the same first dimension. One more array per sample is one more entry.
            Every mapping holds:
            images: uint8 [samples, size, size, 3].
            labels, ids, views: int64 [samples].
            valid: bool [samples]; False where the row is padding or its image could not be decoded.
            Where the teacher sees crops and the stream changes the images, it also holds:
            crops: uint8 [samples, size, size, 3], the images before the photometric work.
        split: train, val or test.
        epoch: the epoch of the crops; an evaluation has the epoch that it follows.
        first_step: the step of the first sample's batch.
    """

    arrays: dict[str, np.ndarray]
    split: str
    epoch: int
    first_step: int

    @property
    def images(self) -> np.ndarray:
        return self.arrays["images"]

    @property
    def labels(self) -> np.ndarray:
        return self.arrays["labels"]

    @property
    def ids(self) -> np.ndarray:
        return self.arrays["ids"]

    @property
    def views(self) -> np.ndarray:
        return self.arrays["views"]

    @property
    def valid(self) -> np.ndarray:
        return self.arrays["valid"]

    def slice(self, start: int, stop: int, step: int) -> "Samples":
        """The samples `start` to `stop` - 1; their first batch is the batch of `step`. Nothing is copied."""
        arrays = {name: array[start:stop] for name, array in self.arrays.items()}
        return Samples(arrays, self.split, self.epoch, step)


@dataclass(frozen=True)
class Recipe:
    """What the stream does to every sample.

    Attributes:
        geometry: how images are cropped.
        photometric: the work on colours and shapes; None where the device does it.
        keep_crops: whether the stream also delivers the crops before its photometric work.
    """

    geometry: crop.Geometry
    photometric: Photometric | None
    keep_crops: bool = False

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample in a block."""
        pictures = 2 if self.keep_crops and self.photometric else 1
        return pictures * 3 * self.geometry.size**2


def make_samples(
    task: Task, recipe: Recipe, batch_size: int, world_size: int, block_steps: int = 1
) -> Iterator[Samples]:
    """Yields a task's samples. Every `block_steps` steps give one block for each rank, in the order of ranks.

    Raises:
        UnavailableError: a shard is missing or damaged.
    """
    maker = _BlockMaker(task, recipe)
    rows, views = task.samples()
    for first in range(0, task.steps, block_steps):
        steps = range(first, min(first + block_steps, task.steps))
        for rank in range(world_size):
            places = _places(steps, rank, batch_size, batch_size // world_size)
            # no name here holds the block, so its memory is free as soon as the consumer drops the block
            yield maker.make(rows[places], views[places], task.first_step + first)


def _places(steps: range, rank: int, batch_size: int, local: int) -> np.ndarray:
    """Places of a rank's samples among the task's samples, int64 [steps x local].

    A rank's samples of a batch are neighbours, so that the views of an image stay together.
    """
    begins = np.array(steps) * batch_size + rank * local
    return (begins[:, None] + np.arange(local)).ravel()


class _BlockMaker:
    """Makes a task's blocks. Views of an image follow each other, so each image is decoded once."""

    def __init__(self, task: Task, recipe: Recipe):
        self.task, self.recipe = task, recipe
        self.jpegs, self.labels, self.ids = _read(task)
        self.memory = Memory()
        self.buffer = np.empty(crop.BUFFER, np.uint8)
        self.row = None
        self.pixels = None  # the pixels of that row's image; None if it is masked or cannot be decoded

    def make(self, rows: np.ndarray, views: np.ndarray, step: int) -> Samples:
        """The samples of some rows of the task's images, int64 [samples]; MASKED rows are padding."""
        task, recipe = self.task, self.recipe
        size, ids, known = recipe.geometry.size, self.ids[rows], rows != MASKED
        images = self.memory.take((len(rows), size, size, 3))
        valid = self._cut(rows, ids, views, images)
        arrays = {
            "images": images,
            "labels": np.where(known, self.labels[rows], 0),
            "ids": np.where(known, ids, -1),
            "views": views,
            "valid": valid,
        }
        if task.split == "train" and recipe.photometric:
            if recipe.keep_crops:
                arrays["crops"] = self.memory.take(images.shape)
                arrays["crops"][:] = images
            kernel_cv2.augment_images(images, recipe.photometric.stages(task.epoch, ids, views, size, size))
        return Samples(arrays, task.split, task.epoch, step)

    def _cut(self, rows: np.ndarray, ids: np.ndarray, views: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Cuts views into `out`, uint8 [samples, size, size, 3]; returns which are valid, bool [samples]."""
        geometry, training = self.recipe.geometry, self.task.split == "train"
        draws = crop.draw(geometry, self.task.epoch, ids, views).tolist() if training else None
        valid = rows != MASKED
        for i, row in enumerate(rows):
            if row != self.row:
                self.row = row
                self.pixels = None if row == MASKED else crop.decode(self.jpegs[row], self.buffer)
            if self.pixels is None:
                valid[i] = False
                out[i] = 0
            elif training:
                crop.crop_view(self.pixels, geometry, draws[i], out[i])
            else:
                crop.crop_centre(self.pixels, geometry, out[i])
        return valid


def _read(task: Task) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """(bytes, label, id) of each image of the task's sources."""
    places: dict[str, list[int]] = {}  # by shard file: places of its row groups among the sources
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
    """The bytes of each row. Nothing is copied."""
    rows = []
    for chunk in column.chunks:
        offsets = np.frombuffer(chunk.buffers()[1], np.int32)
        ends = offsets[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        data = np.frombuffer(chunk.buffers()[2], np.uint8)
        rows += [data[begin:end] for begin, end in pairwise(ends)]
    return rows


def pack(samples: Samples) -> pa.Table:
    """The samples as a table of one row. Arrays are not copied: the table keeps them alive."""
    header = {
        "split": samples.split,
        "epoch": samples.epoch,
        "first_step": samples.first_step,
        "arrays": {name: (array.dtype.str, array.shape) for name, array in samples.arrays.items()},
    }
    columns = {name: _binary(array) for name, array in samples.arrays.items()}
    return pa.table({HEADER: pa.array([json.dumps(header)]), **columns})


def unpack(block: pa.Table) -> Samples:
    """The inverse of `pack`. Arrays are read-only views of the block."""
    header = json.loads(block[HEADER][0].as_py())
    arrays = {
        name: np.frombuffer(_bytes(block[name]), dtype).reshape(shape)
        for name, (dtype, shape) in header["arrays"].items()
    }
    return Samples(arrays, header["split"], header["epoch"], header["first_step"])


def _bytes(column: pa.ChunkedArray) -> pa.Buffer:
    """The bytes of a column's only row. Arrow itself would copy them."""
    (chunk,) = column.chunks
    begin, end = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + 2].tolist()
    return chunk.buffers()[2].slice(begin, end - begin)


def _binary(array: np.ndarray) -> pa.Array:
    """A column whose only row is the array's bytes."""
    data = pa.py_buffer(np.ascontiguousarray(array))
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data])
