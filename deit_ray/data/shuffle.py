"""The shuffle over the whole data set, with bounded memory: images go to parts, parts to shards. What a task of either phase does.

An image's place in its split is a hash permutation of its place in the source, so shard k is known before anything is
read: the images with places k x SHARD to (k + 1) x SHARD, whichever worker does it. The first phase reads the source in
its own order, encodes, and writes a part (Arrow IPC) of some thousand images, grouped by shard; the second gathers a
shard from all parts. A file is whole or absent, and says in its metadata which preparation it belongs to.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deit_ray import storage
from deit_ray.data import images, shards
from deit_ray.data.listing import Reader, Unreadable, fetch_ahead

PART = 1024  # images: what a task holds in memory, encoded
PART_SCHEMA = pa.schema([("place", pa.int64()), ("image", pa.binary()), ("label", pa.int32()), ("name", pa.string()),
                         ("source", pa.binary()), ("reason", pa.string())])  # fmt: skip
KEY, BAD = b"deit_ray.prepared", b"deit_ray.unreadable"  # of a shard's metadata


@dataclass(frozen=True)
class Settings:
    """How images become JPEGs (see `images.encode`) and JPEGs shards."""

    short_side: int
    quality: int
    exif: bool
    shard_images: int


@dataclass(frozen=True)
class Part:
    """A stretch of a split in the source's order, and where its images go.

    Attributes:
        images: of `listing.SCHEMA`.
        places: int64, of each image in the split's random order.
        shards: numbers of the shards that are wanted; images that go elsewhere are not read.
        uri: of the file to write.
    """

    images: pa.Table
    reader: Reader
    places: np.ndarray
    shards: list[int]
    uri: str
    settings: Settings


def write_part(part: Part) -> tuple[int, list[tuple[str, str]]]:
    """The first phase's task: reads, encodes and writes a part.

    Returns:
        The number of images it is done with, and (name, reason) of those that cannot be.
    """
    goes_to = part.places // part.settings.shard_images
    chosen = np.flatnonzero(np.isin(goes_to, part.shards))
    wanted, places = part.images.take(chosen).combine_chunks(), part.places[chosen]
    encoded = [_encode(content, part.settings) for content in part.reader.read(wanted)]
    bad = [
        (name, reason)
        for name, (_, reason, _) in zip(wanted["name"].to_pylist(), encoded, strict=True)
        if reason
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, PART_SCHEMA) as writer:
        for shard in part.shards:
            rows = np.flatnonzero(goes_to[chosen] == shard)
            jpegs, reasons, digests = (
                zip(*(encoded[row] for row in rows), strict=True) if len(rows) else ((), (), ())
            )
            known = wanted.take(rows)
            columns = (
                places[rows],
                jpegs,
                known["label"].combine_chunks(),
                known["name"].combine_chunks(),
                digests,
                reasons,
            )
            arrays = [
                c if isinstance(c, pa.Array) else pa.array(c, t)
                for c, t in zip(columns, PART_SCHEMA.types, strict=True)
            ]
            writer.write_batch(pa.record_batch(arrays, schema=PART_SCHEMA))
            for row in rows:
                encoded[row] = None  # it is in the sink
    storage.write_bytes(part.uri, sink.getvalue())
    return len(part.places), bad


def _encode(content, settings: Settings) -> tuple[bytes | None, str | None, bytes | None]:
    """(JPEG, None, hash of what it was made from), or (None, the reason, None)."""
    try:
        if isinstance(content, Unreadable):
            raise content
        jpeg = images.encode(content, settings.short_side, settings.quality, settings.exif)
    except Unreadable as unreadable:
        return None, str(unreadable), None
    source = content if isinstance(content, bytes) else np.ascontiguousarray(content)
    return jpeg, None, shards.digest_of(source)


@dataclass(frozen=True)
class Report:
    """What is known of a finished shard.

    Attributes:
        counts: images of each label, as far as there are any.
        digests: of the source of each image, one after the other.
        bad: (name, reason) of the images that would have been in it.
    """

    shard: shards.Shard
    counts: dict[int, int]
    digests: bytes
    bad: list[tuple[str, str]]

    def sources(self) -> Iterator[bytes]:
        """The hash of each image's source."""
        return (self.digests[i : i + shards.DIGEST] for i in range(0, len(self.digests), shards.DIGEST))


def write_shard(out: str, file: str, index: int, parts: list[str], key: str) -> Report:
    """The second phase's task: gathers a shard from all parts.

    Args:
        index: of its batch within every part.
    """
    batches = [
        batch
        for batch in fetch_ahead(lambda uri: _read_batch(uri, index), parts, storage.is_local(out))
        if len(batch)
    ]
    rows = [
        (place, b, row)
        for b, batch in enumerate(batches)
        for row, place in enumerate(batch["place"].to_pylist())
    ]
    rows.sort()
    bad = [
        (batches[b]["name"][row].as_py(), batches[b]["reason"][row].as_py())
        for _, b, row in rows
        if not batches[b]["image"][row].is_valid
    ]
    good = [(b, row) for _, b, row in rows if batches[b]["image"][row].is_valid]
    named = (tuple(batches[b][name][row].as_py() for name in shards.SCHEMA.names) for b, row in good)
    written, counts = shards.write_shard(out, file, named, {KEY: key, BAD: json.dumps(bad)})
    return Report(written, counts, b"".join(batches[b]["source"][row].as_py() for b, row in good), bad)


def _read_batch(uri: str, index: int) -> pa.RecordBatch:
    filesystem, path = storage.open_uri(uri)
    with filesystem.open_input_file(path) as file:
        return pa.ipc.open_file(file).get_batch(index)


def describe_shard(out: str, file: str, key: str, expected: shards.Shard | None) -> Report | None:
    """The report of a shard that is there, or None where it is missing, damaged, or of another preparation.

    Args:
        expected: what the manifest says of it, where there is one.
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
    labels, counts = np.unique(table["label"].to_numpy(), return_counts=True)
    digests = b"".join(table["source"].to_pylist())
    return Report(
        found,
        dict(zip(labels.tolist(), counts.tolist(), strict=True)),
        digests,
        [tuple(b) for b in json.loads(metadata[BAD])],
    )


def duplicates(reports: dict[str, list[Report]]) -> Iterator[tuple[int, int]]:
    """(shard, row) of each test image whose source is, byte for byte, also a training image's."""
    test = {source for report in reports.get("test", ()) for source in report.sources()}
    found = {source for report in reports.get("train", ()) for source in report.sources() if source in test}
    for number, report in enumerate(reports.get("test", ())):
        yield from ((number, row) for row, source in enumerate(report.sources()) if source in found)
