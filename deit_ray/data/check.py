"""Whether a prepared data set can be trusted: every shard against the manifest, every image decoded."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from deit_ray import storage
from deit_ray.data import shards
from deit_ray.data.crop import decode
from deit_ray.data.tasks import run_tasks, workers
from deit_ray.terminal.progress import Stage, silent


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        images: that were decoded.
        problems: a line each.
        shards: that would have to be made again.
    """

    images: int
    problems: list[str]
    shards: list[str]
    made_by: dict

    def verdict(self) -> str:
        """In words, with how to repair."""
        if not self.problems:
            return f"whole: {self.images} images, all checksums, counts and labels as the manifest says"
        found = f"{len(self.problems)} problem{'s' * (len(self.problems) != 1)}"
        if not self.shards:
            return f"{found}, and no shard is to blame: remove {shards.MANIFEST} there and prepare the data again"
        again = (
            self.made_by.get("command")
            or "deit-ray data prepare SOURCE --out URI, with the source and settings it was made with"
        )
        return (
            f"{found} in {len(self.shards)} shard{'s' * (len(self.shards) != 1)}. To repair, remove what cannot be trusted and "
            f"run the same preparation again, which makes only what is missing or damaged:\n  {again}"
        )


def check(
    uri: str,
    address: str | None = None,
    progress: Stage = silent,
    warn: Callable[[str], None] = lambda text: None,
    verbose: bool = False,
) -> Checked:
    """Reads and decodes everything, in parallel; a small data set in this process.

    Raises:
        UserError: there is no prepared data set.
    """
    uri, manifest = storage.absolute(uri), shards.read_manifest(uri)
    found = [(split, shard) for split, of_split in manifest.splits.items() for shard in of_split]
    problems, damaged, images, counts = {}, set(), 0, {split: Counter() for split in manifest.splits}
    rows = sum(shard.rows for _, shard in found)
    with workers(rows, {"URI": uri}, address, warn, verbose) as parallel:
        arguments = ((uri, shard, len(manifest.classes)) for _, shard in found)
        with progress("checking shards", len(found)) as step:
            for number, (decoded, labels, wrong) in run_tasks(check_shard, arguments, parallel):
                split, shard = found[number]
                images += decoded
                counts[split].update(labels)
                if wrong:
                    problems[number] = [f"{shard.file}: {text}" for text in wrong]
                    damaged.add(shard.file)
                step(1)
    lines = [line for number in sorted(problems) for line in problems[number]]
    for split, expected in manifest.class_counts.items():
        have = [counts[split][label] for label in range(len(manifest.classes))]
        if have != expected and not any(shard.file in damaged for shard in manifest.splits[split]):
            label = next(label for label, (a, b) in enumerate(zip(have, expected, strict=True)) if a != b)
            lines.append(
                f"{split}: has {have[label]} images of {manifest.classes[label]}, the manifest says {expected[label]}"
            )
    return Checked(images, lines, sorted(damaged), manifest.made_by)


def check_shard(uri: str, shard: shards.Shard, classes: int) -> tuple[int, dict[int, int], list[str]]:
    """(images decoded, images of each label, what is wrong) of a shard."""
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
            wrong.append(f"holds {file.metadata.num_rows} images in {file.num_row_groups} row groups, the manifest says "
                         f"{shard.rows} in {len(shard.row_groups)}")  # fmt: skip
        for group in range(file.num_row_groups):
            for row in file.read_row_group(group, columns=["image", "label", "name"]).to_pylist():
                labels[row["label"]] += 1
                if not 0 <= row["label"] < classes:
                    wrong.append(f"{row['name']}: label {row['label']} is not in 0 to {classes - 1}")
                if decode(row["image"]) is None:
                    wrong.append(f"{row['name']}: cannot be decoded")
                decoded += 1
    except (OSError, pa.ArrowException) as error:
        wrong.append(f"is no whole Parquet file: {error}")
    return decoded, dict(labels), wrong
