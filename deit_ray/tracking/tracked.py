"""A run as it shall be in MLflow, and how far it is so; what is kept of that in the run's folder."""

import dataclasses
import math

RECORD = "tracking.json"
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped early": "KILLED", "cancelled": "KILLED"}


@dataclasses.dataclass
class Record:
    """What is known of a run's life in MLflow, kept as tracking.json in its folder.

    Attributes:
        id: the run's identity, made before the run, and its tag deit_ray.id there.
        uri, experiment: where it is.
        run_id: MLflow's, once it is known.
        described: whether params, tags and experiment.yaml are there.
        segments: how many of the journal's are there.
        outcome: with which it was closed there.
    """

    id: str
    uri: str
    experiment: str
    run_id: str | None = None
    described: bool = False
    segments: int = 0
    outcome: str | None = None

    def begin_again(self, run_id: str | None = None) -> None:
        """Of what was delivered nothing counts any more."""
        self.run_id, self.described, self.segments, self.outcome = run_id, False, 0, None


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a run ends: its outcome, artifacts (names of files in its folder), and last values that are in no journal."""

    outcome: str
    files: tuple[str, ...]
    metrics: dict[str, float]
    time_ms: int

    @property
    def status(self) -> str:
        return next(status for prefix, status in STATUS.items() if self.outcome.startswith(prefix))


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
