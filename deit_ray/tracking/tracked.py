"""A run as it shall be in MLflow, and how far it is so; what is kept of that in the run's folder."""

import dataclasses
import json
import math

from deit_ray import storage
from deit_ray.outcome import Kind, Outcome

RECORD = "tracking.json"
STOPPED_EARLY_STATUS_0_1 = "KILLED"  # what the versions that recorded no status delivered for such a run


@dataclasses.dataclass
class Record:
    """What is known of a run's life in MLflow, kept as tracking.json in its folder.

    Attributes:
        id: the run's identity, made before the run, and its tag deit_ray.id there.
        uri, experiment: where it is.
        run_id: MLflow's, once it is known.
        described: whether params, tags and experiment.yaml are there.
        segments: how many of the journal's are there.
        outcome, status: with which it was closed there; status is missing where an earlier version closed it.
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

    def is_delivered(self, outcome: Outcome) -> bool:
        """Whether the run was closed with this outcome and its MLflow status."""
        if self.outcome != outcome.text:
            return False
        status = self.status or (
            STOPPED_EARLY_STATUS_0_1 if outcome.kind == Kind.STOPPED_EARLY else outcome.mlflow_status
        )
        return status == outcome.mlflow_status

    def begin_again(self, run_id: str | None = None) -> None:
        """Of what was delivered nothing counts any more."""
        self.run_id, self.described, self.segments = run_id, False, 0
        self.outcome = self.status = None


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run ends: its outcome, artifacts (names of files in its folder), and last values that are in no journal."""

    outcome: Outcome
    files: tuple[str, ...]
    metrics: dict[str, float]
    time_ms: int


@dataclasses.dataclass(eq=False)
class Run:
    """A run as it shall be in MLflow, and, below, how far it is so, which only the delivery thread writes.

    Attributes:
        name, tags, params, parent, started_ms: as MLflow shows them.
        folder: URI of its results.
        journal: URI of its journal, or None.
        ending: how it ends, once that is known.
        record: what is kept in its folder.
        seen: of which state of MLflow (`Delivery.state`) the record was found true.
        made: MLflow's run as it was made, where the first request for it was answered: there is no second one of it.
        segments: how many were tried; the record's count stops at one that was refused, so that a sync tries it again.
        refused: the parts that MLflow does not take.
        closed: the ending that was delivered.
        delivered: when its journal was last read to the end, by time.monotonic().
        left: whether anything may be left to deliver.
    """

    name: str
    folder: str
    tags: dict[str, str]
    params: dict[str, str]
    parent: "Run | None"
    journal: str | None
    started_ms: int
    ending: Ending | None = None

    record: Record | None = None
    seen: int = 0
    made: object | None = None
    segments: int = 0
    refused: set[str] = dataclasses.field(default_factory=set)
    closed: Ending | None = None
    delivered: float = -math.inf
    left: bool = True
