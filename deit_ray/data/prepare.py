"""From a source to shards: images become RGB JPEG of a bounded size, in random order over the whole data set.

A preparation is a plan of tasks (shuffle.py), and the folder says how far it has come: shards that are there and whole are
not done again, after an interruption as after damage. Until the manifest is written, last, the folder is unfinished.
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
from deit_ray.terminal.progress import Stage, silent

SHORT_SIDE = 256  # pixels
QUALITY = 92
MAX_BAD = 0.001
ORDER_SEED = 0
PARTS, PLAN = ".parts", "plan.json"  # the folder of what is only needed until all shards are there
UNREADABLE = "unreadable.csv"
NAMED = 20  # duplicates that the manifest names


@dataclass(frozen=True)
class Prepared:
    """What was made.

    Attributes:
        unreadable: names of the images that could not be read, by split.
        written: shards that this call wrote; the others were there and whole.
        notes: what a person should know of how the source was understood.
    """

    manifest: shards.Manifest
    unreadable: dict[str, list[str]]
    written: int
    notes: list[str]


@dataclass(frozen=True)
class Plan:
    """A preparation: what follows from the source and the settings alone."""

    source: Source
    settings: shuffle.Settings

    @cached_property
    def key(self) -> str:
        """What makes two preparations the same."""
        given = {
            "source": self.source.fingerprint(),
            "seed": ORDER_SEED,
            "format": shards.FORMAT,
            **asdict(self.settings),
        }
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]

    def shards(self, split: str) -> int:
        return -(-len(self.source.splits[split]) // self.settings.shard_images)

    def parts(self, split: str) -> int:
        return -(-len(self.source.splits[split]) // shuffle.PART)


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
    progress: Stage = silent,
    warn: Callable[[str], None] = lambda text: None,
    verbose: bool = False,
    shard_images: int = shards.SHARD,
) -> Prepared:
    """Writes the shards and the manifest of a source; called again, it does what is missing or damaged.

    Args:
        source: `digits`, or a folder, file or URI that `sources.open_source` knows.
        out: URI of the folder to write; a data set of another source or other settings is replaced.
        short_side: images with a longer short side are scaled down to it; 0 keeps sizes, and JPEGs as they are.
        quality: of the JPEGs.
        command: recorded in the manifest.
        format: of the source, where it is not recognised.
        labels: a file with the labels of ILSVRC2012's validation images, instead of the devkit's.
        exif: whether the rotation that EXIF asks for is applied; timm's loader does not.
        max_bad: the part of the images that may be unreadable; more stop it.
        address: of a Ray cluster. Without, a few thousand images are prepared in this process, more on a Ray of its own.
        progress: shows how far it is.
        warn, verbose: what becomes of Ray's output.
        shard_images: images in a shard.

    Raises:
        UserError: the source cannot be read, or too much of it; or there is nothing in it.
    """
    out = storage.absolute(out)
    opened = sources.open_source(source, format, labels)
    plan = Plan(opened, shuffle.Settings(short_side, quality, exif, shard_images))
    images = sum(map(len, opened.splits.values()))
    places = {"--out": out} | ({"SOURCE": source} if source != sources.DIGITS else {})
    with workers(images, places, address, warn, verbose) as parallel:
        return _Preparation(plan, out, max_bad, parallel, progress).run(source, command)


class _Preparation:
    """A plan at work in a folder."""

    def __init__(self, plan: Plan, out: str, max_bad: float, parallel: bool, progress: Stage):
        self.plan, self.out, self.max_bad, self.parallel, self.progress = (
            plan,
            out,
            max_bad,
            parallel,
            progress,
        )
        self.source, self.parts = plan.source, storage.join(out, PARTS)
        self.images = sum(map(len, self.source.splits.values()))

    def run(self, source: str, command: str) -> Prepared:
        before = self._manifest_before()
        reports = self._finished(before)
        wanted = {
            split: [n for n in range(self.plan.shards(split)) if n not in reports[split]]
            for split in self.source.splits
        }
        if any(wanted.values()):
            planned = self._begin(wanted)
            self._write_parts(planned)
            self._write_shards(planned, wanted, reports)
        in_order = {split: [found[n] for n in sorted(found)] for split, found in reports.items()}
        bad = [
            (split, *entry) for split, found in in_order.items() for report in found for entry in report.bad
        ]
        self._check_bad(bad)
        for split, found in in_order.items():
            if not any(report.counts for report in found):
                raise UserError(f"{source}: holds no readable image for {split}")
        manifest = self._manifest(in_order, bad, command)
        if before and before.fingerprint != manifest.fingerprint:
            raise UserError(
                f"{self.out}: what was redone differs from what the manifest says: it was made with OpenCV {before.made_by['opencv']}, "
                f"this is {cv2.__version__}, or images of the source have changed since; remove {shards.MANIFEST} there and prepare it anew"
            )
        self._write_unreadable(bad)
        storage.write_bytes(storage.join(self.out, shards.MANIFEST), (before or manifest).to_json().encode())
        self._clean(manifest)
        unreadable = {split: [name for s, name, _ in bad if s == split] for split in self.source.splits}
        return Prepared(before or manifest, unreadable, sum(map(len, wanted.values())), self.source.notes)

    def _manifest_before(self) -> shards.Manifest | None:
        """The manifest of the same preparation, finished earlier; one of another goes, since its data set does."""
        where = storage.join(self.out, shards.MANIFEST)
        try:
            found = json.loads(storage.read_bytes(where))
        except FileNotFoundError:
            return None
        except ValueError:
            found = {}
        if found.get("made_by", {}).get("key") == self.plan.key:
            return shards.read_manifest(self.out)
        storage.remove(where)
        return None

    def _finished(self, before: shards.Manifest | None) -> dict[str, dict[int, shuffle.Report]]:
        """The reports of the shards that are there and whole, by split and number."""
        there = set(storage.list_names(self.out))
        expected = (
            {shard.file: shard for found in before.splits.values() for shard in found} if before else {}
        )
        candidates = [(split, number) for split in self.source.splits for number in range(self.plan.shards(split))
                      if shards.shard_file(split, number) in there]  # fmt: skip
        reports = {split: {} for split in self.source.splits}
        arguments = (
            (self.out, file, self.plan.key, expected.get(file))
            for file in (shards.shard_file(*c) for c in candidates)
        )
        with self.progress("checking finished shards", len(candidates)) as step:
            for number, report in run_tasks(shuffle.describe_shard, arguments, self.parallel):
                split, shard = candidates[number]
                if report is not None:
                    reports[split][shard] = report
                step(1)
        return reports

    def _begin(self, wanted: dict[str, list[int]]) -> dict[str, list[int]]:
        """The shards that the parts are made for: of an earlier call, where its parts serve, else the wanted ones."""
        where = storage.join(self.parts, PLAN)
        try:
            earlier = json.loads(storage.read_bytes(where))
        except (FileNotFoundError, ValueError):
            earlier = {}
        if earlier.get("key") == self.plan.key and all(
            set(wanted[split]) <= set(earlier["shards"][split]) for split in wanted
        ):
            return earlier["shards"]
        self._remove_parts()
        storage.write_bytes(where, json.dumps({"key": self.plan.key, "shards": wanted}).encode())
        return wanted

    def _part_uris(self, split: str) -> list[str]:
        return [
            storage.join(self.parts, f"{split}-{number:05d}.arrow")
            for number in range(self.plan.parts(split))
        ]

    def _write_parts(self, planned: dict[str, list[int]]) -> None:
        there, size = set(storage.list_names(self.parts)), shuffle.PART
        todo = [(split, number, uri) for split in planned if planned[split] for number, uri in enumerate(self._part_uris(split))
                if uri.rpartition("/")[2] not in there]  # fmt: skip
        total = sum(min(size, len(self.source.splits[split]) - number * size) for split, number, _ in todo)
        places, bad = {split: self._places(split) for split in planned}, []

        def parts():
            for split, number, uri in todo:
                found = self.source.splits[split]
                stretch = np.arange(number * size, min((number + 1) * size, len(found)))
                images = found.images.take(stretch)  # a slice would travel with the whole
                yield (
                    shuffle.Part(
                        images, found.reader, places[split][stretch], planned[split], uri, self.plan.settings
                    ),
                )

        with self.progress("reading images", total) as step:
            for number, (done, found) in run_tasks(shuffle.write_part, parts(), self.parallel):
                step(done)
                bad += [(todo[number][0], *entry) for entry in found]
                self._check_bad(bad)

    def _places(self, split: str) -> np.ndarray:
        """Of each image, in the source's order, its place in the split's random order."""
        count = len(self.source.splits[split])
        places = np.empty(count, np.int64)
        places[rng.permutation(ORDER_SEED, f"order of {split}", count)] = np.arange(count)
        return places

    def _write_shards(
        self, planned: dict, wanted: dict[str, list[int]], reports: dict[str, dict[int, shuffle.Report]]
    ) -> None:
        todo = [(split, number) for split in wanted for number in wanted[split]]
        uris = {split: self._part_uris(split) for split in wanted}
        arguments = (
            (
                self.out,
                shards.shard_file(split, number),
                planned[split].index(number),
                uris[split],
                self.plan.key,
            )
            for split, number in todo
        )
        with self.progress("writing shards", len(todo)) as step:
            for done, report in run_tasks(shuffle.write_shard, arguments, self.parallel):
                split, number = todo[done]
                reports[split][number] = report
                step(1)

    def _check_bad(self, bad: list[tuple[str, str, str]]) -> None:
        if len(bad) <= self.max_bad * self.images:
            return
        self._write_unreadable(bad)
        raise UserError(
            f"{len(bad)} of {self.images} images cannot be read, such as {bad[0][1]} ({bad[0][2]}); "
            f"allowed are --max-bad {100 * self.max_bad:g}%. They are listed in {storage.join(self.out, UNREADABLE)}; "
            "mend or remove them, or allow more, and run the command again"
        )

    def _write_unreadable(self, bad: list[tuple[str, str, str]]) -> None:
        text = io.StringIO()
        csv.writer(text).writerows([("split", "name", "reason"), *bad])
        where = storage.join(self.out, UNREADABLE)
        storage.write_bytes(where, text.getvalue().encode()) if bad else storage.remove(where)

    def _manifest(self, reports: dict[str, list[shuffle.Report]], bad: list, command: str) -> shards.Manifest:
        counts = {}
        for split, found in reports.items():
            total = Counter()
            for report in found:
                total.update(report.counts)
            counts[split] = [total[label] for label in range(len(self.source.classes))]
        twice = list(shuffle.duplicates(reports))
        made_by = {"command": command, "version": deit_ray.__version__, "opencv": cv2.__version__, "key": self.plan.key,
                   **asdict(self.plan.settings)}  # fmt: skip
        return shards.make_manifest(
            self.source.classes,
            {split: [report.shard for report in found] for split, found in reports.items()},
            counts,
            made_by,
            source={"format": self.source.format, "fingerprint": self.source.fingerprint()},
            unreadable=dict(Counter(split for split, *_ in bad)),
            duplicates={"count": len(twice), "such as": [self._name(*place) for place in twice[:NAMED]]},
        )

    def _name(self, number: int, row: int) -> str:
        """The name of a test image."""
        filesystem, path = storage.open_uri(storage.join(self.out, shards.shard_file("test", number)))
        with filesystem.open_input_file(path) as file:
            return pq.read_table(file, columns=["name"])["name"][row].as_py()

    def _clean(self, manifest: shards.Manifest) -> None:
        """Removes the parts, and shards of an earlier data set that had more of them."""
        self._remove_parts()
        mine = {shard.file for found in manifest.splits.values() for shard in found}
        for name in storage.list_names(self.out):
            if (
                name.endswith(".parquet")
                and name.rpartition("-")[0] in ("train", "test")
                and name not in mine
            ):
                storage.remove(storage.join(self.out, name))

    def _remove_parts(self) -> None:
        filesystem, path = storage.open_uri(self.parts)
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(path)
