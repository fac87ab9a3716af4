"""The requests that deliveries send to an MLflow server, for one of its experiments."""

import contextlib
import posixpath
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from deit_ray import storage
from deit_ray.errors import UserError
from deit_ray.results.journal import Point
from deit_ray.results.origin import user
from deit_ray.tracking.datasets import Dataset
from deit_ray.tracking.moved import follow_artifacts
from deit_ray.tracking.requests import IDENTITY, PARENT, CreateRun, Describe, LogEnding, SetDescription
from deit_ray.tracking.tracked import Found
from deit_ray.tracking.view import View

BATCH = 1000  # points in one request, MLflow's limit
# The tag by which MLflow's pages open an experiment as model training. Its Python code has no name for it.
KIND = ("mlflow.experimentKind", "custom_model_development")


class Server:
    """Sends requests to MLflow, one at a time. Errors of the server and the network pass through.

    Args:
        uri: MLflow's tracking URI.
        experiment: MLflow's name of the experiment.
        artifacts: folder of the artifacts when the store is a local database.
        before_request: called before every request. If it raises an exception, the request is not sent.

    Attributes:
        experiment_id: MLflow's id of the experiment; None until `connect` has found it.
        answers: number of requests that were answered.
    """

    def __init__(self, uri: str, experiment: str, artifacts: str | None, before_request: Callable[[], None]):
        self.uri, self.experiment, self.artifacts = uri, experiment, artifacts
        self.before_request = before_request
        self.client = self.experiment_id = None
        self.answers = 0

    def connect(self) -> None:
        """Finds the experiment, or creates it, unless that was done before; gives it a kind if it has none.

        Raises:
            Deleted: somebody deleted the experiment.
        """
        if self.client is None and self.artifacts is not None:
            follow_artifacts(self.uri, self.artifacts)
        self._make_client()
        if self.experiment_id is not None:
            return
        found = self._request(self.client.get_experiment_by_name, self.experiment)
        if found is None:
            location = self.artifacts if self.uri.startswith("sqlite:") else None
            self._request(
                self.client.create_experiment, self.experiment, artifact_location=location, tags=dict([KIND])
            )
            found = self._request(self.client.get_experiment_by_name, self.experiment)
        check_active(found)
        if KIND[0] not in found.tags:  # made by an earlier version, or by a person, who may set another one
            self._set_kind(found.experiment_id)
        self.experiment_id = found.experiment_id

    def _set_kind(self, experiment_id: str) -> None:
        """Sets the experiment's kind, unless this login may only write runs, which need no kind."""
        try:
            self._request(self.client.set_experiment_tag, experiment_id, *KIND)
        except Exception as error:
            if getattr(error, "error_code", None) != "PERMISSION_DENIED":
                raise

    def _make_client(self) -> None:
        if self.client is None:
            from mlflow.tracking import MlflowClient

            self.client = MlflowClient(tracking_uri=self.uri)

    def find_experiment(self) -> bool:
        """Finds the experiment, as far as it exists and was not deleted; nothing is created."""
        self._make_client()
        found = self._request(self.client.get_experiment_by_name, self.experiment)
        if found is None or found.lifecycle_stage != "active":
            return False
        self.experiment_id = found.experiment_id
        return True

    def share_view(self, view: View) -> bool:
        """Saves a study's view, unless MLflow has it or a person has saved another one in its place.

        Returns:
            Whether it was saved.
        """
        found = self._request(self.client.get_experiment, self.experiment_id)
        if not view.is_missing(found.tags.get(view.tag)):
            return False
        value = view.value(int(1000 * time.time()))
        self._offer(None, self.client.set_experiment_tag, self.experiment_id, view.tag, value)
        return True

    def delete_view(self, tag: str) -> None:
        """Deletes a study's view by its tag. It may be repeated."""
        if tag in self._request(self.client.get_experiment, self.experiment_id).tags:
            self._request(self.client.delete_experiment_tag, self.experiment_id, tag)

    def create_run(self, request: CreateRun) -> Found:
        from mlflow.utils.mlflow_tags import MLFLOW_SOURCE_NAME, MLFLOW_USER

        options = {
            "start_time": request.started_ms,
            "run_name": request.name,
            "tags": {MLFLOW_SOURCE_NAME: "deit-ray", MLFLOW_USER: user()} | dict(request.tags),
        }
        return found_of(self._offer(None, self.client.create_run, self.experiment_id, **options))

    def find_run(self, run_id: str) -> Found | None:
        """The run of an id; None if MLflow does not have it, or somebody deleted it."""
        try:
            run = self._request(self.client.get_run, run_id)
        except Exception as error:
            if not is_unknown(error):
                raise
            return None
        return found_of(run) if run.info.lifecycle_stage == "active" else None

    def find_all(self, identity: str) -> list[Found]:
        """All runs of an identity, the earliest first."""
        query = f"tags.`{IDENTITY}` = '{identity}'"
        runs = self._request(self.client.search_runs, [self.experiment_id], query)
        return [found_of(run) for run in sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))]

    def describe(self, run_id: str, request: Describe) -> None:
        from mlflow.entities import Param, RunTag

        tags = [RunTag(*tag) for tag in request.tags]
        params = [Param(*param) for param in request.params]
        self._offer(run_id, self.client.log_batch, run_id, params=params, tags=tags)

    def log_datasets(self, run_id: str, datasets: tuple[Dataset, ...]) -> None:
        inputs = [dataset.as_input() for dataset in datasets]
        self._offer(run_id, self.client.log_inputs, run_id, datasets=inputs)

    def set_description(self, run_id: str, request: SetDescription) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(*tag) for tag in request.tags]
        self._offer(run_id, self.client.log_batch, run_id, tags=tags)

    def log_points(self, run_id: str, points: list[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(point.name, point.value, point.time_ms, point.step) for point in points]
        for first in range(0, len(metrics), BATCH):
            batch = metrics[first : first + BATCH]
            self._offer(run_id, self.client.log_batch, run_id, metrics=batch)

    def log_artifact(self, run_id: str, uri: str) -> None:
        """Uploads a file, if it exists."""
        with contextlib.ExitStack() as stack:
            try:
                path = stack.enter_context(local_copy(uri))
            except FileNotFoundError:
                return
            self._offer(run_id, self.client.log_artifact, run_id, path)

    def is_answering(self, run_id: str) -> bool:
        """Whether MLflow answers a request about a run: then it is its store of artifacts that fails."""
        try:
            self._request(self.client.get_run, run_id)
        except Exception:  # whichever; the caller has another one to raise
            return False
        return True

    def delete_tag(self, run_id: str, key: str) -> None:
        self._request(self.client.delete_tag, run_id, key)

    def reopen(self, run_id: str) -> None:
        self._request(self.client.update_run, run_id, status="RUNNING")

    def delete_duplicate(self, duplicate: str, kept: str) -> None:
        """Deletes a duplicate of a run, after its child runs were moved to the run that is kept."""
        children = f"tags.`{PARENT}` = '{duplicate}'"
        while found := self._request(self.client.search_runs, [self.experiment_id], children):
            for child in found:
                self._request(self.client.set_tag, child.info.run_id, PARENT, kept)
        self._request(self.client.delete_run, duplicate)

    def delete_run(self, run_id: str) -> None:
        """Deletes a run. MLflow keeps what is deleted until its `gc`."""
        self._request(self.client.delete_run, run_id)

    def log_ending(self, run_id: str, request: LogEnding) -> None:
        from mlflow.entities import Metric, RunTag

        metrics = [Metric(name, value, request.time_ms, 0) for name, value in request.metrics]
        tags = [RunTag(*tag) for tag in request.tags]
        self._offer(run_id, self.client.log_batch, run_id, metrics=metrics, tags=tags)

    def terminate(self, run_id: str, status: str, time_ms: int) -> None:
        self._request(self.client.set_terminated, run_id, status, time_ms)

    def _request(self, function: Callable, *arguments, **options):
        """Sends one request; returns its answer."""
        self.before_request()
        answer = function(*arguments, **options)
        self.answers += 1
        return answer

    def _offer(self, run_id: str | None, function: Callable, *arguments, **options):
        """Sends one request that MLflow may refuse as invalid. Repeating it would not help.

        Raises:
            Refused: MLflow refuses the request.
            Gone: MLflow refuses the request because somebody deleted the run.
        """
        try:
            return self._request(function, *arguments, **options)
        except Exception as error:
            if not is_refusal(error):
                raise
            if run_id and self._request(self.client.get_run, run_id).info.lifecycle_stage != "active":
                raise Gone from error
            raise Refused from error


def check_active(experiment) -> None:
    """Refuses an experiment of MLflow that somebody deleted.

    Raises:
        Deleted: it was deleted; the message says how it can be restored.
    """
    if experiment.lifecycle_stage != "active":
        raise Deleted(
            f"its experiment {experiment.name} was deleted; restore it with `mlflow experiments restore "
            f"-x {experiment.experiment_id}`, or name another one in tracking.experiment"
        )


class Deleted(UserError):
    """Somebody deleted the experiment: until a person acts, nothing can be delivered."""


class Refused(Exception):
    """MLflow refuses a request as invalid, so a retry would not help."""


class Gone(Exception):
    """MLflow no longer has the run."""


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[str]:
    """The path of a file on this machine.

    Raises:
        FileNotFoundError: there is no such file.
        Refused: the file cannot be read, so it can never be delivered.
    """
    if storage.is_local(uri):
        path = storage.local_path(uri)
        try:
            open(path, "rb").close()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise Refused from error
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, posixpath.basename(uri))
        path.write_bytes(storage.read_bytes(uri))
        yield str(path)


def found_of(run) -> Found:
    """A `Found` from one of MLflow's runs."""
    data = run.data
    inputs = run.inputs.dataset_inputs if run.inputs else ()
    datasets = {(found.dataset.name, found.dataset.digest) for found in inputs}
    return Found(
        run.info.run_id,
        run.info.status,
        dict(data.tags),
        frozenset(data.params),
        dict(data.metrics),
        datasets=frozenset(datasets),
    )


def is_refusal(error: Exception) -> bool:
    """Whether MLflow says that a request is invalid. BAD_REQUEST does not: a database may cause it."""
    # uploads of artifacts fail with an HTTP status
    status = getattr(getattr(error, "response", None), "status_code", None)
    invalid = (400, 405, 411, 413, 414, 415, 422)
    return getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE" or status in invalid


def is_unknown(error: Exception) -> bool:
    """Whether MLflow says that it has no such run or experiment."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"
