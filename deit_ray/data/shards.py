"""The shard format: Parquet files of JPEG bytes and labels, and a manifest that describes them.

A folder holds manifest.json and, for each split, SPLIT-00000.parquet and so on, with the columns `image`
(JPEG bytes), `label` (int32), `name` (where the image came from) and `source` (a hash of the file or pixels
that the JPEG was made from). An image's id is its place in the split, over all shards in order. Rows are in
random order, so a range of ids is a random part of the data set: `holdout` takes the last ids.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deit_ray import storage
from deit_ray.errors import UnavailableError, UserError

FORMAT = 1
MANIFEST = "manifest.json"
ROW_GROUP = 64  # images
SHARD = 4096  # images
DIGEST = 16  # bytes of the hash in the column `source`
SCHEMA = pa.schema(
    [("image", pa.binary()), ("label", pa.int32()), ("name", pa.string()), ("source", pa.binary())]
)


@dataclass(frozen=True)
class Shard:
    """A shard file as the manifest describes it.

    Attributes:
        file: its name in the folder.
        row_groups: number of rows of each row group.
        bytes, sha256: size and checksum of the file.
    """

    file: str
    row_groups: list[int]
    bytes: int
    sha256: str

    @property
    def rows(self) -> int:
        return sum(self.row_groups)


@dataclass(frozen=True)
class Manifest:
    """A prepared data set.

    Attributes:
        classes: names, by label.
        splits: the shards of each split.
        class_counts: number of images of each class, by split.
        fingerprint: a hash of the class names and of all shards; it changes with any image, label or order.
        made_by: command, versions and settings of the preparation.
        source: format and fingerprint of the source.
        unreadable: number of images of each split that were left out.
        duplicates: number, and some names, of test images that are also training images, byte for byte, and
            number of images that are also images of another class.
        files: [bytes, SHA-256] of the other files in the folder, by name.
        remarks: [number of images, name of the first] of each remark of `decode`.
    """

    classes: list[str]
    splits: dict[str, list[Shard]]
    class_counts: dict[str, list[int]]
    fingerprint: str
    made_by: dict = field(default_factory=dict)
    source: dict = field(default_factory=dict)
    unreadable: dict[str, int] = field(default_factory=dict)
    duplicates: dict = field(default_factory=dict)
    files: dict[str, list] = field(default_factory=dict)
    remarks: dict[str, list] = field(default_factory=dict)

    @property
    def exif(self) -> bool:
        """Whether images were turned as their EXIF says."""
        return self.made_by.get("exif", False)

    def rows(self, split: str) -> int:
        return sum(shard.rows for shard in self.splits[split])

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)


@dataclass(frozen=True)
class RowGroups:
    """Consecutive row groups of a split, or parts of them, as arrays int64 [row groups].

    Attributes:
        files: path of each shard file.
        file: index into `files`.
        group: number of the row group in its file.
        start, rows: first row and number of rows that belong to this part.
        first_id: image id of the row `start`.
    """

    files: tuple[str, ...]
    file: np.ndarray
    group: np.ndarray
    start: np.ndarray
    rows: np.ndarray
    first_id: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> int:
        return int(self.rows.sum())

    def between(self, low: int, high: int) -> "RowGroups":
        """The part with the image ids `low` to `high` - 1."""
        skip = np.clip(low - self.first_id, 0, self.rows)
        rows = np.clip(high - self.first_id, 0, self.rows) - skip
        keep = rows > 0
        return RowGroups(
            self.files,
            self.file[keep],
            self.group[keep],
            (self.start + skip)[keep],
            rows[keep],
            (self.first_id + skip)[keep],
        )


def write_shard(
    uri: str, file: str, rows: Iterable[tuple], metadata: dict | None = None
) -> tuple[Shard, dict[int, int]]:
    """Writes rows as one shard, in the given order. The file is written whole or not at all.

    Args:
        rows: (JPEG bytes, label, name, hash of the source).
        metadata: keys and values for the metadata of the Parquet schema.

    Returns:
        (the shard, number of images by label, without labels that have none).
    """
    sink, groups, counts, rows = pa.BufferOutputStream(), [], {}, iter(rows)
    compression = {name: "none" if name in ("image", "source") else "zstd" for name in SCHEMA.names}
    options = {"compression": compression, "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(sink, SCHEMA.with_metadata(metadata), **options) as writer:
        while group := list(islice(rows, ROW_GROUP)):
            columns = [pa.array(c, t) for c, t in zip(zip(*group, strict=True), SCHEMA.types, strict=True)]
            writer.write_table(pa.table(columns, schema=SCHEMA.with_metadata(metadata)))
            groups.append(len(group))
            for _, label, *_ in group:
                counts[label] = counts.get(label, 0) + 1
    content = sink.getvalue()
    storage.write_bytes(storage.join(uri, file), content)
    return describe(file, groups, content), counts


def describe(file: str, row_groups: list[int], content) -> Shard:
    """The description of a shard file with this content."""
    return Shard(file, row_groups, len(content), hashlib.sha256(content).hexdigest())


def group_rows(file: pq.ParquetFile) -> list[int]:
    """The number of rows of each row group."""
    return [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]


def digest_of(content) -> bytes:
    """The hash of a source image, by which duplicates are found."""
    return hashlib.sha256(content).digest()[:DIGEST]


def shard_file(split: str, number: int) -> str:
    """The file name of a shard."""
    return f"{split}-{number:05d}.parquet"


def write_split(
    uri: str, split: str, rows: Iterable[tuple[bytes, int, str]]
) -> tuple[list[Shard], list[int]]:
    """Writes (JPEG bytes, label, name) rows, in the given order, as a split's shards.

    Returns:
        (the shards, the number of images of each label).
    """
    shards, totals = [], Counter()
    rows = ((jpeg, label, name, digest_of(jpeg)) for jpeg, label, name in rows)
    while chunk := list(islice(rows, SHARD)):
        shard, counts = write_shard(uri, shard_file(split, len(shards)), chunk)
        shards.append(shard)
        totals.update(counts)
    return shards, [totals[label] for label in range(max(totals, default=-1) + 1)]


def write_manifest(
    uri: str, classes: list[str], splits: dict, counts: dict, made_by: dict, **known
) -> Manifest:
    """Writes the manifest of a folder. It comes last, so a folder without a manifest is unfinished.

    Args:
        known: other fields of `Manifest`.
    """
    manifest = make_manifest(classes, splits, counts, made_by, **known)
    storage.write_bytes(storage.join(uri, MANIFEST), manifest.to_json().encode())
    return manifest


def make_manifest(classes: list[str], splits: dict, counts: dict, made_by: dict, **known) -> Manifest:
    """Makes a manifest with its fingerprint. `known` are other fields of `Manifest`."""
    sums = [shard.sha256 for split in sorted(splits) for shard in splits[split]]
    fingerprint = hashlib.sha256("".join([*classes, *sums]).encode()).hexdigest()[:16]
    counts = {split: c + [0] * (len(classes) - len(c)) for split, c in counts.items()}
    return Manifest(classes, splits, counts, fingerprint, made_by, **known)


def read_manifest(uri: str) -> Manifest:
    """Reads the manifest of a prepared folder.

    Raises:
        UserError: there is no manifest, or it is damaged, or has another format.
    """
    where = storage.join(storage.absolute(uri), MANIFEST)
    try:
        content = storage.read_bytes(where)
    except FileNotFoundError:
        raise UserError(f"data.uri: {uri}: {_unprepared(uri)}") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"data.uri: {where}: cannot be read: {error}") from None
    try:
        found = json.loads(content)
        if found.pop("format", None) == FORMAT:
            splits = found.pop("splits").items()
            read = {name: [Shard(**shard) for shard in listed] for name, listed in splits}
            return Manifest(splits=read, **found)
    except (ValueError, TypeError, KeyError, AttributeError):  # no JSON, or other JSON than a manifest
        pass
    raise UserError(
        f"data.uri: {where}: not a manifest of format {FORMAT}, or damaged; prepare the data again: "
        f"deit-ray data prepare SOURCE --out {uri}"
    )


def _unprepared(uri: str) -> str:
    """What is at a place without a manifest, and how to prepare a data set."""
    if storage.is_local(uri) and Path(storage.local_path(uri)).is_file():
        return (
            "is a file; wanted is the folder of a prepared data set; make one with: "
            "deit-ray data prepare SOURCE --out FOLDER"
        )
    return (
        f"no prepared data set there ({MANIFEST} is missing); make one with: "
        f"deit-ray data prepare SOURCE --out {uri}"
    )


def row_groups(uri: str, manifest: Manifest, split: str, holdout: float) -> RowGroups:
    """The row groups of `train` (without the held-out images), `val` (the held-out images) or `test`.

    Raises:
        UserError: the data set has no such split.
    """
    stored = "test" if split == "test" else "train"
    if stored not in manifest.splits:
        raise UserError(f"data.uri: {uri}: has no {stored} images; it has {', '.join(manifest.splits)}")
    shards = manifest.splits[stored]
    groups = np.array([rows for shard in shards for rows in shard.row_groups], dtype=np.int64)
    everything = RowGroups(
        tuple(storage.join(storage.absolute(uri), shard.file) for shard in shards),
        np.repeat(np.arange(len(shards)), [len(shard.row_groups) for shard in shards]),
        np.concatenate([np.arange(len(shard.row_groups)) for shard in shards]),
        np.zeros(len(groups), np.int64),
        groups,
        np.cumsum(groups) - groups,
    )
    if stored == "test":
        return everything
    images = everything.images
    kept = images - round(images * holdout)
    return everything.between(0, kept) if split == "train" else everything.between(kept, images)


def rows_of(manifest: Manifest, holdout: float) -> dict[str, int]:
    """Number of images by split; `val` is the part of the training images that is held out."""
    images = manifest.rows("train") if "train" in manifest.splits else 0
    held = round(images * holdout)
    rows = {"train": images - held, "val": held}
    if "test" in manifest.splits:
        rows["test"] = manifest.rows("test")
    return {split: number for split, number in rows.items() if number}


def read_row_groups(path: str, groups: list[int]) -> list[pa.Table]:
    """Reads row groups of a shard: a table for each, with the columns `image` and `label`.

    Raises:
        UnavailableError: the shard is missing or damaged.
    """
    try:
        filesystem, inside = storage.open_uri(path)
        # with pre_buffer, neighbouring row groups are one request
        with pq.ParquetFile(filesystem.open_input_file(inside), pre_buffer=True) as file:
            table = file.read_row_groups(groups, columns=["image", "label"], use_threads=False)
            ends = np.cumsum([file.metadata.row_group(g).num_rows for g in groups]).tolist()
    except (OSError, pa.ArrowException) as error:
        folder = path.rpartition("/")[0]
        names = f"row group{'s' * (len(groups) > 1)} {', '.join(map(str, sorted(groups)))}"
        raise UnavailableError(
            f"data.uri: shard {path}, {names}, is missing or damaged ({error}); "
            f"`deit-ray data check {folder}` says what is wrong and which command repairs the data set"
        ) from None
    return [table.slice(begin, end - begin) for begin, end in pairwise([0, *ends])]


NO_ROW_GROUPS = RowGroups((), *(np.zeros(0, np.int64) for _ in range(5)))
