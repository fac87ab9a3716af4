"""What must become of an input: it is prepared with the right pixels and labels, refused, or noted."""

import io
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from scipy.optimize import linear_sum_assignment

from bench.faulty.stage import Seen, Stage

BOUND = 6.0  # grey levels: mean absolute difference of 16x16 thumbnails that JPEG of quality 92 may cause
THUMBNAIL = 16
ASPECT = 1.15  # largest ratio of two aspects that count as equal


@dataclass(frozen=True)
class Sample:
    """An image as `PIL.Image.open(f).convert("RGB")` gives it, uint8 [height, width, 3], and its class.

    `pixels` is None where any pixels are right, such as for an image that is cut.
    """

    pixels: np.ndarray | None
    label: str


class Expected(ABC):
    """Base of all expectations."""

    @abstractmethod
    def fault(self, seen: Seen, stage: Stage) -> str | None:
        """What is wrong, in words; None if nothing is."""


@dataclass(frozen=True)
class Refused(Expected):
    """An exit status that is no success, and one line `error: ...` that holds each word (patterns).

    `never` must not be in the output.
    """

    words: tuple[str, ...]
    never: tuple[str, ...] = ()

    def fault(self, seen: Seen, stage: Stage) -> str | None:
        wanted = f"expected a refusal that names {shown(self.words)}"
        if seen.status is None:
            return f"it was ended before it reported the mistake; {wanted}" if seen.ended == "time" else None
        if seen.status == 0:
            return f"exit status 0 ({tail(seen)}); {wanted}"
        if seen.status < 0 or seen.status > 128:
            return f"exit status {seen.status}; {wanted}"
        lines = seen.text.splitlines()
        first = next((i for i, line in enumerate(lines) if re.match(r"(error|refused)\b", line)), None)
        if first is None:
            return f"exit status {seen.status} without an error line ({tail(seen)}); {wanted}"
        error = " ".join(lines[first:])
        if missing := [word for word in self.words if not re.search(word, error, re.I)]:
            return f"the refusal does not say {shown(missing)}: {error[:260]}"
        if wrong := [word for word in self.never if re.search(word, seen.text, re.I)]:
            return f"the refusal says {shown(wrong)}: {error[:260]}"
        return None


@dataclass(frozen=True)
class Printed(Expected):
    """Exit status `status`, output that holds each word (patterns) and none of `never`."""

    words: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    status: int = 0

    def fault(self, seen: Seen, stage: Stage) -> str | None:
        if seen.status is None:
            return None  # counted as late
        if seen.status != self.status:
            return f"exit status {seen.status} ({tail(seen)}), expected {self.status}"
        flat = " ".join(seen.text.split())
        if missing := [word for word in self.words if not re.search(word, flat, re.I)]:
            return f"the output does not say {shown(missing)}: {flat[-260:]}"
        if wrong := [word for word in self.never if re.search(word, flat, re.I)]:
            return f"the output says {shown(wrong)}: {flat[-260:]}"
        return None


@dataclass(frozen=True)
class Prepared(Expected):
    """Exit status 0, and the shards hold exactly these samples; the output holds each word.

    Attributes:
        splits: samples by split; the key `all` stands for the samples of all splits together.
        tested: number of test images of each class, where the product keeps some for testing.
    """

    splits: dict[str, Sequence[Sample]]
    words: tuple[str, ...] = ()
    out: str = "out"
    tested: int | None = None

    def fault(self, seen: Seen, stage: Stage) -> str | None:
        if seen.status is None:
            return None
        if seen.status != 0:
            return f"exit status {seen.status}: a right input is refused: {tail(seen)}"
        try:
            found = read_shards(stage / self.out)
        except FileNotFoundError as error:
            return f"exit status 0, but {Path(error.filename).name} is missing"
        wanted = {name: list(samples) for name, samples in self.splits.items()}
        if set(wanted) == {"all"}:
            counts = Counter(sample.label for sample in found.get("test", []))
            if self.tested is not None and any(count != self.tested for count in counts.values()):
                return f"test has {dict(counts)} images by class, expected {self.tested} of each"
            if self.tested and not counts:
                return "there is no test split"
            found = {"all": [sample for samples in found.values() for sample in samples]}
        if wanted.keys() != found.keys():
            return f"the splits are {', '.join(found)}, expected {', '.join(wanted)}"
        for split, samples in wanted.items():
            if difference := differ(samples, found[split]):
                return f"{split}: {difference}"
        return Printed(self.words).fault(seen, stage) if self.words else None


@dataclass(frozen=True)
class Either(Expected):
    """One of several."""

    choices: tuple[Expected, ...]

    def fault(self, seen: Seen, stage: Stage) -> str | None:
        found = [choice.fault(seen, stage) for choice in self.choices]
        return None if None in found else "; or: ".join(found)


def refused(*words: str, never: tuple[str, ...] = ()) -> Refused:
    return Refused(words, never)


def printed(*words: str, never: tuple[str, ...] = (), status: int = 0) -> Printed:
    return Printed(words, never, status)


def either(*choices: Expected) -> Either:
    return Either(choices)


def expect(stage: Stage, words: Sequence, expected: Expected, **options) -> Seen:
    """Runs a command and records as `silent` what its expectation finds wrong."""
    seen = stage.run(*words, **options)
    if found := expected.fault(seen, stage):
        stage.fault("silent", f"{seen.line}: {found}")
    return seen


def expect_prepared(stage: Stage, source, expected: Expected, *options, out: str = "out", **more) -> Seen:
    """Runs `data prepare SOURCE --out OUT`, where both are in the stage."""
    return expect(stage, ["data", "prepare", source, "--out", out, *options], expected, **more)


def read_shards(folder: Path) -> dict[str, list[Sample]]:
    """The samples of a prepared data set, by split."""
    manifest = json.loads((folder / "manifest.json").read_text())
    splits = {}
    for split, shards in manifest["splits"].items():
        rows = [row for shard in shards for row in pq.read_table(folder / shard["file"]).to_pylist()]
        splits[split] = [
            Sample(
                np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")),
                manifest["classes"][row["label"]],
            )
            for row in rows
        ]
    return splits


def differ(wanted: list[Sample], found: list[Sample]) -> str | None:
    """How two collections of samples differ, in words; None if they are equal up to JPEG's loss."""
    before, after = (Counter(sample.label for sample in samples) for samples in (wanted, found))
    if before != after:
        return f"{len(found)} samples {short(after)}, expected {len(wanted)} {short(before)}"
    cost = np.zeros((len(wanted), len(found)))
    for i, one in enumerate(wanted):
        for j, other in enumerate(found):
            cost[i, j] = distance(one, other)
    rows, columns = linear_sum_assignment(cost)
    wrong = cost[rows, columns]
    if (wrong > BOUND).any():
        sizes = {sample.pixels.shape[:2] for sample in found}
        expected = {sample.pixels.shape[:2] for sample in wanted if sample.pixels is not None}
        size = (
            f"; they are {short_sizes(sizes)}, expected {short_sizes(expected)}" if wrong.max() > 255 else ""
        )
        level = wrong[wrong < 256].max(initial=0)
        return (
            f"{(wrong > BOUND).sum()} of {len(wanted)} images have other pixels or another class "
            f"(mean difference up to {level:.0f} grey levels, bound {BOUND:g}){size}"
        )
    return None


def distance(one: Sample, other: Sample) -> float:
    """Mean absolute difference of two samples' thumbnails; 1000 if class or aspect differ."""
    if one.label != other.label:
        return 1000.0
    if one.pixels is None:
        return 0.0
    (h1, w1), (h2, w2) = one.pixels.shape[:2], other.pixels.shape[:2]
    ratio = (w1 / h1) / (w2 / h2)
    if not 1 / ASPECT < ratio < ASPECT:
        return 1000.0
    return float(np.abs(thumbnail(one.pixels) - thumbnail(other.pixels)).mean())


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(image, np.float32)


def short(counts: Counter) -> str:
    parts = [f"{name} {count}" for name, count in sorted(counts.items())[:4]]
    return "(" + ", ".join(parts) + (", ...)" if len(counts) > 4 else ")")


def short_sizes(sizes: set) -> str:
    return ", ".join(f"{height}x{width}" for height, width in sorted(sizes)[:3])


def shown(words: Sequence[str]) -> str:
    return ", ".join(f"/{word}/" for word in words) or "the mistake"


def tail(seen: Seen, size: int = 200) -> str:
    flat = " | ".join(line.strip() for line in seen.text.splitlines() if line.strip())
    return flat[-size:] if flat else "no output"
