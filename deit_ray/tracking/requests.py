"""The next requests that bring a run in MLflow up to date: a function of its desired and delivered state.

`Delivery` performs the requests, learns from each answer what MLflow has now, and asks for the next requests
until none is left. So it can begin anywhere: with a new run, after a lost answer, after a restart, or with a
database that knows less than before.
"""

import posixpath
from dataclasses import dataclass, replace
from typing import ClassVar

from deit_ray import storage
from deit_ray.results.folders import EXPERIMENT
from deit_ray.tracking.datasets import Dataset
from deit_ray.tracking.tracked import VERSION, Delivered, Desired, Ending, Found, stored

# MLflow's limits: servers cut or refuse longer text, or fail
NAME_CHARS, PARAM_CHARS, TAG_CHARS, PARAMS = 250, 6000, 8000, 100
SEGMENTS = 20  # delivered together: the cost of a request hardly depends on its size
IDENTITY, PARENT = "deit_ray.id", "mlflow.parentRunId"  # tags
ENDING_TAGS = ("outcome", "state")  # a reopened run does not have them

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ReadRecord:
    """Read tracking.json in the run's folder, or make a new identity where there is none."""


@dataclass(frozen=True)
class ResetRecord:
    """Save a record that counts nothing as delivered to the run of this id; None: the run is created next."""

    run_id: str | None


@dataclass(frozen=True)
class Note:
    """Save these values in the record."""

    described: bool
    outcome: str | None = None
    status: str | None = None
    version: int = 0
    parent_id: str | None = None


@dataclass(frozen=True)
class FindRun:
    """Look for the run by MLflow's id, else by its identity."""

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
class LogDatasets:
    """Log the data sets that the run does not have."""

    part: ClassVar[str] = "its data sets"
    datasets: tuple[Dataset, ...]


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
    """Give a run that has ended the status RUNNING again."""


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
    """Look for all runs of the identity. Two exist if the answer to a performed request was lost."""

    identity: str


@dataclass(frozen=True)
class DeleteDuplicate:
    """Delete a run of the same identity, after its child runs were moved to the run that is kept."""

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


# These requests hold values that a server may refuse as invalid.
Refusable = CreateRun | Describe | LogDatasets | LogArtifact | LogPoints | LogEnding
Request = (
    Refusable | ReadRecord | ResetRecord | Note | FindRun | DeleteTag | ReopenRun | ReadJournal
    | FindDuplicates | DeleteDuplicate | Terminate
)  # fmt: skip


def next_requests(desired: Desired, delivered: Delivered) -> list[Request]:
    """The next requests, in order; an empty list once MLflow has everything that it accepts.

    If MLflow refuses one request, the others in the list are performed nevertheless.
    """
    if requests := opening_requests(desired, delivered):
        return requests
    if delivered.found is None:
        return []  # MLflow refuses to create the run
    return point_requests(desired, delivered) or ending_requests(desired, delivered)


def opening_requests(desired: Desired, delivered: Delivered) -> list[Request]:
    """The next requests until MLflow has the run and all that describes it; then an empty list."""
    record, found = delivered.record, delivered.found
    if record is None:
        return [ReadRecord()]
    if found is None and delivered.may_exist:
        return [FindRun(record.run_id, record.id)]
    tags = tags_of(desired, record.id)
    if found is None:
        create = CreateRun(fitting(desired.name, NAME_CHARS), desired.started_ms, tuple(tags.items()))
        # the identity is saved first, so that a driver that is killed now does not later create a second run
        return [] if create in delivered.refused else [ResetRecord(None), create]
    if found.run_id != record.run_id:
        return [ResetRecord(found.run_id)]
    if not all(found.has_value(name, value) for name, value in delivered.last.items()):
        return [ResetRecord(found.run_id)]  # somebody restored an older backup of the database
    if desired.ending is None and record.outcome is not None:
        return [Note(record.described)]

    requests: list[Request] = [
        request for request in describing_requests(desired, tags, found) if request not in delivered.refused
    ]
    file = LogArtifact(storage.join(desired.folder, EXPERIMENT))
    if not record.described and file not in delivered.refused:  # after a refusal a sync retries
        was_sent = file.uri in found.files
        note = Note(True, record.outcome, record.status, record.version, record.parent_id)
        requests.append(note if was_sent else file)
    if desired.ending is None and found.status != "RUNNING":
        requests += [DeleteTag(key) for key in ENDING_TAGS if key in found.tags]
        requests.append(ReopenRun())
    return requests


def describing_requests(desired: Desired, tags: dict[str, str], found: Found) -> list[Request]:
    """The requests for the tags, params and data sets that a run lacks."""
    missing_tags = tuple((key, value) for key, value in tags.items() if found.tags.get(key) != value)
    params = [
        (key, fitting(value, PARAM_CHARS)) for key, value in desired.params.items() if key not in found.params
    ]
    requests: list[Request] = []
    if missing_tags or params:
        requests.append(Describe(missing_tags, tuple(params[:PARAMS])))
    requests += [Describe((), tuple(params[n : n + PARAMS])) for n in range(PARAMS, len(params), PARAMS)]
    if datasets := tuple(dataset for dataset in desired.datasets if dataset.key not in found.datasets):
        requests.append(LogDatasets(datasets))
    return requests


def point_requests(desired: Desired, delivered: Delivered) -> list[Request]:
    """The next requests until MLflow has the whole journal."""
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
    """The next requests until the run is closed in MLflow, and exists there only once."""
    ending, record, found = desired.ending, delivered.record, delivered.found
    if ending is None or ending is delivered.closed:
        return []
    if delivered.duplicates is None:
        return [FindDuplicates(record.id)]
    outcome = ending.outcome
    metrics = tuple(
        (name, value) for name, value in ending.metrics.items() if not found.has_value(name, value)
    )
    tags = ending.tags | outcome.mlflow_tags
    tags = {key: fitting(value, TAG_CHARS) for key, value in tags.items()}

    requests: list[Request] = [DeleteDuplicate(run_id) for run_id in delivered.duplicates]
    if has_changed(ending, delivered):
        requests += [LogArtifact(uri) for uri in ending.files if uri not in found.files]
    requests += [DeleteTag(key) for key in ENDING_TAGS if key in found.tags and key not in tags]
    missing_tags = tuple((key, value) for key, value in tags.items() if found.tags.get(key) != value)
    if metrics or missing_tags:
        requests.append(LogEnding(metrics, missing_tags, ending.time_ms))
    if found.status != outcome.mlflow_status:
        requests.append(Terminate(outcome.mlflow_status, ending.time_ms))
    requests = [request for request in requests if request not in delivered.refused]
    if requests or delivered.refused:  # after a refusal the record stays open, so that a sync retries
        return requests
    note = Note(record.described, outcome.text, outcome.mlflow_status, VERSION, desired.parent_id)
    return [] if after_request(delivered, note) == delivered else [note]


def has_changed(ending: Ending, delivered: Delivered) -> bool:
    """Whether a run ended otherwise than MLflow knows, so that its files may have changed.

    A value that MLflow lacks is no change: an earlier version did not deliver it.
    """
    known = {name: value for name, value in ending.metrics.items() if name in delivered.found.metrics}
    is_other = any(not delivered.found.has_value(name, value) for name, value in known.items())
    return is_other or delivered.record.outcome != ending.outcome.text


def tags_of(desired: Desired, identity: str) -> dict[str, str]:
    """The tags of a run, whether it runs or has ended."""
    tags = desired.tags | {IDENTITY: identity}
    if desired.parent_id is not None:
        tags[PARENT] = desired.parent_id
    return {key: fitting(value, TAG_CHARS) for key, value in tags.items()}


def fitting(text: str, chars: int) -> str:
    """The text as MLflow and its databases take it: cut, in UTF-8, without NUL, which PostgreSQL refuses."""
    return text.encode(errors="replace").decode().replace("\0", "")[:chars]


def after_request(delivered: Delivered, request: Request) -> Delivered:
    """The knowledge about the run after a request whose answer adds nothing was performed."""
    found = delivered.found
    match request:
        case ResetRecord(run_id):
            return delivered.undelivered(run_id)
        case Note():
            return delivered.noting(**vars(request))
        case Describe(tags, params):
            params = found.params | {key for key, _ in params}
            return replace(delivered, found=replace(found, tags=found.tags | dict(tags), params=params))
        case LogDatasets(datasets):
            datasets = found.datasets | {dataset.key for dataset in datasets}
            return replace(delivered, found=replace(found, datasets=datasets))
        case LogArtifact(uri):
            return replace(delivered, found=replace(found, files=found.files | {uri}))
        case DeleteTag(key):
            tags = {name: value for name, value in found.tags.items() if name != key}
            return replace(delivered, found=replace(found, tags=tags))
        case ReopenRun():
            return replace(delivered, found=replace(found, status="RUNNING"))
        case LogPoints(first, count):
            # False after a refused segment, which a sync retries
            is_next = delivered.record.segments == first
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
    """The knowledge that holds after a request failed: MLflow may have performed it nevertheless."""
    found = None if opening_requests(desired, delivered) else delivered.found
    return replace(delivered, found=found, duplicates=None)


def after_refusal(delivered: Delivered, request: Refusable) -> Delivered:
    """The knowledge about the run after MLflow refused a request as invalid."""
    delivered = replace(delivered, refused=delivered.refused | {request})
    is_segment = isinstance(request, LogPoints) and request.count == 1
    return delivered.with_segments(1) if is_segment else delivered
