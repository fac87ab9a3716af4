"""Shuffles a whole data set with bounded memory: tasks that turn images into parts, and parts into shards.

An image's place in its split is a hash permutation of its place in the source. So the images of shard k are
known before anything is read: those with the places k x SHARD to (k + 1) x SHARD - 1. They do not depend on
the number of workers. The first phase reads the source in its own order, encodes the images, and writes parts
(Arrow IPC) of about a thousand images, grouped by shard. The second phase gathers each shard from all parts.
A file is whole or absent, and a shard's metadata says which preparation it belongs to.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deit_ray import storage
from deit_ray.data import images, shards
from deit_ray.data.listing import Reader, Unreadable, fetch_ahead

PART = 1024  # images that a task holds in memory, encoded
PART_SCHEMA = pa.schema(
    [
        ("place", pa.int64()),
        ("image", pa.binary()),
        ("label", pa.int32()),
        ("name", pa.string()),
        ("source", pa.binary()),
        ("reason", pa.string()),
    ]
)
KEY, BAD = b"deit_ray.prepared", b"deit_ray.unreadable"  # keys of a shard's metadata
REMARKS = b"deit_ray.remarks"  # key of a part's metadata


@dataclass(frozen=True)
class Settings:
    """How images become JPEGs and shards.

    Attributes:
        short_side, quality, exif, chroma: see `images.convert`.
        shard_images: images in a shard.
        test_short_side: `short_side` of the test images.
    """

    short_side: int
    quality: int
    exif: bool
    shard_images: int
    chroma: str
    test_short_side: int

    def of(self, split: str) -> "Settings":
        """The settings of a split's images."""
        return replace(self, short_side=self.test_short_side) if split == "test" else self

    def named(self) -> dict:
        """The settings by name, without new ones that change nothing; see `earlier_settings`."""
        earlier = earlier_settings(self.short_side)
        return {key: value for key, value in asdict(self).items() if earlier.get(key) != value}


def earlier_settings(short_side: int) -> dict:
    """The values that settings had before they existed; a manifest without them was made so."""
    return {"chroma": "420", "test_short_side": short_side}


@dataclass(frozen=True)
class Part:
    """Consecutive images of a split in the source's order, and the places that they go to.

    Attributes:
        images: a table of `listing.SCHEMA`.
        reader: fetches them.
        places: int64 [images], each image's place in the split's random order.
        shards: numbers of the shards to make; images of other shards are not read.
        uri: the file to write.
        settings: see `Settings`.
    """

    images: pa.Table
    reader: Reader
    places: np.ndarray
    shards: list[int]
    uri: str
    settings: Settings


def write_part(part: Part) -> tuple[int, list[tuple[str, str]]]:
    """The task of the first phase: reads, encodes and writes a part.

    Returns:
        (number of images in the part, (name, reason) of each image that cannot be read).
    """
    goes_to = part.places // part.settings.shard_images
    chosen = np.flatnonzero(np.isin(goes_to, part.shards))
    wanted, places = part.images.take(chosen).combine_chunks(), part.places[chosen]
    encoded = [_encode(content, part.settings) for content in part.reader.read(wanted)]
    names = wanted["name"].to_pylist()
    bad = [(name, reason) for name, (_, reason, *_) in zip(names, encoded, strict=True) if reason]
    remarks = _count_remarks(names, encoded)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, PART_SCHEMA.with_metadata({REMARKS: json.dumps(remarks)})) as writer:
        for shard in part.shards:
            rows = np.flatnonzero(goes_to[chosen] == shard)
            writer.write_batch(_part_batch(wanted.take(rows), places[rows], [encoded[row] for row in rows]))
            for row in rows:
                encoded[row] = None  # frees memory: the sink holds a copy
    storage.write_bytes(part.uri, sink.getvalue())
    return len(part.places), bad


def _part_batch(images: pa.Table, places: np.ndarray, encoded: list[tuple]) -> pa.RecordBatch:
    """One shard's images in a part, a batch of PART_SCHEMA; `encoded` has `_encode`'s results."""
    jpegs, reasons, digests, _ = zip(*encoded, strict=True) if encoded else ((), (), (), ())
    columns = {
        "place": places,
        "image": jpegs,
        "label": images["label"].combine_chunks(),
        "name": images["name"].combine_chunks(),
        "source": digests,
        "reason": reasons,
    }
    return pa.record_batch(columns, schema=PART_SCHEMA)


def _encode(content, settings: Settings) -> tuple[bytes | None, str | None, bytes | None, tuple[str, ...]]:
    """Returns (JPEG, None, hash of the source, remarks), or (None, why it cannot be read, None, ())."""
    try:
        if isinstance(content, Unreadable):
            raise content
        made = images.convert(content, settings.short_side, settings.quality, settings.exif, settings.chroma)
    except Unreadable as unreadable:
        return None, str(unreadable), None, ()
    source = content if isinstance(content, bytes) else np.ascontiguousarray(content)
    return made.jpeg, None, shards.digest_of(source), made.remarks


def _count_remarks(names: list[str], encoded: list[tuple]) -> dict[str, list]:
    """[number of images, name of the first] of each remark of `decode`; `encoded` has `_encode`'s results."""
    counted = {}
    for name, (*_, remarks) in zip(names, encoded, strict=True):
        for remark in remarks:
            counted.setdefault(remark, [0, name])[0] += 1
    return counted


def read_remarks(parts: list[str]) -> dict[str, list]:
    """The remarks of all parts: [number of images, name of the first] of each."""
    total = {}
    if not parts:
        return total
    for counted in fetch_ahead(_read_remarks, parts, storage.is_local(parts[0])):
        for remark, (count, name) in counted.items():
            total.setdefault(remark, [0, name])[0] += count
    return total


def _read_remarks(uri: str) -> dict[str, list]:
    filesystem, path = storage.open_uri(uri)
    with filesystem.open_input_file(path) as file:
        return json.loads((pa.ipc.open_file(file).schema.metadata or {}).get(REMARKS, b"{}"))


@dataclass(frozen=True)
class Report:
    """Facts about a finished shard.

    Attributes:
        shard: the shard's entry in the manifest.
        digests: hashes of the images' sources, joined.
        labels: the images' labels.
        bad: (name, reason) of the images that are left out because they cannot be read.
    """

    shard: shards.Shard
    digests: bytes
    labels: list[int]
    bad: list[tuple[str, str]]

    @property
    def counts(self) -> Counter[int]:
        """The number of images by label."""
        return Counter(self.labels)

    def sources(self) -> Iterator[bytes]:
        """The hash of each image's source."""
        return (self.digests[i : i + shards.DIGEST] for i in range(0, len(self.digests), shards.DIGEST))


def write_shard(out: str, file: str, index: int, parts: list[str], key: str) -> Report:
    """The task of the second phase: gathers a shard from all parts.

    Args:
        out: the data set's folder.
        file: the shard's file name.
        index: number of the shard's batch within every part.
        parts: URIs of the parts.
        key: the preparation's key.
    """
    fetched = fetch_ahead(lambda uri: _read_batch(uri, index), parts, storage.is_local(out))
    batches = [batch for batch in fetched if len(batch)]
    rows = []
    for b, batch in enumerate(batches):
        rows += [(place, b, row) for row, place in enumerate(batch["place"].to_pylist())]
    rows.sort()
    bad = [
        (batches[b]["name"][row].as_py(), batches[b]["reason"][row].as_py())
        for _, b, row in rows
        if not batches[b]["image"][row].is_valid
    ]
    good = [(b, row) for _, b, row in rows if batches[b]["image"][row].is_valid]
    named = (tuple(batches[b][name][row].as_py() for name in shards.SCHEMA.names) for b, row in good)
    written, _ = shards.write_shard(out, file, named, {KEY: key, BAD: json.dumps(bad)})
    digests = b"".join(batches[b]["source"][row].as_py() for b, row in good)
    return Report(written, digests, [batches[b]["label"][row].as_py() for b, row in good], bad)


def _read_batch(uri: str, index: int) -> pa.RecordBatch:
    filesystem, path = storage.open_uri(uri)
    with filesystem.open_input_file(path) as file:
        return pa.ipc.open_file(file).get_batch(index)


def describe_shard(out: str, file: str, key: str, expected: shards.Shard | None) -> Report | None:
    """The report of a shard, or None if the shard is missing, damaged, or of another preparation.

    Args:
        expected: the shard's entry in the manifest; None without a manifest.
    """
    try:
        content = storage.read_bytes(storage.join(out, file))
        if expected and hashlib.sha256(content).hexdigest() != expected.sha256:
            return None
        opened = pq.ParquetFile(pa.BufferReader(content))
        metadata = opened.schema_arrow.metadata or {}
        if metadata.get(KEY) != key.encode():
            return None
        table = opened.read(columns=["label", "source"])
    except (OSError, pa.ArrowException):
        return None
    found = shards.describe(file, shards.group_rows(opened), content)
    digests = b"".join(table["source"].to_pylist())
    bad = [tuple(entry) for entry in json.loads(metadata[BAD])]
    return Report(found, digests, table["label"].to_pylist(), bad)


def duplicates(reports: dict[str, list[Report]]) -> Iterator[tuple[int, int]]:
    """(shard, row) of each test image whose source is also a training image's, byte for byte."""
    test = {source for report in reports.get("test", ()) for source in report.sources()}
    found = {source for report in reports.get("train", ()) for source in report.sources() if source in test}
    for number, report in enumerate(reports.get("test", ())):
        yield from ((number, row) for row, source in enumerate(report.sources()) if source in found)


def contradictions(reports: dict[str, list[Report]]) -> int:
    """The number of images whose source is, byte for byte, also that of an image of another class."""
    found = [report for split in reports.values() for report in split]
    sources = [source for report in found for source in report.sources()]
    labels = [label for report in found for label in report.labels]
    table = pa.table({"source": pa.array(sources, pa.binary(shards.DIGEST)), "label": labels})
    groups = table.group_by("source").aggregate([("label", "count_distinct"), ("label", "count")])
    contradicting = groups.filter(pc.greater(groups["label_count_distinct"], 1))
    return pc.sum(contradicting["label_count"]).as_py() or 0
