"""A run as it must be in MLflow, and what is known to be there already: two values that nothing changes in place."""

import json
import math
from dataclasses import dataclass, field, replace

from deit_ray import storage
from deit_ray.outcome import Kind, Outcome
from deit_ray.results.journal import Point

RECORD = "tracking.json"
STOPPED_EARLY_STATUS_0_1 = "KILLED"  # what the versions that recorded no status delivered for such a run
LARGEST = 1.7976931348623157e308  # MLflow stores this for an infinity


@dataclass(frozen=True)
class Ending:
    """How a run ends.

    Attributes:
        outcome: the way it ended.
        files: URIs of the files that become artifacts, where they exist.
        metrics: last values that are in no journal.
        time_ms: when it ended, in ms since 1970.
    """

    outcome: Outcome
    files: tuple[str, ...]
    metrics: dict[str, float]
    time_ms: int


@dataclass(frozen=True)
class Desired:
    """A run as it must be in MLflow.

    Attributes:
        name, tags, params: as MLflow shows them.
        folder: URI of the run's results.
        journal: URI of the run's journal, or None.
        started_ms: when the run began, in ms since 1970.
        ending: how the run ends, once that is known.
        parent_id: MLflow's id of the study's run, for a trial whose study's run is there.
    """

    name: str
    folder: str
    tags: dict[str, str]
    params: dict[str, str]
    journal: str | None
    started_ms: int
    ending: Ending | None = None
    parent_id: str | None = None


@dataclass(frozen=True)
class Record:
    """What a run's folder says about the run's life in MLflow (tracking.json).

    Attributes:
        id: the run's identity, made before the run; MLflow has it as the tag deit_ray.id.
        uri, experiment: MLflow's URI, and the name of its experiment.
        run_id: MLflow's id of the run, once it is known.
        described: whether params, tags and experiment.yaml were delivered.
        segments: number of the journal's segments that were delivered without a gap.
        outcome, status: with which the run was closed; status is missing where an earlier version closed it.
    """

    id: str
    uri: str
    experiment: str
    run_id: str | None = None
    described: bool = False
    segments: int = 0
    outcome: str | None = None
    status: str | None = None

    @classmethod
    def read(cls, folder: str) -> "Record | None":
        """The record in a folder; None where there is none."""
        try:
            return cls(**json.loads(storage.read_bytes(storage.join(folder, RECORD))))
        except FileNotFoundError:
            return None

    def begun_again(self, run_id: str | None) -> "Record":
        """The record of the same run when nothing counts as delivered."""
        return Record(self.id, self.uri, self.experiment, run_id)

    def is_delivered(self, outcome: Outcome) -> bool:
        """Whether the run was closed with this outcome and its MLflow status."""
        if self.outcome != outcome.text:
            return False
        status = self.status or (
            STOPPED_EARLY_STATUS_0_1 if outcome.kind == Kind.STOPPED_EARLY else outcome.mlflow_status
        )
        return status == outcome.mlflow_status


@dataclass(frozen=True)
class Found:
    """A run as MLflow has it: what its server answered, and what was delivered since.

    Attributes:
        run_id, status, tags: MLflow's.
        params: names of the parameters.
        metrics: last value of each metric when the server answered.
        files: URIs of the artifacts that were delivered since; the server is not asked for others.
    """

    run_id: str
    status: str = "RUNNING"
    tags: dict[str, str] = field(default_factory=dict)
    params: frozenset[str] = frozenset()
    metrics: dict[str, float] = field(default_factory=dict)
    files: frozenset[str] = frozenset()

    def has_value(self, name: str, value: float) -> bool:
        """Whether this is the last value of a metric, as MLflow stores it."""
        if name not in self.metrics:
            return False
        known = self.metrics[name]
        return known == stored(value) or (math.isnan(known) and math.isnan(value))


@dataclass(frozen=True)
class Delivered:
    """What is known about a run in MLflow. The defaults say that nothing is known.

    Attributes:
        record: what the run's folder says; None until it was read.
        may_exist: whether MLflow may have the run; False where no request to create it was ever sent, or MLflow was
            asked and has none.
        found: the run in MLflow; None until it was found or created.
        last: last value of each curve in the segments that the record counts, read from the journal.
        segments: number of segments that were sent. It counts those that MLflow refuses too; the record does not.
        unsent: the next segments of the journal; None until they were read, empty at the journal's end.
        duplicates: ids of other runs with the same identity; None until they were looked for.
        refused: the requests that MLflow refuses as invalid.
        closed: the ending that was delivered.
    """

    record: Record | None = None
    may_exist: bool = True
    found: Found | None = None
    last: dict[str, float] = field(default_factory=dict)
    segments: int = 0
    unsent: tuple[list[Point], ...] | None = None
    duplicates: tuple[str, ...] | None = None
    refused: frozenset = frozenset()
    closed: Ending | None = None

    def unknown(self) -> "Delivered":
        """The same when MLflow turned out to know less than before: everything there must be looked for again."""
        return replace(self, may_exist=True, found=None, duplicates=None, closed=None)

    def begun_again(self, run_id: str | None) -> "Delivered":
        """The same when nothing counts as delivered to the run of this id, which is to be created where it is None."""
        record = self.record.begun_again(run_id)
        return replace(self, record=record, may_exist=True, last={}, segments=0, unsent=None)

    def noting(self, **changes) -> "Delivered":
        """The same with some values of the record changed."""
        return replace(self, record=replace(self.record, **changes))

    def with_segments(self, count: int) -> "Delivered":
        """The same after the next `count` segments were sent."""
        return replace(self, segments=self.segments + count, unsent=self.unsent[count:] or None)


class Run:
    """A run that a tracker delivers.

    Attributes:
        desired: the run as it must be; ending it replaces this value.
        parent: the study's run, for a trial.
        delivered: what is known to be there; only the delivery thread replaces this value.
        generation: the `Delivery.generation` for which `delivered` holds.
        read_at: when the journal was last delivered to its end, by time.monotonic().
        is_pending: whether anything may be left to deliver.
    """

    def __init__(self, desired: Desired, parent: "Run | None" = None):
        self.desired, self.parent = desired, parent
        self.delivered, self.generation = Delivered(), 0
        self.read_at, self.is_pending = -math.inf, True

    @property
    def name(self) -> str:
        return self.desired.name

    @property
    def started_ms(self) -> int:
        return self.desired.started_ms

    @property
    def record(self) -> Record | None:
        return self.delivered.record

    @property
    def segments(self) -> int:
        """Number of the journal's segments that were sent."""
        return self.delivered.segments

    @property
    def refused(self) -> frozenset:
        """The requests that MLflow refuses as invalid."""
        return self.delivered.refused

    @property
    def closed(self) -> Ending | None:
        """The ending that was delivered."""
        return self.delivered.closed

    @property
    def seen(self) -> bool:
        """Whether the run is in MLflow with everything that describes it."""
        return self.delivered.found is not None and self.delivered.record.described


def stored(value: float) -> float:
    """A metric's value as MLflow stores it."""
    return value if math.isnan(value) else max(-LARGEST, min(value, LARGEST))
