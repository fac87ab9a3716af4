"""Checks a prepared data set: compares every shard with the manifest, and decodes every image."""

import hashlib
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from deit_ray import storage
from deit_ray.data import shards
from deit_ray.data.crop import decode
from deit_ray.data.prepare import CHROMA, QUALITY, SHORT_SIDE, TEST_SHORT_SIDE
from deit_ray.data.shuffle import earlier_settings
from deit_ray.data.tasks import run_tasks, workers
from deit_ray.terminal.format import counted
from deit_ray.terminal.progress import ShowProgress, silent

DEFAULTS = {
    "short_side": SHORT_SIDE,
    "quality": QUALITY,
    "chroma": CHROMA,
    "test_short_side": TEST_SHORT_SIDE,
}


@dataclass(frozen=True)
class Checked:
    """The result of a check.

    Attributes:
        uri: the data set's folder, as it was given.
        images: number of images read.
        problems: one line each.
        shards: files of the damaged shards.
        made_by: from the manifest: command, version and settings of the preparation.
    """

    uri: str
    images: int
    problems: list[str]
    shards: list[str]
    made_by: dict

    def verdict(self) -> str:
        """The result in words, with the command that repairs the data set."""
        if not self.problems:
            images = counted(self.images, "image")
            return f"whole: {images}, all checksums, counts and labels as the manifest says"
        found = counted(len(self.problems), "problem")
        if not self.shards:
            cure = "prepare the data into another folder, or remove this one first"
            return f"{found}, but no shard is damaged: {cure}"
        damaged = counted(len(self.shards), "shard")
        return (
            f"{found} in {damaged}. To repair, remove the files that you do not trust and run the same "
            f"preparation again, which makes only the missing and damaged shards:\n  {self._command()}"
        )

    def _command(self) -> str:
        """The command that prepared the data set, with the folder where it is now: people copy data sets."""
        words = shlex.split(self.made_by.get("command", ""))
        for place, word in enumerate(words):
            if word == "--out" and words[place + 1 :]:
                words[place + 1] = self.uri
            elif word.startswith("--out="):
                words[place] = f"--out={self.uri}"
        if words:
            return shlex.join(words + self._settings(words))
        return f"deit-ray data prepare SOURCE --out {self.uri}, with the same source and settings as before"

    def _settings(self, words: list[str]) -> list[str]:
        """Options for the settings that the command does not name and that are not today's defaults."""
        if "short_side" not in self.made_by:
            return []
        recorded = earlier_settings(self.made_by["short_side"]) | self.made_by
        options = []
        for key, default in DEFAULTS.items():
            option = f"--{key.replace('_', '-')}"
            if recorded[key] != default and not any(word.split("=")[0] == option for word in words):
                options += [option, str(recorded[key])]
        return options


def check(
    uri: str,
    address: str | None = None,
    progress: ShowProgress = silent,
    warn: Callable[[str], None] = lambda text: None,
    verbose: bool = False,
) -> Checked:
    """Reads and decodes all images: in parallel over Ray, or in this process if there are few.

    Args:
        uri: the data set's URI.
        address, warn, verbose: see `tasks.workers`.
        progress: shows how many shards are done.

    Raises:
        UserError: there is no prepared data set.
    """
    given, uri, manifest = uri, storage.absolute(uri), shards.read_manifest(uri)
    listed = [(split, shard) for split, of_split in manifest.splits.items() for shard in of_split]
    problems, damaged, images = {}, set(), 0
    counts = {split: Counter() for split in manifest.splits}
    rows = sum(shard.rows for _, shard in listed)
    with workers(rows, {"URI": uri}, address, warn, verbose) as parallel:
        arguments = ((uri, shard, len(manifest.classes)) for _, shard in listed)
        with progress("checking shards", len(listed)) as advance:
            for number, (decoded, labels, wrong) in run_tasks(check_shard, arguments, parallel):
                split, shard = listed[number]
                images += decoded
                counts[split].update(labels)
                if wrong:
                    problems[number] = [f"{shard.file}: {text}" for text in wrong]
                    damaged.add(shard.file)
                advance(1)
    lines = [line for number in sorted(problems) for line in problems[number]]
    for split in manifest.class_counts:
        if not any(shard.file in damaged for shard in manifest.splits[split]):
            lines += _wrong_counts(split, manifest, counts[split])
    return Checked(given, images, lines, sorted(damaged), manifest.made_by)


def _wrong_counts(split: str, manifest: shards.Manifest, counts: Counter) -> list[str]:
    """Names the first class, if any, whose number of images differs from the manifest's."""
    for label, expected in enumerate(manifest.class_counts[split]):
        if counts[label] != expected:
            name = manifest.classes[label]
            return [f"{split}: has {counts[label]} images of {name}, the manifest says {expected}"]
    return []


def check_shard(uri: str, shard: shards.Shard, classes: int) -> tuple[int, dict[int, int], list[str]]:
    """Checks one shard.

    Returns:
        (number of images read, number of images by label, problems in words).
    """
    try:
        content = storage.read_bytes(storage.join(uri, shard.file))
    except FileNotFoundError:
        return 0, {}, ["is missing"]
    except OSError as error:
        return 0, {}, [f"cannot be read: {error}"]
    wrong = []
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        wrong.append(
            f"its checksum is not the manifest's ({len(content)} bytes, the manifest says {shard.bytes})"
        )
    decoded, labels = 0, Counter()
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        if shards.group_rows(file) != shard.row_groups:
            found = f"{file.metadata.num_rows} images in {file.num_row_groups} row groups"
            wrong.append(f"holds {found}, the manifest says {shard.rows} in {len(shard.row_groups)}")
        for group in range(file.num_row_groups):
            for row in file.read_row_group(group, columns=["image", "label", "name"]).to_pylist():
                labels[row["label"]] += 1
                if not 0 <= row["label"] < classes:
                    wrong.append(f"{row['name']}: label {row['label']} is not in 0 to {classes - 1}")
                if decode(row["image"]) is None:
                    wrong.append(f"{row['name']}: cannot be decoded")
                decoded += 1
    except (OSError, pa.ArrowException) as error:
        wrong.append(f"is not a whole Parquet file: {error}")
    return decoded, dict(labels), wrong
