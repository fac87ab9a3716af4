"""What a source holds, listed before anything is decoded: names, labels, and where each image's bytes lie.

A listing is a table, so that a million images are some tens of megabytes; a reader, which travels to the tasks with a
stretch of that table, fetches the bytes. Both are small and know nothing of Ray.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa

from deit_ray import rng, storage

# file: index into the reader's files; offset, size: of the bytes in it, or whatever the reader takes them for
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("label", pa.int32()),
        ("file", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)
TEST_FOLDERS = ("test", "val", "valid", "validation")
TEST_FRACTION = 0.2  # of a source that has no test images of its own
SPLIT_SEED = 0  # the split belongs to the data set, not to an experiment
REMOTE_THREADS = 16  # requests at a time to an object store: one waits tens of milliseconds


class Unreadable(Exception):
    """An image that cannot be had; the message says why."""


class Reader(Protocol):
    def read(self, images: pa.Table) -> Iterator[bytes | np.ndarray | Unreadable]:
        """The images' encoded files, or RGB pixels uint8 [height, width, 3], in the order of the table."""


@dataclass(frozen=True)
class Split:
    images: pa.Table  # of SCHEMA, in the source's own order
    reader: Reader

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Source:
    """Attributes:
    format: as `--format` names it.
    notes: what a person should know of how the source was understood.
    """

    format: str
    classes: list[str]
    splits: dict[str, Split]
    notes: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        """Changes with any class, name, label, size or the order of the images; not with where the source lies."""
        digest = hashlib.sha256("\n".join([self.format, *self.classes]).encode())
        for split, found in self.splits.items():
            digest.update(f"\n{split}\n".encode())
            for batch in found.images.to_batches(max_chunksize=1 << 16):
                digest.update("\n".join(batch["name"].to_pylist()).encode())
                digest.update(batch["label"].to_numpy().tobytes() + batch["size"].to_numpy().tobytes())
        return digest.hexdigest()[:16]


def listing(names: list[str], labels, file=0, offsets=0, sizes=0) -> pa.Table:
    """A table of SCHEMA; numbers stand for every row."""
    columns = [pa.array(np.broadcast_to(np.asarray(c, dtype), len(names)))
               for c, dtype in ((labels, np.int32), (file, np.int32), (offsets, np.int64), (sizes, np.int64))]  # fmt: skip
    return pa.table([pa.array(names, pa.string()), *columns], schema=SCHEMA)


def split_by_class(images: pa.Table, reader: Reader) -> dict[str, Split]:
    """`train` and `test`, each in the source's order: of every class the same fraction, at least one image of each where it has two."""
    labels = images["label"].to_numpy()
    by_label = np.argsort(labels, kind="stable")
    train, test = [], []
    for members in np.split(by_label, np.flatnonzero(np.diff(labels[by_label])) + 1):
        order = members[rng.permutation(SPLIT_SEED, "test split", len(members), int(labels[members[0]]))]
        count = max(1, round(TEST_FRACTION * len(members))) if len(members) > 1 else 0
        test.append(order[:count])
        train.append(order[count:])
    return {
        name: Split(images.take(np.sort(np.concatenate(rows))), reader)
        for name, rows in (("train", train), ("test", test))
    }


def find_split(names: Iterable[str]) -> tuple[str | None, list[str]]:
    """The one of some names that stands for the test images, and the others that would have done."""
    found = [name for name in TEST_FOLDERS if name in names]
    return (found[0] if found else None), found[1:]


@dataclass(frozen=True)
class Files:
    """Reads whole files; `file` is the folder below which `name` is the path."""

    folders: tuple[str, ...]

    def read(self, images: pa.Table) -> Iterator[bytes | Unreadable]:
        opened = [storage.open_uri(folder) for folder in self.folders]

        def fetch(row: dict) -> bytes | Unreadable:
            filesystem, folder = opened[row["file"]]
            try:
                with filesystem.open_input_stream(f"{folder}/{row['name']}") as stream:
                    return stream.read()
            except OSError as error:
                return Unreadable(f"cannot be read: {error.strerror or error}")

        return fetch_ahead(fetch, images.to_pylist(), all(map(storage.is_local, self.folders)))


@dataclass(frozen=True)
class Ranges:
    """Reads stretches of files, such as the members of tars, without unpacking them."""

    files: tuple[str, ...]

    def read(self, images: pa.Table) -> Iterator[bytes | Unreadable]:
        opened = {}
        for index in np.unique(images["file"].to_numpy()):
            filesystem, path = storage.open_uri(self.files[index])
            opened[index] = filesystem.open_input_file(path)

        def fetch(row: dict) -> bytes | Unreadable:
            content = opened[row["file"]].read_at(row["size"], row["offset"])
            return content if len(content) == row["size"] else Unreadable("the archive ends within it")

        try:
            yield from fetch_ahead(
                fetch,
                images.select(["file", "offset", "size"]).to_pylist(),
                all(map(storage.is_local, self.files)),
            )
        finally:
            for file in opened.values():
                file.close()


def fetch_ahead(fetch: Callable, rows: list, local: bool) -> Iterator:
    """fetch(row) for every row, in order; from an object store several at a time, a bounded number ahead."""
    if local:
        yield from map(fetch, rows)
        return
    with ThreadPoolExecutor(REMOTE_THREADS) as pool:
        ahead, width = [], 2 * REMOTE_THREADS
        for row in rows:
            ahead.append(pool.submit(fetch, row))
            if len(ahead) >= width:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()
