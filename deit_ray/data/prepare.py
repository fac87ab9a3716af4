"""Prepares a source as shards: RGB JPEGs of a bounded size, in random order over the whole data set.

A preparation runs the tasks of shuffle.py. Its folder is its progress: a preparation that is run again, after
an interruption or after damage, keeps the whole shards. The manifest is written last, so a folder without a
manifest is unfinished.
"""

import contextlib
import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property

import cv2
import numpy as np
import pyarrow.parquet as pq

import deit_ray
from deit_ray import rng, storage
from deit_ray.data import shards, shuffle, sources
from deit_ray.data.listing import Source
from deit_ray.data.tasks import run_tasks, workers
from deit_ray.errors import UserError
from deit_ray.terminal.progress import ShowProgress, silent

SHORT_SIDE = 256  # pixels
QUALITY = 92
MAX_BAD = 0.001
ORDER_SEED = 0
PARTS, PLAN = ".parts", "plan.json"  # a folder that is removed once all shards are written, and a file in it
UNREADABLE = "unreadable.csv"
NAMED = 20  # number of duplicates that the manifest names


@dataclass(frozen=True)
class Prepared:
    """The result of a preparation.

    Attributes:
        manifest: the data set's manifest.
        unreadable: names of the images that could not be read, by split.
        written: number of shards that this call wrote; the others were there already.
        notes: assumptions about the source that a person should know.
    """

    manifest: shards.Manifest
    unreadable: dict[str, list[str]]
    written: int
    notes: list[str]


@dataclass(frozen=True)
class Preparation:
    """A source and the settings. They determine every byte that is written."""

    source: Source
    settings: shuffle.Settings

    @cached_property
    def key(self) -> str:
        """A hash that is equal for equal preparations."""
        given = {
            "source": self.source.fingerprint(),
            "seed": ORDER_SEED,
            "format": shards.FORMAT,
            **asdict(self.settings),
        }
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]

    def shards(self, split: str) -> int:
        """The number of shards of a split."""
        return -(-len(self.source.splits[split]) // self.settings.shard_images)

    def parts(self, split: str) -> int:
        """The number of parts of a split."""
        return -(-len(self.source.splits[split]) // shuffle.PART)

    @property
    def images(self) -> int:
        """The number of images of all splits."""
        return sum(map(len, self.source.splits.values()))


def prepare(
    source: str,
    out: str,
    short_side: int = SHORT_SIDE,
    quality: int = QUALITY,
    command: str = "",
    *,
    format: str | None = None,
    labels: str | None = None,
    exif: bool = False,
    max_bad: float = MAX_BAD,
    address: str | None = None,
    progress: ShowProgress = silent,
    warn: Callable[[str], None] = lambda text: None,
    verbose: bool = False,
    shard_images: int = shards.SHARD,
) -> Prepared:
    """Writes the shards and the manifest of a source. A repeated call only makes what is missing or damaged.

    Args:
        source: `digits`, or a folder, file or URI; see `sources.open_source`.
        out: URI of the folder to write. A data set of another source or other settings is replaced.
        short_side: images with a longer short side are scaled down to it. 0 keeps sizes, and keeps JPEGs
            unchanged.
        quality: JPEG quality, 1 to 100.
        command: the command line, recorded in the manifest.
        format: the source's format; by default it is recognised.
        labels: a file with the labels of ILSVRC2012's validation images, instead of the devkit's.
        exif: whether to apply the rotation in EXIF; timm's loader does not.
        max_bad: fraction of the images that may be unreadable; with more the preparation stops.
        address: address of a Ray cluster. Without one, a few thousand images are prepared in this process,
            and more on a local Ray that this call starts.
        progress: shows how far the preparation is.
        warn, verbose: see `tasks.workers`.
        shard_images: images in a shard.

    Raises:
        UserError: the source, or too many of its images, cannot be read; or it holds no images.
    """
    out = storage.absolute(out)
    opened = sources.open_source(source, format, labels)
    preparation = Preparation(opened, shuffle.Settings(short_side, quality, exif, shard_images))
    places = {"--out": out}
    if source != sources.DIGITS:
        places["SOURCE"] = source
    with workers(preparation.images, places, address, warn, verbose) as parallel:
        return _Folder(preparation, out, max_bad, parallel, progress).write(source, command)


class _Folder:
    """The folder that a preparation writes."""

    def __init__(
        self, preparation: Preparation, out: str, max_bad: float, parallel: bool, progress: ShowProgress
    ):
        self.preparation, self.source, self.out = preparation, preparation.source, out
        self.max_bad, self.parallel, self.progress = max_bad, parallel, progress
        self.parts = storage.join(out, PARTS)

    def write(self, source: str, command: str) -> Prepared:
        """Writes what is missing or damaged."""
        before = self._manifest_before()
        reports = self._finished(before)
        wanted = {
            split: [n for n in range(self.preparation.shards(split)) if n not in reports[split]]
            for split in self.source.splits
        }
        if any(wanted.values()):
            planned = self._begin(wanted)
            self._write_parts(planned)
            self._write_shards(planned, wanted, reports)
        in_order = {split: [found[n] for n in sorted(found)] for split, found in reports.items()}
        bad = []
        for split, found in in_order.items():
            bad += [(split, *entry) for report in found for entry in report.bad]
        self._check_bad(bad)
        for split, found in in_order.items():
            if not any(report.counts for report in found):
                raise UserError(f"{source}: holds no readable image for {split}")
        manifest = _make_manifest(self.preparation, self.out, in_order, bad, command)
        if before and before.fingerprint != manifest.fingerprint:
            raise UserError(
                f"{self.out}: the repaired shards differ from the manifest: it was made with OpenCV "
                f"{before.made_by['opencv']} (this is {cv2.__version__}), or images of the source have "
                f"changed since; remove {shards.MANIFEST} there and prepare the data again"
            )
        self._write_unreadable(bad)
        storage.write_bytes(storage.join(self.out, shards.MANIFEST), (before or manifest).to_json().encode())
        self._clean(manifest)
        unreadable = {split: [name for s, name, _ in bad if s == split] for split in self.source.splits}
        return Prepared(before or manifest, unreadable, sum(map(len, wanted.values())), self.source.notes)

    def _manifest_before(self) -> shards.Manifest | None:
        """The manifest of this preparation, if it was finished earlier.

        Another preparation's manifest is removed.
        """
        where = storage.join(self.out, shards.MANIFEST)
        try:
            found = json.loads(storage.read_bytes(where))
        except FileNotFoundError:
            return None
        except ValueError:
            found = {}
        if found.get("made_by", {}).get("key") == self.preparation.key:
            return shards.read_manifest(self.out)
        storage.remove(where)
        return None

    def _finished(self, before: shards.Manifest | None) -> dict[str, dict[int, shuffle.Report]]:
        """The reports of the shards that exist and are whole, by split and number."""
        existing = set(storage.list_names(self.out))
        listed = [shard for found in before.splits.values() for shard in found] if before else []
        expected = {shard.file: shard for shard in listed}
        candidates = []
        for split in self.source.splits:
            numbers = range(self.preparation.shards(split))
            candidates += [(split, n) for n in numbers if shards.shard_file(split, n) in existing]
        files = [shards.shard_file(*candidate) for candidate in candidates]
        arguments = ((self.out, file, self.preparation.key, expected.get(file)) for file in files)
        reports = {split: {} for split in self.source.splits}
        with self.progress("checking finished shards", len(candidates)) as advance:
            for number, report in run_tasks(shuffle.describe_shard, arguments, self.parallel):
                split, shard = candidates[number]
                if report is not None:
                    reports[split][shard] = report
                advance(1)
        return reports

    def _begin(self, wanted: dict[str, list[int]]) -> dict[str, list[int]]:
        """The shards to write parts for: the wanted ones, or those of an earlier call with usable parts."""
        where = storage.join(self.parts, PLAN)
        try:
            earlier = json.loads(storage.read_bytes(where))
        except (FileNotFoundError, ValueError):
            earlier = {}
        if earlier.get("key") == self.preparation.key:
            planned = earlier["shards"]
            if all(set(wanted[split]) <= set(planned[split]) for split in wanted):
                return planned
        self._remove_parts()
        storage.write_bytes(where, json.dumps({"key": self.preparation.key, "shards": wanted}).encode())
        return wanted

    def _part_uris(self, split: str) -> list[str]:
        numbers = range(self.preparation.parts(split))
        return [storage.join(self.parts, f"{split}-{number:05d}.arrow") for number in numbers]

    def _write_parts(self, planned: dict[str, list[int]]) -> None:
        """Writes the parts that are missing."""
        existing, size = set(storage.list_names(self.parts)), shuffle.PART
        todo = []
        for split in planned:
            uris = self._part_uris(split) if planned[split] else []
            missing = [uri.rpartition("/")[2] not in existing for uri in uris]
            todo += [(split, number, uris[number]) for number in np.flatnonzero(missing).tolist()]
        total = sum(min(size, len(self.source.splits[split]) - number * size) for split, number, _ in todo)
        places = {split: _random_places(split, len(self.source.splits[split])) for split in planned}
        bad = []

        def parts():
            for split, number, uri in todo:
                found = self.source.splits[split]
                rows = np.arange(number * size, min((number + 1) * size, len(found)))
                images = found.images.take(rows)  # pickling a slice would send the whole table
                settings = self.preparation.settings
                yield (
                    shuffle.Part(images, found.reader, places[split][rows], planned[split], uri, settings),
                )

        with self.progress("reading images", total) as advance:
            for number, (done, found) in run_tasks(shuffle.write_part, parts(), self.parallel):
                advance(done)
                bad += [(todo[number][0], *entry) for entry in found]
                self._check_bad(bad)

    def _write_shards(
        self, planned: dict, wanted: dict[str, list[int]], reports: dict[str, dict[int, shuffle.Report]]
    ) -> None:
        """Writes the wanted shards from the parts, and adds their reports."""
        todo = [(split, number) for split in wanted for number in wanted[split]]
        uris = {split: self._part_uris(split) for split in wanted}

        def arguments():
            for split, number in todo:
                file, index = shards.shard_file(split, number), planned[split].index(number)
                yield self.out, file, index, uris[split], self.preparation.key

        with self.progress("writing shards", len(todo)) as advance:
            for done, report in run_tasks(shuffle.write_shard, arguments(), self.parallel):
                split, number = todo[done]
                reports[split][number] = report
                advance(1)

    def _check_bad(self, bad: list[tuple[str, str, str]]) -> None:
        """Stops a preparation with too many unreadable images."""
        images = self.preparation.images
        if len(bad) <= self.max_bad * images:
            return
        self._write_unreadable(bad)
        raise UserError(
            f"{len(bad)} of {images} images cannot be read, such as {bad[0][1]} ({bad[0][2]}); "
            f"allowed are --max-bad {100 * self.max_bad:g}%. They are listed in "
            f"{storage.join(self.out, UNREADABLE)}; repair or remove them, or allow more, and run the "
            "command again"
        )

    def _write_unreadable(self, bad: list[tuple[str, str, str]]) -> None:
        """Lists the unreadable images in a file, or removes that file if there are none."""
        where = storage.join(self.out, UNREADABLE)
        if not bad:
            storage.remove(where)
            return
        text = io.StringIO()
        csv.writer(text).writerows([("split", "name", "reason"), *bad])
        storage.write_bytes(where, text.getvalue().encode())

    def _clean(self, manifest: shards.Manifest) -> None:
        """Removes the parts, and the shards of an earlier, larger data set."""
        self._remove_parts()
        kept = {shard.file for found in manifest.splits.values() for shard in found}
        for name in storage.list_names(self.out):
            is_shard = name.endswith(".parquet") and name.rpartition("-")[0] in ("train", "test")
            if is_shard and name not in kept:
                storage.remove(storage.join(self.out, name))

    def _remove_parts(self) -> None:
        filesystem, path = storage.open_uri(self.parts)
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(path)


def _make_manifest(
    preparation: Preparation, out: str, reports: dict[str, list[shuffle.Report]], bad: list, command: str
) -> shards.Manifest:
    """The manifest of a finished preparation: `reports` are those of each split's shards, in order."""
    source, counts = preparation.source, {}
    for split, found in reports.items():
        total = Counter()
        for report in found:
            total.update(report.counts)
        counts[split] = [total[label] for label in range(len(source.classes))]
    duplicates = list(shuffle.duplicates(reports))
    names = [_test_name(out, *place) for place in duplicates[:NAMED]]
    made_by = {
        "command": command,
        "version": deit_ray.__version__,
        "opencv": cv2.__version__,
        "key": preparation.key,
        **asdict(preparation.settings),
    }
    return shards.make_manifest(
        source.classes,
        {split: [report.shard for report in found] for split, found in reports.items()},
        counts,
        made_by,
        source={"format": source.format, "fingerprint": source.fingerprint()},
        unreadable=dict(Counter(split for split, *_ in bad)),
        duplicates={"count": len(duplicates), "such as": names},
    )


def _test_name(out: str, number: int, row: int) -> str:
    """The name of the test image in a row of a shard."""
    filesystem, path = storage.open_uri(storage.join(out, shards.shard_file("test", number)))
    with filesystem.open_input_file(path) as file:
        return pq.read_table(file, columns=["name"])["name"][row].as_py()


def _random_places(split: str, count: int) -> np.ndarray:
    """Each image's place in the split's random order, int64 [count], in the source's order."""
    places = np.empty(count, np.int64)
    places[rng.permutation(ORDER_SEED, f"order of {split}", count)] = np.arange(count)
    return places
