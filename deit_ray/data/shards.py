"""The shard format: Parquet files of JPEG bytes and labels, rows in random order, and a manifest that describes them.

A folder holds manifest.json and, for each split, SPLIT-00000.parquet and so on, with the columns `image` (JPEG bytes),
`label` (int32), `name` (where it came from) and `source` (a hash of what the JPEG was made from).
An image's id is its place in the split, over all shards in order. Since the rows are in random order, a range of ids is a
random part of the data set: `holdout` takes the last ones.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise

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
    file: str
    row_groups: list[int]  # rows of each
    bytes: int
    sha256: str

    @property
    def rows(self) -> int:
        return sum(self.row_groups)


@dataclass(frozen=True)
class Manifest:
    classes: list[str]
    splits: dict[str, list[Shard]]
    class_counts: dict[str, list[int]]  # images of each class, by split
    fingerprint: str  # changes when any image, label or the order changes
    made_by: dict = field(default_factory=dict)  # command, version and settings
    source: dict = field(default_factory=dict)  # format and fingerprint of what it was made from
    unreadable: dict[str, int] = field(default_factory=dict)  # images of each split that were left out
    duplicates: dict = field(
        default_factory=dict
    )  # test images that are, byte for byte, training images too: count, some names

    def rows(self, split: str) -> int:
        return sum(shard.rows for shard in self.splits[split])

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)


@dataclass(frozen=True)
class RowGroups:
    """A stretch of a split's row groups as arrays, one element a row group (or the part of it that belongs here).

    Attributes:
        files: path of each shard file, indexed by `file`.
        file, group: where a row group stands.
        start, rows: the rows of it that belong here.
        first_id: the image id of the row `start`.
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
        """The part whose image ids are in [low, high)."""
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
    """Writes (jpeg bytes, label, name, hash of the source) rows, in the order given, as one shard: whole or not at all.

    Returns:
        The shard, and the number of images of each label there are.
    """
    sink, groups, counts, rows = pa.BufferOutputStream(), [], {}, iter(rows)
    options = {"compression": {name: "none" if name in ("image", "source") else "zstd" for name in SCHEMA.names},
               "use_dictionary": False, "write_statistics": False}  # fmt: skip
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
    """The shard whose file holds this."""
    return Shard(file, row_groups, len(content), hashlib.sha256(content).hexdigest())


def group_rows(file: pq.ParquetFile) -> list[int]:
    """The rows of each row group."""
    return [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]


def digest_of(content) -> bytes:
    """The hash of what an image was made from, by which duplicates are found."""
    return hashlib.sha256(content).digest()[:DIGEST]


def shard_file(split: str, number: int) -> str:
    return f"{split}-{number:05d}.parquet"


def write_split(
    uri: str, split: str, rows: Iterable[tuple[bytes, int, str]]
) -> tuple[list[Shard], list[int]]:
    """Writes (jpeg bytes, label, name) rows, in the order given, as a split's shards.

    Returns:
        The shards, and the number of images of each label.
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
    """Writes the manifest, last, so that a folder without one is unfinished; `known` are the other fields of `Manifest`."""
    manifest = make_manifest(classes, splits, counts, made_by, **known)
    storage.write_bytes(storage.join(uri, MANIFEST), manifest.to_json().encode())
    return manifest


def make_manifest(classes: list[str], splits: dict, counts: dict, made_by: dict, **known) -> Manifest:
    sums = [shard.sha256 for split in sorted(splits) for shard in splits[split]]
    fingerprint = hashlib.sha256("".join([*classes, *sums]).encode()).hexdigest()[:16]
    counts = {split: c + [0] * (len(classes) - len(c)) for split, c in counts.items()}
    return Manifest(classes, splits, counts, fingerprint, made_by, **known)


def read_manifest(uri: str) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        UserError: there is none, or it is of another format.
    """
    where = storage.join(storage.absolute(uri), MANIFEST)
    try:
        content = json.loads(storage.read_bytes(where))
    except FileNotFoundError:
        raise UserError(
            f"data.uri: {uri}: no prepared data set there (manifest.json is missing); make one with: "
            f"deit-ray data prepare SOURCE --out {uri}"
        ) from None
    except (OSError, pa.ArrowException, json.JSONDecodeError) as error:
        raise UserError(f"data.uri: {where}: cannot be read: {error}") from None
    if content.pop("format", None) != FORMAT:
        raise UserError(f"data.uri: {where}: not a manifest of format {FORMAT}; prepare the data again")
    content["splits"] = {
        split: [Shard(**shard) for shard in shards] for split, shards in content["splits"].items()
    }
    return Manifest(**content)


def row_groups(uri: str, manifest: Manifest, split: str, holdout: float) -> RowGroups:
    """The row groups of `train` (without the held-out images), `val` (the held-out ones) or `test`."""
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


def read_row_groups(path: str, groups: list[int]) -> list[pa.Table]:
    """The table of each of these row groups of a shard, with the columns `image` and `label`.

    Raises:
        UnavailableError: the shard is missing or damaged.
    """
    try:
        filesystem, inside = storage.open_uri(path)
        with pq.ParquetFile(
            filesystem.open_input_file(inside), pre_buffer=True
        ) as file:  # neighbours are one request
            table = file.read_row_groups(groups, columns=["image", "label"], use_threads=False)
            ends = np.cumsum([file.metadata.row_group(g).num_rows for g in groups]).tolist()
    except (OSError, pa.ArrowException) as error:
        folder = path.rpartition("/")[0]
        names = f"row group{'s' * (len(groups) > 1)} {', '.join(map(str, sorted(groups)))}"
        raise UnavailableError(
            f"data.uri: shard {path}, {names}, is missing or damaged ({error}); `deit-ray data check {folder}` says what is "
            "wrong and which command makes it again"
        ) from None
    return [table.slice(begin, end - begin) for begin, end in pairwise([0, *ends])]


NO_ROW_GROUPS = RowGroups((), *(np.zeros(0, np.int64) for _ in range(5)))
