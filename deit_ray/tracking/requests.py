"""What to do next so that MLflow has a run as it must be: a pure function of the run and of what is known to be there.

`Delivery` performs the requests, learns from each answer what is there now, and asks again until nothing is left. So it can
begin anywhere: with a new run, after a lost answer, after a restart, with a database that knows less than before.
"""

import posixpath
from dataclasses import dataclass, replace
from typing import ClassVar

from deit_ray import storage
from deit_ray.results.folders import EXPERIMENT
from deit_ray.tracking.tracked import Delivered, Desired, stored

NAME_CHARS, PARAM_CHARS, TAG_CHARS = 250, 6000, 8000  # above MLflow's limits servers cut, refuse or fail
SEGMENTS = 20  # delivered together: the cost of a request hardly depends on its size
IDENTITY, PARENT = "deit_ray.id", "mlflow.parentRunId"  # tags
ENDING_TAGS = ("outcome", "state")  # a run that goes on again does not have them

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ReadRecord:
    """Read tracking.json in the run's folder, or make a new identity where there is none."""


@dataclass(frozen=True)
class BeginAgain:
    """Save a record that counts nothing as delivered to the run of this id; None: the run is created next."""

    run_id: str | None


@dataclass(frozen=True)
class Note:
    """Save that `described`, or `outcome` and `status`, of the record have these values."""

    described: bool
    outcome: str | None = None
    status: str | None = None


@dataclass(frozen=True)
class FindRun:
    """Look for the run by MLflow's id, or else by its identity."""

    run_id: str | None
    identity: str


@dataclass(frozen=True)
class CreateRun:
    part: ClassVar[str] = "the run"
    name: str
    started_ms: int
    tags: Pairs


@dataclass(frozen=True)
class Describe:
    """Set the tags and log the parameters that are missing."""

    part: ClassVar[str] = "its parameters"
    tags: Pairs
    params: Pairs


@dataclass(frozen=True)
class LogArtifact:
    """Upload a file, where it exists."""

    uri: str

    @property
    def part(self) -> str:
        return f"its {posixpath.basename(self.uri)}"


@dataclass(frozen=True)
class DeleteTag:
    key: str


@dataclass(frozen=True)
class ReopenRun:
    """Give a run that had ended the status RUNNING."""


@dataclass(frozen=True)
class ReadJournal:
    """Read the journal's next segments, at most `SEGMENTS`."""

    first: int


@dataclass(frozen=True)
class LogPoints:
    """Log the points of `count` segments from number `first` on."""

    part: ClassVar[str] = "its points"
    first: int
    count: int


@dataclass(frozen=True)
class FindDuplicates:
    """Look for all runs of the identity. Two exist where a request was performed although its answer was lost."""

    identity: str


@dataclass(frozen=True)
class DeleteDuplicate:
    """Delete a run of the same identity, after its trials were given to the run that stays."""

    run_id: str


@dataclass(frozen=True)
class LogEnding:
    """Log the last values and the tags of an ended run."""

    part: ClassVar[str] = "its end"
    metrics: tuple[tuple[str, float], ...]
    tags: Pairs
    time_ms: int


@dataclass(frozen=True)
class Terminate:
    status: str
    time_ms: int


# They hold values that a server may call invalid.
Refusable = CreateRun | Describe | LogArtifact | LogPoints | LogEnding
Request = (
    Refusable | ReadRecord | BeginAgain | Note | FindRun | DeleteTag | ReopenRun | ReadJournal
    | FindDuplicates | DeleteDuplicate | Terminate
)  # fmt: skip


def next_requests(desired: Desired, delivered: Delivered) -> list[Request]:
    """The next requests, in their order; none when MLflow has everything that it takes.

    A request that MLflow refuses does not keep the others of the list from being performed.
    """
    if requests := opening_requests(desired, delivered):
        return requests
    if delivered.found is None:
        return []  # MLflow refuses to create the run
    return point_requests(desired, delivered) or ending_requests(desired, delivered)


def opening_requests(desired: Desired, delivered: Delivered) -> list[Request]:
    """The next requests until the run is in MLflow with everything that describes it; none once it is."""
    record, found = delivered.record, delivered.found
    if record is None:
        return [ReadRecord()]
    if found is None and delivered.may_exist:
        return [FindRun(record.run_id, record.id)]
    tags = tags_of(desired, record.id)
    if found is None:
        create = CreateRun(fitting(desired.name, NAME_CHARS), desired.started_ms, tuple(tags.items()))
        # the identity is saved first, so that a driver that is killed meanwhile does not create a second run
        return [] if create in delivered.refused else [BeginAgain(None), create]
    if found.run_id != record.run_id:
        return [BeginAgain(found.run_id)]
    if not all(found.has_value(name, value) for name, value in delivered.last.items()):
        return [BeginAgain(found.run_id)]  # somebody restored an older backup of the database
    if desired.ending is None and record.outcome is not None:
        return [Note(record.described)]

    requests: list[Request] = []
    missing_tags = tuple((key, value) for key, value in tags.items() if found.tags.get(key) != value)
    missing_params = tuple(
        (key, fitting(value, PARAM_CHARS)) for key, value in desired.params.items() if key not in found.params
    )
    describe = Describe(missing_tags, missing_params)
    if (missing_tags or missing_params) and describe not in delivered.refused:
        requests.append(describe)
    if not record.described:
        requests += [
            LogArtifact(storage.join(desired.folder, EXPERIMENT)),
            Note(True, record.outcome, record.status),
        ]
    if desired.ending is None and found.status != "RUNNING":
        requests += [DeleteTag(key) for key in ENDING_TAGS if key in found.tags]
        requests.append(ReopenRun())
    return requests


def point_requests(desired: Desired, delivered: Delivered) -> list[Request]:
    """The next requests until the whole journal is in MLflow."""
    if desired.journal is None:
        return []
    first, unsent = delivered.segments, delivered.unsent
    if unsent is None:
        return [ReadJournal(first)]
    if not unsent:
        return []
    together = LogPoints(first, len(unsent))
    if together not in delivered.refused:
        return [together]
    return [LogPoints(number, 1) for number in range(first, first + len(unsent))]  # one of them is invalid


def ending_requests(desired: Desired, delivered: Delivered) -> list[Request]:
    """The next requests until the run is closed in MLflow, and exists only once."""
    ending, record, found = desired.ending, delivered.record, delivered.found
    if ending is None or ending is delivered.closed:
        return []
    if delivered.duplicates is None:
        return [FindDuplicates(record.id)]
    outcome = ending.outcome
    metrics = tuple(
        (name, value) for name, value in ending.metrics.items() if not found.has_value(name, value)
    )
    tags = {key: fitting(value, TAG_CHARS) for key, value in outcome.mlflow_tags.items()}

    requests: list[Request] = [DeleteDuplicate(run_id) for run_id in delivered.duplicates]
    if metrics or record.outcome != outcome.text:
        requests += [LogArtifact(uri) for uri in ending.files if uri not in found.files]
    requests += [DeleteTag(key) for key in ENDING_TAGS if key in found.tags and key not in tags]
    missing_tags = tuple((key, value) for key, value in tags.items() if found.tags.get(key) != value)
    if metrics or missing_tags:
        requests.append(LogEnding(metrics, missing_tags, ending.time_ms))
    if found.status != outcome.mlflow_status:
        requests.append(Terminate(outcome.mlflow_status, ending.time_ms))
    requests = [request for request in requests if request not in delivered.refused]
    if (
        requests or delivered.refused
    ):  # a sync tries again what was refused: the record does not say that all is there
        return requests
    note = Note(record.described, outcome.text, outcome.mlflow_status)
    return [] if (record.outcome, record.status) == (note.outcome, note.status) else [note]


def tags_of(desired: Desired, identity: str) -> dict[str, str]:
    """The tags of a run, whether it runs or has ended."""
    tags = desired.tags | {IDENTITY: identity}
    if desired.parent_id is not None:
        tags[PARENT] = desired.parent_id
    return {key: fitting(value, TAG_CHARS) for key, value in tags.items()}


def fitting(text: str, chars: int) -> str:
    """The text as MLflow and its databases take it: not too long, UTF-8, without the NUL that PostgreSQL refuses."""
    return text.encode(errors="replace").decode().replace("\0", "")[:chars]


def after_request(delivered: Delivered, request: Request) -> Delivered:
    """What is known once a request was performed whose answer says nothing more."""
    found = delivered.found
    match request:
        case BeginAgain(run_id):
            return delivered.begun_again(run_id)
        case Note(described, outcome, status):
            return delivered.noting(described=described, outcome=outcome, status=status)
        case Describe(tags, params):
            params = found.params | {key for key, _ in params}
            return replace(delivered, found=replace(found, tags=found.tags | dict(tags), params=params))
        case LogArtifact(uri):
            return replace(delivered, found=replace(found, files=found.files | {uri}))
        case DeleteTag(key):
            tags = {name: value for name, value in found.tags.items() if name != key}
            return replace(delivered, found=replace(found, tags=tags))
        case ReopenRun():
            return replace(delivered, found=replace(found, status="RUNNING"))
        case LogPoints(first, count):
            is_next = delivered.record.segments == first  # else there is a gap, which a sync fills if it can
            delivered = delivered.with_segments(count)
            return delivered.noting(segments=delivered.segments) if is_next else delivered
        case DeleteDuplicate(run_id):
            return replace(delivered, duplicates=tuple(id for id in delivered.duplicates if id != run_id))
        case LogEnding(metrics, tags):
            metrics = {name: stored(value) for name, value in metrics}
            known = replace(found, metrics=found.metrics | metrics, tags=found.tags | dict(tags))
            return replace(delivered, found=known)
        case Terminate(status):
            return replace(delivered, found=replace(found, status=status))
    raise TypeError(f"{request} has an answer of its own")


def after_failure(desired: Desired, delivered: Delivered) -> Delivered:
    """What is still known once a request has failed, which MLflow may have performed nevertheless."""
    found = None if opening_requests(desired, delivered) else delivered.found
    return replace(delivered, found=found, duplicates=None)


def after_refusal(delivered: Delivered, request: Refusable) -> Delivered:
    """What is known once MLflow has refused a request as invalid."""
    delivered = replace(delivered, refused=delivered.refused | {request})
    is_segment = isinstance(request, LogPoints) and request.count == 1
    return delivered.with_segments(1) if is_segment else delivered
