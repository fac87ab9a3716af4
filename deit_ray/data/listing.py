"""Lists the images of a source before any is decoded: names, labels, and where each image's bytes are.

A listing is a table: a million images take some tens of megabytes. A reader travels to the tasks with a part
of that table, and fetches the bytes there. Neither needs Ray.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from deit_ray import rng, storage
from deit_ray.terminal.format import counted

# file: index into the reader's files. offset, size: place of the image's bytes in that file; some readers
# give offset another meaning, such as a row
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("label", pa.int32()),
        ("file", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation")
TRAIN_FOLDERS = ("train", "training", "trn")
SPLIT_WORDS = (*TRAIN_FOLDERS, *TEST_FOLDERS)
SET_WORDS = ("set", "data", "dataset", "split", "images", "image", "imgs", "img", "seg", "folder")
TEST_FRACTION = 0.2  # part of the images that become test images, if a source has none
SPLIT_SEED = 0  # fixed, since the split belongs to the data set, not to an experiment
NAMED = 10  # names that a note gives at most
EMPTY = "no files in them"  # why folders are not used
REMOTE_THREADS = 16  # requests at a time to an object store; each waits tens of milliseconds


class Unreadable(Exception):
    """An image cannot be read; the message says why."""


class Reader(Protocol):
    """Fetches images."""

    def read(self, images: pa.Table) -> Iterator[bytes | np.ndarray | Unreadable]:
        """Yields for each row, in order, an encoded file, RGB pixels [height, width, 3] (uint8, uint16 or
        bool), or the reason why the image cannot be read."""


@dataclass(frozen=True)
class Split:
    """Images of a split, in the source's own order.

    Attributes:
        images: a table of SCHEMA.
        reader: fetches them.
    """

    images: pa.Table
    reader: Reader

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Source:
    """A data set before its preparation.

    Attributes:
        format: the name that `--format` takes.
        classes: names, by label.
        splits: train and test.
        notes: assumptions about the source that a person should know, and what of it is not used.
        recognised: what was recognised, a line each: files of each split, column, axis order, dtype.
    """

    format: str
    classes: list[str]
    splits: dict[str, Split]
    notes: list[str] = field(default_factory=list)
    recognised: list[str] = field(default_factory=list)

    def files(self) -> list[str]:
        """The archives, tables or arrays that its images are read from."""
        readers = [split.reader for split in self.splits.values()]
        return sorted({file for reader in readers for file in getattr(reader, "files", ())})

    def fingerprint(self) -> str:
        """A hash of the classes and of the names, labels, sizes and order of the images.

        It does not depend on where the source is stored.
        """
        digest = hashlib.sha256("\n".join([self.format, *self.classes]).encode())
        for split, found in self.splits.items():
            digest.update(f"\n{split}\n".encode())
            for batch in found.images.to_batches(max_chunksize=1 << 16):
                digest.update("\n".join(batch["name"].to_pylist()).encode())
                digest.update(batch["label"].to_numpy().tobytes() + batch["size"].to_numpy().tobytes())
        return digest.hexdigest()[:16]


class Unused:
    """Counts what a source holds and `prepare` does not use, by reason, and keeps the first names."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}

    def add(self, name: str, reason: str, files: int | None = None) -> None:
        """Counts a file, or a folder with a number of files."""
        self.counts[reason] += 1 if files is None else files
        named = self.names.setdefault(reason, [])
        held = "" if files is None else f" ({counted(files, 'file')})"
        named.append(printable(name) + held)
        del named[NAMED + 1 :]

    def notes(self) -> list[str]:
        """A line for each reason."""
        lines = []
        for reason, count in self.counts.items():
            named = ", ".join(self.names[reason][:NAMED])
            more = " and more" if len(self.names[reason]) > NAMED else ""
            what = counted(count, "folder" if reason == EMPTY else "file")
            lines.append(f"{what} {'is' if count == 1 else 'are'} not used ({reason}): {named}{more}")
        return lines


def printable(name: str) -> str:
    """A name on one line: characters that a terminal does not show, and bytes that are not UTF-8, escaped."""
    escaped = [c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name]
    return "".join(escaped).replace("\\udc", "\\x")


def decoded(name: str) -> str:
    """A file name as valid Unicode: bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(name).decode(errors="backslashreplace")


def listing(names: list[str], labels, file=0, offsets=0, sizes=0) -> pa.Table:
    """A table of SCHEMA. A single number stands for every row."""
    numbers = ((labels, np.int32), (file, np.int32), (offsets, np.int64), (sizes, np.int64))
    columns = [pa.array(np.broadcast_to(np.asarray(c, dtype), len(names))) for c, dtype in numbers]
    return pa.table([pa.array(names, pa.string()), *columns], schema=SCHEMA)


def split_by_class(images: pa.Table, reader: Reader) -> dict[str, Split]:
    """Splits images into `train` and `test`, each in the source's order: the same fraction of every class.

    A class of two or more images has at least one test image.
    """
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
    """Returns (the name to use as the test split, or None; the other names that could be the test split)."""
    found = [name for name in TEST_FOLDERS if name in names]
    return (found[0] if found else None), found[1:]


def split_word(path: str) -> str:
    """The first word of a path that names a split, such as train or val; empty where there is none.

    Other words for training, such as training, become train.
    """
    words = re.split(r"[^a-z]+", path.lower())
    found = next((word for word in words if word in SPLIT_WORDS), "")
    return "train" if found in TRAIN_FOLDERS else found


def split_of_folder(name: str) -> str:
    """The split that a folder's name means, as a word of `split_word`; empty for any other name.

    Training, test_set and seg_train mean splits; trains and test-tubes do not.
    """
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word]
    splits = [word for word in words if word in SPLIT_WORDS]
    if len(splits) != 1 or not all(word in (*SPLIT_WORDS, *SET_WORDS) for word in words):
        return ""
    return split_word(splits[0])


@dataclass(frozen=True)
class Files:
    """Reads whole files: `file` is the index of a folder, `name` the path inside it.

    A name in Arrow is Unicode. Where a path on the disk is not, `offset` is 1 + the path's index in `paths`.
    """

    folders: tuple[str, ...]
    paths: tuple[bytes, ...] = ()

    def read(self, images: pa.Table) -> Iterator[bytes | Unreadable]:
        opened = [storage.open_uri(folder) for folder in self.folders]

        def fetch(row: dict) -> bytes | Unreadable:
            filesystem, folder = opened[row["file"]]
            try:
                if row["offset"]:
                    return Path(folder, os.fsdecode(self.paths[row["offset"] - 1])).read_bytes()
                with filesystem.open_input_stream(f"{folder}/{row['name']}") as stream:
                    return stream.read()
            except OSError as error:
                return Unreadable(f"cannot be read: {error.strerror or error}")

        return fetch_ahead(fetch, images.to_pylist(), all(map(storage.is_local, self.folders)))


@dataclass(frozen=True)
class Ranges:
    """Reads parts of files, such as the members of tars, without unpacking."""

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
    """Yields fetch(row) for every row, in order.

    If the rows are not local, several are fetched in parallel, before they are asked for.
    """
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
