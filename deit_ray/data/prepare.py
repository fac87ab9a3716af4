"""Prepares a source as shards: RGB JPEGs of a bounded size, in random order over the whole data set.

A preparation runs the tasks of shuffle.py. Its folder is its progress: a preparation that is run again, after
an interruption or after damage, keeps the whole shards. The manifest is written last, so a folder without a
manifest is unfinished.
"""

import csv
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import pyarrow.parquet as pq

import deit_ray
from deit_ray import rng, storage
from deit_ray.data import decode, shards, shuffle, sources
from deit_ray.data.claim import check_unclaimed, claimed
from deit_ray.data.listing import Source, printable
from deit_ray.data.target import UNREADABLE, Target, check_apart, check_files_apart, describe
from deit_ray.data.tasks import run_tasks, workers
from deit_ray.errors import UserError
from deit_ray.terminal.format import counted
from deit_ray.terminal.progress import ShowProgress, silent

SHORT_SIDE = 256  # pixels
QUALITY = 92
CHROMA = "420"
TEST_SHORT_SIDE = 0  # the original bytes
MAX_BAD = 0.001
ORDER_SEED = 0
NAMED = 20  # number of duplicates that the manifest names
FEW = 5  # images; a class with fewer is reported
CLASSES_NAMED = 10  # in a note


@dataclass(frozen=True)
class Prepared:
    """The result of a preparation.

    Attributes:
        manifest: the data set's manifest.
        unreadable: names of the images that could not be read, by split.
        written: number of shards that this call wrote; the others were there already.
        notes: assumptions about the source that a person should know, and what of it is not used.
        recognised: what was recognised in the source, a line each.
    """

    manifest: shards.Manifest
    unreadable: dict[str, list[str]]
    written: int
    notes: list[str]
    recognised: list[str]


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
            **self.settings.named(),
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
    image: str | None = None,
    exif: bool = False,
    max_bad: float = MAX_BAD,
    address: str | None = None,
    progress: ShowProgress = silent,
    warn: Callable[[str], None] = lambda text: None,
    verbose: bool = False,
    shard_images: int = shards.SHARD,
    chroma: str = CHROMA,
    test_short_side: int = TEST_SHORT_SIDE,
) -> Prepared:
    """Writes the shards and the manifest of a source. A repeated call only makes what is missing or damaged.

    Args:
        source: `digits`, or a folder, file or URI; see `sources.open_source`.
        out: URI of the folder to write: empty, or one that this function wrote. A data set of another
            source or other settings is replaced.
        short_side: images with a longer short side are scaled down to it. 0 keeps sizes, and keeps JPEGs
            unchanged.
        quality, chroma: see `images.convert`.
        command: the command line, recorded in the manifest.
        format: the source's format; by default it is recognised.
        labels: a file with the labels of ILSVRC2012's validation images, instead of the devkit's.
        image: of WebDataset samples with several images, the one to use, such as jpg or input.jpg.
        exif: whether to apply the rotation in EXIF; timm's loader does not.
        max_bad: fraction of the images that may be unreadable; with more the preparation stops.
        address: address of a Ray cluster. Without one, a few thousand images are prepared in this process,
            and more on a local Ray that this call starts.
        progress: shows how far the preparation is.
        warn: called with what the person should know before the end, such as what is replaced.
        verbose: see `tasks.workers`.
        shard_images: images in a shard.
        test_short_side: `short_side` of the test images.

    Raises:
        UserError: the source, or too many of its images, cannot be read; or `out` holds files of others,
            overlaps with the source, cannot be written, or is written by another preparation.
    """
    places = _check_places(source, out)
    out = storage.absolute(out)
    check_unclaimed(out)
    Target(out)  # before a long look at the source
    opened = sources.open_source(source, format, labels, image)
    check_files_apart(opened.files(), out)
    preparation = Preparation(
        opened, shuffle.Settings(short_side, quality, exif, shard_images, chroma, test_short_side)
    )
    with (
        claimed(out) as check_claim,
        workers(preparation.images, places, address, warn, verbose) as parallel,
    ):
        target = Target(out)
        if target.manifest and target.manifest.made_by.get("key") != preparation.key:
            warn(_replaced(out, target.manifest, opened.fingerprint()))
        return _Folder(preparation, target, check_claim, max_bad, parallel, progress).write(source, command)


def _replaced(out: str, manifest: shards.Manifest, source: str) -> str:
    """Says which data set a preparation of another source, or with other settings, replaces."""
    images = ", ".join(f"{manifest.rows(split)} {split}" for split in manifest.splits)
    is_same = manifest.source.get("fingerprint") == source
    other = "data set of the same source with other settings" if is_same else "data set of another source"
    command = manifest.made_by.get("command")
    made_by = f"; it was made by: {command}" if command else ""
    return (
        f"--out {out}: holds a {other} ({images} images), which is replaced once all images are read{made_by}"
    )


def _check_places(source: str, out: str) -> dict[str, str]:
    """What is read and written, by the names of the arguments.

    Raises:
        UserError: a path is not UTF-8, or both overlap.
    """
    _check_unicode("SOURCE", source)
    _check_unicode("--out", out)
    if source == sources.DIGITS:
        return {"--out": out}
    check_apart(storage.absolute(source), storage.absolute(out))
    return {"--out": out, "SOURCE": source}


def _check_unicode(name: str, path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} {printable(path)}: a path in UTF-8 is needed; rename the folder") from None


class _Folder:
    """The folder that a preparation writes.

    Args:
        check_claim: raises if another preparation may write the folder by now.
    """

    def __init__(
        self,
        preparation: Preparation,
        target: Target,
        check_claim: Callable[[], None],
        max_bad: float,
        parallel: bool,
        progress: ShowProgress,
    ):
        self.preparation, self.source = preparation, preparation.source
        self.target, self.out, self.parts = target, target.out, target.parts
        self.check_claim, self.max_bad, self.parallel, self.progress = (
            check_claim,
            max_bad,
            parallel,
            progress,
        )

    def write(self, source: str, command: str) -> Prepared:
        """Writes what is missing or damaged."""
        before = self.target.manifest
        if before and before.made_by.get("key") != self.preparation.key:
            before = None
        reports = self._finished(before)
        wanted = {
            split: [n for n in range(self.preparation.shards(split)) if n not in reports[split]]
            for split in self.source.splits
        }
        remarks = before.remarks if before else {}
        if any(wanted.values()):
            remarks = self._write_missing(wanted, reports, before)
        in_order = {split: [found[n] for n in sorted(found)] for split, found in reports.items()}
        bad = []
        for split, found in in_order.items():
            bad += [(split, *entry) for report in found for entry in report.bad]
        self._check_bad(bad, self.preparation.images)
        for split, found in in_order.items():
            if not any(report.counts for report in found):
                raise UserError(f"{source}: holds no readable image for {split}")
        manifest = _make_manifest(self.preparation, self.out, in_order, bad, command, remarks)
        if before and before.fingerprint != manifest.fingerprint:
            raise UserError(
                f"{self.out}: the repaired shards differ from the manifest: it was made with OpenCV "
                f"{before.made_by['opencv']} (this is {cv2.__version__}), or images of the source have "
                f"changed since; prepare the data into another --out, or remove that folder first"
            )
        self.check_claim()
        self._write_unreadable(bad)
        if not before:
            where = storage.join(self.out, shards.MANIFEST)
            storage.write_bytes(where, manifest.to_json().encode())
        self._clean(manifest)
        unreadable = {split: [name for s, name, _ in bad if s == split] for split in self.source.splits}
        manifest = before or manifest
        rotation = "applied" if manifest.exif else "not applied, as in timm (--exif applies it)"
        remarks = decode.describe_remarks(manifest.remarks, rotation)
        notes = [*self.source.notes, *self.target.notes, *remarks, *_class_notes(manifest)]
        written = sum(map(len, wanted.values()))
        return Prepared(manifest, unreadable, written, notes, self.source.recognised)

    def _write_missing(self, wanted: dict[str, list[int]], reports: dict, before) -> dict[str, list]:
        """Writes the wanted shards, and adds their reports.

        An earlier data set stays until all images are read.

        Args:
            before: the manifest of this preparation, if it was finished earlier; its shards are repaired.

        Returns:
            the remarks about all images; see `Manifest`.
        """
        files = [shards.shard_file(split, number) for split in wanted for number in wanted[split]]
        is_repair = before is not None
        self.target.check_free(files, damaged_too=is_repair)
        self.target.check_free([UNREADABLE], damaged_too=False)
        planned = self._begin(wanted)
        self._write_parts(planned)
        self.check_claim()
        self.target.check_free(files, damaged_too=is_repair)
        if is_repair:
            self.target.set_aside(files)
        elif self.target.manifest:
            self.target.remove_manifest()
        self._write_shards(planned, wanted, reports)
        if is_repair:
            return before.remarks
        return shuffle.read_remarks([uri for s in planned if planned[s] for uri in self._part_uris(s)])

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
        """The shards to write parts for: the wanted ones, or those of an earlier call with usable parts.

        The plan lists the files of an earlier data set too: without its manifest, they are ours by the plan.
        """
        earlier, key = self.target.plan, self.preparation.key
        planned = wanted
        if earlier.get("key") == key and all(set(wanted[s]) <= set(earlier["shards"][s]) for s in wanted):
            planned = earlier["shards"]
        else:
            self.target.remove_part_files()
        replaced = sorted(self.target.keys - {key})
        self.target.write_plan(
            {"key": key, "shards": planned, "files": self.target.listed, "replaces": replaced}
        )
        return planned

    def _part_uris(self, split: str) -> list[str]:
        numbers = range(self.preparation.parts(split))
        return [storage.join(self.parts, f"{split}-{number:05d}.arrow") for number in numbers]

    def _write_parts(self, planned: dict[str, list[int]]) -> None:
        """Writes the parts that are missing."""
        existing, size = set(self.target.check_parts()), shuffle.PART
        todo = []
        for split in planned:
            uris = self._part_uris(split) if planned[split] else []
            missing = [uri.rpartition("/")[2] not in existing for uri in uris]
            todo += [(split, number, uris[number]) for number in np.flatnonzero(missing).tolist()]
        total = sum(min(size, len(self.source.splits[split]) - number * size) for split, number, _ in todo)
        places = {split: _random_places(split, len(self.source.splits[split])) for split in planned}
        bad, read = [], self.preparation.images - total

        def parts():
            for split, number, uri in todo:
                found = self.source.splits[split]
                rows = np.arange(number * size, min((number + 1) * size, len(found)))
                images = found.images.take(rows)  # pickling a slice would send the whole table
                settings = self.preparation.settings.of(split)
                yield (
                    shuffle.Part(images, found.reader, places[split][rows], planned[split], uri, settings),
                )

        with self.progress("reading images", total) as advance:
            for number, (done, found) in run_tasks(shuffle.write_part, parts(), self.parallel):
                advance(done)
                read += done
                bad += [(todo[number][0], *entry) for entry in found]
                self._check_bad(bad, read)

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

    def _check_bad(self, bad: list[tuple[str, str, str]], read: int) -> None:
        """Stops a preparation with too many unreadable images, of so many that were read."""
        images = self.preparation.images
        if len(bad) <= self.max_bad * images:
            return
        self._write_unreadable(bad)
        needed = math.ceil(1000 * len(bad) / images) / 10  # percent
        more = "" if read == images else f" or more, since only {read} images were read"
        raise UserError(
            f"{len(bad)} of {counted(images, 'image')} cannot be read, such as {bad[0][1]} ({bad[0][2]}); "
            f"allowed are --max-bad {100 * self.max_bad:g}%. They are listed in "
            f"{storage.join(self.out, UNREADABLE)}; repair or remove them, or allow them with "
            f"--max-bad {needed:g}%{more}, and run the command again"
        )

    def _write_unreadable(self, bad: list[tuple[str, str, str]]) -> None:
        """Lists the unreadable images in a file, or removes that file if there are none."""
        if bad:
            self.target.write(UNREADABLE, _unreadable_csv(bad))
        else:
            self.target.remove(UNREADABLE)

    def _clean(self, manifest: shards.Manifest) -> None:
        """Removes the parts, and our files of an earlier data set."""
        kept = {shard.file for found in manifest.splits.values() for shard in found}
        self.target.remove_others({*kept, *manifest.files})
        self.target.remove_parts()


def _unreadable_csv(bad: list[tuple[str, str, str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([("split", "name", "reason"), *bad])
    return text.getvalue().encode()


def _class_notes(manifest: shards.Manifest) -> list[str]:
    """What a person should know about the sizes of the classes."""
    notes = []
    counts = {split: np.array(found) for split, found in manifest.class_counts.items()}
    total = sum(counts.values())

    def note(chosen: np.ndarray, what: str) -> None:
        if numbers := np.flatnonzero(chosen).tolist():
            named = ", ".join(printable(manifest.classes[number]) for number in numbers[:CLASSES_NAMED])
            more = f" and {len(numbers) - CLASSES_NAMED} more" if len(numbers) > CLASSES_NAMED else ""
            subject = "1 class has" if len(numbers) == 1 else f"{len(numbers)} classes have"
            notes.append(f"{subject} {what}: {named}{more}")

    note(total == 0, "no images")
    for split, found in counts.items():
        note((found == 0) & (total > 0), f"no {split} images")
    note((total > 0) & (total < FEW), f"fewer than {FEW} images")
    return notes


def _make_manifest(
    preparation: Preparation,
    out: str,
    reports: dict[str, list[shuffle.Report]],
    bad: list,
    command: str,
    remarks: dict[str, list],
) -> shards.Manifest:
    """The manifest of a finished preparation.

    Args:
        reports: those of each split's shards, in order.
        remarks: see `Manifest`.
    """
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
        **preparation.settings.named(),
    }
    return shards.make_manifest(
        source.classes,
        {split: [report.shard for report in found] for split, found in reports.items()},
        counts,
        made_by,
        source={"format": source.format, "fingerprint": source.fingerprint()},
        unreadable=dict(Counter(split for split, *_ in bad)),
        duplicates={
            "count": len(duplicates),
            "such as": names,
            "other class": shuffle.contradictions(reports),
        },
        files={UNREADABLE: list(describe(_unreadable_csv(bad)))} if bad else {},
        remarks=remarks,
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
