"""A run as MLflow must have it, and what is known about it there: two immutable values."""

import json
import math
from dataclasses import dataclass, field, replace

from deit_ray import storage
from deit_ray.outcome import Outcome
from deit_ray.results.journal import Point
from deit_ray.tracking.datasets import Dataset
from deit_ray.tracking.model_state import Best, FoundModel, Registered, Weights
from deit_ray.tracking.view import View

RECORD = "tracking.json"
# Raised when a version gives a run in MLflow something that a run that has ended lacks. 0 is every version
# without this number. 1: params of all keys that are not the default, tags, data sets, best/epoch, models.
VERSION = 1
LARGEST = 1.7976931348623157e308  # MLflow stores this for an infinity


@dataclass(frozen=True)
class Ending:
    """How a run ends.

    Attributes:
        outcome: how it ends.
        files: URIs of the files that become artifacts, if they exist.
        metrics: last values that are in no journal.
        time_ms: when it ended, in ms since 1970.
        tags: tags that are known only now.
        model: its best student, if it has finished.
        best: the run of a study's best trial, whose model is registered; None for another run.
    """

    outcome: Outcome
    files: tuple[str, ...]
    metrics: dict[str, float]
    time_ms: int
    tags: dict[str, str] = field(default_factory=dict)
    model: Weights | None = None
    best: "Run | None" = None


@dataclass(frozen=True)
class Desired:
    """A run as MLflow must have it.

    Attributes:
        name, tags, params: as MLflow shows them.
        datasets: the data sets that the run reads.
        folder: URI of the run's results.
        journal: URI of the run's journal, or None.
        started_ms: when the run began, in ms since 1970.
        description: the Markdown text that a person reads first; empty for none.
        ending: how the run ends; None until that is known.
        parent_id: MLflow's id of the study's run; None for a run that is no trial, or until the id is known.
        view: how MLflow shows the study; only a study's own run has it.
        best: the model that is registered for a study; None until MLflow has it.
    """

    name: str
    folder: str
    tags: dict[str, str]
    params: dict[str, str]
    journal: str | None
    started_ms: int
    ending: Ending | None = None
    parent_id: str | None = None
    datasets: tuple[Dataset, ...] = ()
    view: View | None = None
    description: str = ""
    best: Best | None = None


@dataclass(frozen=True)
class Record:
    """The state of a run in MLflow, as the run's folder records it (tracking.json).

    Attributes:
        id: the run's identity, made before the run; MLflow has it as the tag deit_ray.id.
        uri, experiment: MLflow's URI, and the name of its experiment.
        run_id: MLflow's id of the run, once it is known.
        described: whether params, tags and experiment.yaml were delivered.
        segments: number of the journal's segments that were delivered without a gap.
        outcome, status: outcome and MLflow status of the closed run; status is None if an earlier version
            closed it.
        version: `VERSION` of the version that closed the run.
        parent_id: MLflow's id of the study's run when the run was closed; None for a run that is no trial.
    """

    id: str
    uri: str
    experiment: str
    run_id: str | None = None
    described: bool = False
    segments: int = 0
    outcome: str | None = None
    status: str | None = None
    version: int = 0
    parent_id: str | None = None

    @classmethod
    def read(cls, folder: str) -> "Record | None":
        """The record in a folder; None if there is no record."""
        try:
            return cls(**json.loads(storage.read_bytes(storage.join(folder, RECORD))))
        except FileNotFoundError:
            return None

    def undelivered(self, run_id: str | None) -> "Record":
        """The record of the same run with nothing counted as delivered."""
        return Record(self.id, self.uri, self.experiment, run_id)

    def is_delivered(self, outcome: Outcome) -> bool:
        """Whether the run was closed with this outcome, by a version that delivers all that this one does."""
        return (self.outcome, self.version) == (outcome.text, VERSION)


@dataclass(frozen=True)
class Found:
    """A run as MLflow has it: the server's answer, with everything that was delivered since.

    Attributes:
        run_id, status, tags: MLflow's.
        params: names of the parameters.
        metrics: last value of each metric when the server answered.
        files: URIs of the artifacts that were delivered since; the server is not asked about earlier ones.
        datasets: (name, digest) of each data set.
    """

    run_id: str
    status: str = "RUNNING"
    tags: dict[str, str] = field(default_factory=dict)
    params: frozenset[str] = frozenset()
    metrics: dict[str, float] = field(default_factory=dict)
    files: frozenset[str] = frozenset()
    datasets: frozenset[tuple[str, str]] = frozenset()

    def has_value(self, name: str, value: float) -> bool:
        """Whether `value`, as MLflow stores it, is the last value of a metric."""
        if name not in self.metrics:
            return False
        known = self.metrics[name]
        return known == stored(value) or (math.isnan(known) and math.isnan(value))


@dataclass(frozen=True)
class Delivered:
    """What is known about a run in MLflow. The defaults say that nothing is known.

    Attributes:
        record: the record in the run's folder; None until it is read.
        may_exist: whether MLflow may have the run; False if no request to create it was ever sent, or MLflow
            was asked and does not have it.
        found: the run in MLflow; None until it is found or created.
        last: last value of each metric in the segments that the record counts, read from the journal.
        segments: number of segments that were sent, with those that MLflow refused; the record does not count
            refused ones.
        unsent: the next segments of the journal; None until they are read, empty at the journal's end.
        duplicates: ids of other runs with the same identity; None until they are looked for.
        refused: the requests that MLflow refuses as invalid.
        closed: the ending that was delivered.
        is_shared: whether MLflow has the study's view, or one that a person has saved in its place.
        description: the description that was delivered, or instead of which MLflow has a person's own.
        model: the run's model; None until it is looked for.
        registered: the study's registered model; None until it is looked for.
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
    is_shared: bool = False
    description: str = ""
    model: FoundModel | None = None
    registered: Registered | None = None

    def unknown(self) -> "Delivered":
        """The same after MLflow turned out to know less than before: the run must be looked for again."""
        nothing = {"found": None, "duplicates": None, "closed": None, "is_shared": False, "description": ""}
        return replace(self, may_exist=True, model=None, registered=None, **nothing)

    def undelivered(self, run_id: str | None) -> "Delivered":
        """The same with nothing counted as delivered to the run of this id; None: the run is created next."""
        record = self.record.undelivered(run_id)
        known = replace(self, record=record, may_exist=True, last={}, segments=0, unsent=None)
        return replace(known, model=None, registered=None)

    def noting(self, **changes) -> "Delivered":
        """The same with some values of the record changed."""
        return replace(self, record=replace(self.record, **changes))

    def with_segments(self, count: int) -> "Delivered":
        """The same after the next `count` segments were sent."""
        return replace(self, segments=self.segments + count, unsent=self.unsent[count:] or None)


class Run:
    """A run that a tracker delivers.

    Attributes:
        desired: the run as MLflow must have it; the end of the run replaces this value.
        parent: the study's run, for a trial.
        delivered: the knowledge about the run in MLflow; only the delivery thread replaces this value.
        generation: the `Delivery.generation` for which `delivered` holds.
        read_at: when the journal was last delivered to its end, by time.monotonic().
        is_pending: whether something may be left to deliver.
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
    def is_complete(self) -> bool:
        """Whether the ending was delivered, with the description that the run has now."""
        is_closed = self.closed is not None and self.closed is self.desired.ending
        return is_closed and self.delivered.description == self.desired.description

    @property
    def seen(self) -> bool:
        """Whether MLflow has the run with everything that describes it."""
        return self.delivered.found is not None and self.delivered.record.described


def stored(value: float) -> float:
    """A metric's value as MLflow stores it."""
    return value if math.isnan(value) else max(-LARGEST, min(value, LARGEST))
