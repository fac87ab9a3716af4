"""Makes a run in MLflow what it shall be: the only file that knows MLflow.

Every step may be repeated. A run is looked for by its identity before it is made, and points have the time they were
measured at, so that MLflow, which stores a point once by (run, name, time, step, value), takes a repeated delivery
without doubling.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import posixpath
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

from deit_ray import storage
from deit_ray.results.folders import EXPERIMENT
from deit_ray.results.journal import iterate_segments
from deit_ray.tracking.tracked import RECORD, Ending, Record, Run

TIMEOUT_S = 30  # of one request
BATCH = 1000  # points in one request, MLflow's limit
SEGMENTS = 20  # of a journal, delivered together: what a request costs hardly depends on its size
NAME_CHARS, PARAM_CHARS, TAG_CHARS = (
    250,
    6000,
    8000,
)  # MLflow's limits, over which servers cut, refuse or fail
LARGEST = 1.7976931348623157e308  # what MLflow stores for an infinity
MAKING = "the run"  # the part without which there are no others


class Delivery:
    """Delivers runs, one request after the other; see `deliver`.

    Args:
        uri: MLflow's tracking URI.
        experiment: MLflow's name of the experiment.
        artifacts: where artifacts go when the store is a local database.
        before_request: called before every request; what it raises ends the delivery.
        tell: tells a person what MLflow does not take.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifacts: str | None,
        before_request: Callable[[], None],
        tell: Callable[[str], None],
    ):
        quiet_mlflow()
        self.uri, self.experiment, self.artifacts = uri, experiment, artifacts
        self.before_request, self.tell = before_request, tell
        self.client = self.experiment_id = None
        self.state = 1  # of MLflow: counts up when it turns out to know less than before
        self.requests = 0  # that were answered

    def deliver(self, run: Run) -> None:
        """Makes MLflow's run what it shall be, as far as it is not. Raises what the server, the network or the disk raises."""
        try:
            self._deliver_parts(run)
        except Exception as error:
            if not (isinstance(error, Gone) or is_unknown(error)):
                raise
            self.state += 1  # another database, or somebody deleted the run: all is looked for anew
            self.experiment_id = None
            self._deliver_parts(run)

    def _deliver_parts(self, run: Run) -> None:
        ending = run.ending  # asked before the journal is read, which is complete by then
        with contextlib.suppress(Refused):
            if run.seen != self.state and MAKING not in run.refused:
                self._open(run)
        if MAKING in run.refused:
            run.closed = ending
            return
        self._deliver_points(run)
        if ending and ending is not run.closed:
            self._close(run, ending)

    def _request(self, function: Callable, *arguments, **options):
        """Asks MLflow for something."""
        self.before_request()
        answer = function(*arguments, **options)
        self.requests += 1
        return answer

    def _offer(self, run: Run, part: str, function: Callable, *arguments, **options):
        """The same for what MLflow may refuse as invalid: then no repetition would help, and a person is told.

        Raises:
            Refused: it did.
            Gone: it did because somebody deleted the run.
        """
        try:
            return self._request(function, *arguments, **options)
        except Exception as error:
            if not is_refusal(error):
                raise
            run_id = run.record.run_id
            if run_id and self._request(self.client.get_run, run_id).info.lifecycle_stage != "active":
                raise Gone from error
            self._refuse(run, part, error)
            raise Refused from error

    def _refuse(self, run: Run, part: str, error: Exception) -> None:
        if part not in run.refused:
            run.refused.add(part)
            self.tell(f"{run.name}: {part} cannot be delivered to MLflow: {one_line(error)}")

    def _open(self, run: Run) -> None:
        """Finds the run, or makes it, and says what it is."""
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_SOURCE_NAME, MLFLOW_USER

        parent = run.parent
        if parent and parent.seen != self.state and MAKING not in parent.refused:
            with contextlib.suppress(Refused):
                self._open(parent)
        self._connect()
        is_new = run.record is None and not self._read_record(run)
        record = run.record
        tags = run.tags | {"deit_ray.id": record.id}
        if parent and parent.record.run_id:
            tags[MLFLOW_PARENT_RUN_ID] = parent.record.run_id
        tags = {key: fitting(value, TAG_CHARS) for key, value in tags.items()}
        run.made, found = None, None if is_new else self._find(record)
        if found is None:
            record.begin_again()
            self._save(run)  # whoever comes next looks for this identity
            source = {MLFLOW_SOURCE_NAME: "deit-ray", MLFLOW_USER: os.environ.get("USER", "unknown")}
            options = {
                "start_time": run.started_ms,
                "run_name": fitting(run.name, NAME_CHARS),
                "tags": tags | source,
            }
            found = self._offer(run, MAKING, self.client.create_run, self.experiment_id, **options)
            run.made = found if is_new else None
        if found.info.run_id != record.run_id or not self._holds(found, run):
            record.begin_again(found.info.run_id)
        if run.ending is None:
            record.outcome = record.status = None
        self._save(run)
        self._describe(run, found, tags)
        if run.ending is None and found.info.status != "RUNNING":  # it had ended, and goes on
            for tag in ("outcome", "state"):
                if tag in found.data.tags:
                    self._request(self.client.delete_tag, record.run_id, tag)
            self._request(self.client.update_run, record.run_id, status="RUNNING")
        run.segments, run.closed, run.seen = record.segments, None, self.state

    def _connect(self) -> None:
        """Finds MLflow's experiment, or makes it."""
        if self.client is None:
            from mlflow.tracking import MlflowClient

            self.client = MlflowClient(tracking_uri=self.uri)
        if self.experiment_id is not None:
            return
        found = self._request(self.client.get_experiment_by_name, self.experiment)
        if found is None:
            location = self.artifacts if self.uri.startswith("sqlite:") else None
            kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on training runs
            self._request(
                self.client.create_experiment, self.experiment, artifact_location=location, tags=kind
            )
            found = self._request(self.client.get_experiment_by_name, self.experiment)
        if found.lifecycle_stage != "active":
            raise RuntimeError(
                f"its experiment {self.experiment} was deleted; restore it: mlflow experiments restore -x {found.experiment_id}"
            )
        self.experiment_id = found.experiment_id

    def _read_record(self, run: Run) -> bool:
        """Reads what the run's folder says, or begins a new record; returns whether it says anything."""
        new = Record(uuid.uuid4().hex, self.uri, self.experiment)
        known = Record.read(run.folder)
        if known is None:
            run.record = new
            return False
        run.record = (
            known
            if (known.uri, known.experiment) == (self.uri, self.experiment)
            else dataclasses.replace(new, id=known.id)
        )
        return True

    def _save(self, run: Run) -> None:
        storage.write_bytes(
            storage.join(run.folder, RECORD), json.dumps(dataclasses.asdict(run.record)).encode()
        )

    def _find(self, record: Record):
        """The run of a record, by its id, or else by its identity; None where MLflow has none."""
        if record.run_id:
            try:
                found = self._request(self.client.get_run, record.run_id)
                if found.info.lifecycle_stage == "active":
                    return found
            except Exception as error:
                if not is_unknown(error):
                    raise
        same = self._search(record)
        return same[0] if same else None

    def _search(self, record: Record) -> list:
        """All runs of an identity, the earliest first. There are two where a request was done that had seemed lost."""
        found = self._request(
            self.client.search_runs, [self.experiment_id], f"tags.`deit_ray.id` = '{record.id}'"
        )
        return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))

    def _holds(self, found, run: Run) -> bool:
        """Whether MLflow has the last point of each curve that was delivered; it has not where a backup was restored."""
        if run.journal is None:
            return True
        last, segments = {}, iterate_segments(run.journal, 0)
        for segment in itertools.islice(segments, run.record.segments):
            last |= {point.name: point.value for point in segment}
        return all(is_same(found.data.metrics.get(name), value) for name, value in last.items())

    def _describe(self, run: Run, found, tags: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        record = run.record
        tags = [RunTag(key, value) for key, value in tags.items() if found.data.tags.get(key) != value]
        params = [
            Param(key, fitting(value, PARAM_CHARS))
            for key, value in run.params.items()
            if key not in found.data.params
        ]
        if tags or params:
            with contextlib.suppress(Refused):
                self._offer(
                    run, "its parameters", self.client.log_batch, record.run_id, params=params, tags=tags
                )
        if not record.described:
            self._log_artifact(run, storage.join(run.folder, EXPERIMENT))
            record.described = True
            self._save(run)

    def _deliver_points(self, run: Run) -> None:
        if run.journal is None:
            return
        segments = iterate_segments(run.journal, run.segments)
        while chunk := list(itertools.islice(segments, SEGMENTS)):
            self._deliver_segments(run, chunk)

    def _deliver_segments(self, run: Run, chunk: list[list]) -> None:
        record = run.record
        try:
            self._log_points(run, [point for points in chunk for point in points])
        except Refused:
            if len(chunk) > 1:
                for points in chunk:  # the others are not to blame
                    self._deliver_segments(run, [points])
            else:
                run.segments += 1
            return
        if record.segments == run.segments:
            record.segments += len(chunk)
            self._save(run)
        run.segments += len(chunk)

    def _log_points(self, run: Run, points: list) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(p.name, p.value, p.time_ms, p.step) for p in points]
        for first in range(0, len(metrics), BATCH):
            self._offer(
                run,
                "its points",
                self.client.log_batch,
                run.record.run_id,
                metrics=metrics[first : first + BATCH],
            )

    def _close(self, run: Run, ending: Ending) -> None:
        """Delivers what belongs to the end of a run, and makes sure that there is only one of it."""
        from mlflow.entities import Metric, RunTag

        record = run.record
        same = [run.made] if run.made else self._search(record)
        if not same:
            raise Gone
        kept, *doubled = same
        if kept.info.run_id != record.run_id:
            record.begin_again(kept.info.run_id)
            run.seen = 0
            self._deliver_parts(run)
            return
        for other in doubled:
            self._remove(other, kept)
        metrics = [
            Metric(k, v, ending.time_ms, 0)
            for k, v in ending.metrics.items()
            if not is_same(kept.data.metrics.get(k), v)
        ]
        if metrics or record.outcome != ending.outcome.text:
            for file in ending.files:
                self._log_artifact(run, file)
        tags = {key: fitting(value, TAG_CHARS) for key, value in ending.outcome.mlflow_tags.items()}
        with contextlib.suppress(Refused):
            if metrics or any(kept.data.tags.get(key) != value for key, value in tags.items()):
                tags = [RunTag(key, value) for key, value in tags.items()]
                self._offer(run, "its end", self.client.log_batch, record.run_id, metrics=metrics, tags=tags)
        status = ending.outcome.mlflow_status
        if kept.info.status != status:
            self._request(self.client.set_terminated, record.run_id, status, ending.time_ms)
        if not run.refused:
            record.outcome, record.status = ending.outcome.text, status
            self._save(run)
        run.closed, run.made = ending, None

    def _remove(self, doubled, kept) -> None:
        """Deletes a run that there is twice; the trials that hang on it go to the one that is kept."""
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        children = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{doubled.info.run_id}'"
        while found := self._request(self.client.search_runs, [self.experiment_id], children):
            for child in found:
                self._request(self.client.set_tag, child.info.run_id, MLFLOW_PARENT_RUN_ID, kept.info.run_id)
        self._request(self.client.delete_run, doubled.info.run_id)

    def _log_artifact(self, run: Run, uri: str) -> None:
        if not storage.exists(uri):
            return
        name = posixpath.basename(uri)
        with contextlib.ExitStack() as stack, contextlib.suppress(Refused):
            if storage.is_local(uri):
                path = storage.local_path(uri)
                try:
                    open(path, "rb").close()
                except OSError as error:
                    return self._refuse(run, f"its {name}", error)
            else:
                path = f"{stack.enter_context(tempfile.TemporaryDirectory())}/{name}"
                Path(path).write_bytes(storage.read_bytes(uri))
            self._offer(run, f"its {name}", self.client.log_artifact, run.record.run_id, path)


class Refused(Exception):
    """MLflow does not take this, however often it is tried."""


class Gone(Exception):
    """MLflow has not got the run any more."""


def is_refusal(error: Exception) -> bool:
    """Whether MLflow says that what it was given is invalid. Its BAD_REQUEST is no such thing: a database may cause it."""
    status = getattr(getattr(error, "response", None), "status_code", None)  # of an artifact's upload
    return getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE" or status in (
        400,
        405,
        411,
        413,
        414,
        415,
        422,
    )


def is_unknown(error: Exception) -> bool:
    """Whether MLflow says that it has no such run or experiment."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def is_same(stored: float | None, value: float) -> bool:
    """Whether MLflow stores this as a metric's value."""
    if stored is None or math.isnan(stored) or math.isnan(value):
        return stored is not None and math.isnan(stored) and math.isnan(value)
    return stored == max(-LARGEST, min(value, LARGEST))


def fitting(text: str, chars: int) -> str:
    """The text as MLflow and its databases take it: not too long, UTF-8, without the NUL that PostgreSQL does not store."""
    return text.encode(errors="replace").decode().replace("\0", "")[:chars]


def one_line(error: BaseException) -> str:
    """What began an error: MLflow and what lies below it wrap, for instance, a refused connection six times."""
    while inner := error.__cause__ or (not error.__suppress_context__ and error.__context__):
        error = inner
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def quiet_mlflow() -> None:
    """Sets MLflow up for this process, before it is imported: silent, and without retries of its own.

    Its retries would repeat the making of a run that a server had made before it answered 500 or too late; ours look first.
    """
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(TIMEOUT_S))
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # a person is told by the tracker, once
    logging.getLogger("alembic").setLevel(logging.ERROR)
