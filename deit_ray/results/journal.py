"""The measurements of a trial, written next to its results before they are reported anywhere else.

A journal is a folder of numbered segment files. Each file is written whole or not at all, since object stores
cannot append. A segment holds points, one JSON list a line: [name, value, step, time in ms]. Name and step
identify a point.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from deit_ray import storage

FLUSH_S = 20.0  # pending points older than this are written, even if nothing is reported


@dataclass(frozen=True)
class Point:
    """One value of a metric at an optimizer step."""

    name: str
    value: float
    step: int
    time_ms: int


class JournalWriter:
    """Adds points to a journal, except for steps that the journal holds already: a resumed run repeats none.

    Args:
        uri: folder of the journal.

    Attributes:
        last: step and value of the last point of each name.
    """

    def __init__(self, uri: str):
        self.uri = uri
        self.pending: list[Point] = []
        self.segments, self.last_flush = 0, time.monotonic()
        self.last: dict[str, tuple[int, float]] = {}
        self._read_on()

    def add(self, values: dict[str, float], step: int) -> None:
        """Adds values measured at an optimizer step."""
        now = time.time_ns() // 1_000_000
        for name, value in values.items():
            if step > self.last.get(name, (-1, 0.0))[0]:
                self.pending.append(Point(name, float(value), step, now))
                self.last[name] = (step, float(value))
        if time.monotonic() - self.last_flush > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Writes the pending points as the next segment.

        A segment that another process has written meanwhile is kept, and its points are not written again.
        """
        self.last_flush = time.monotonic()
        while self.pending:
            lines = [json.dumps([p.name, p.value, p.step, p.time_ms]) for p in self.pending]
            try:
                storage.create_bytes(_segment(self.uri, self.segments), "\n".join(lines).encode())
            except FileExistsError:
                known = self._read_on()
                self.pending = [point for point in self.pending if point.step > known.get(point.name, -1)]
            else:
                self.segments += 1
                self.pending = []

    @contextlib.contextmanager
    def flushing(self) -> Iterator[None]:
        """Flushes in the background while the block runs. After the block, all points are written."""
        with ThreadPoolExecutor(1, thread_name_prefix="journal") as pool:
            flushed = pool.submit(self.flush)
            yield
            flushed.result()

    def at(self, names: list[str], step: int) -> dict[str, float]:
        """The journal's values at an optimizer step. Of repeated measurements, the first one counts."""
        if all(self.last[name][0] == step for name in names):
            return {name: self.last[name][1] for name in names}
        return {
            point.name: point.value
            for point in iterate_points(self.uri)
            if point.step == step and point.name in names
        }

    def _read_on(self) -> dict[str, int]:
        """Reads new segments; returns the last step of each name in them."""
        known: dict[str, int] = {}
        for points in iterate_segments(self.uri, self.segments):
            self.segments += 1
            for point in points:
                known[point.name] = max(point.step, known.get(point.name, -1))
                if point.step > self.last.get(point.name, (-1, 0.0))[0]:
                    self.last[point.name] = (point.step, point.value)
        return known


def iterate_segments(uri: str, first: int) -> Iterator[list[Point]]:
    """The points of each segment from number `first` on, one list for each segment."""
    number = first
    while True:
        try:
            content = storage.read_bytes(_segment(uri, number))
        except FileNotFoundError:
            return
        yield [Point(*json.loads(line)) for line in content.decode().splitlines()]
        number += 1


def iterate_points(uri: str) -> Iterator[Point]:
    """All points of a journal, in the order in which they were written."""
    for points in iterate_segments(uri, 0):
        yield from points


def last_step(uri: str) -> int | None:
    """The last optimizer step in a journal; None for an empty one."""
    return max((point.step for point in iterate_points(uri)), default=None)


def checkpoint_name(step: int) -> str:
    """The name of the folder with the checkpoint of an optimizer step, next to the journal."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The inverse of `checkpoint_name`."""
    return int(name.removeprefix("step-"))


def _segment(uri: str, number: int) -> str:
    return storage.join(uri, f"{number:06d}.jsonl")
