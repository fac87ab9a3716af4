"""MLflow, and the only file that knows it: the driver delivers runs and points in the background.

Training never waits for the server: everything is queued, sent in order by one thread, and tried again while the server
is away. Points come from the trials' journals, with the time they were measured at, so that MLflow, which stores a
point once by (run, name, time, step, value), takes a repeated delivery without doubling.
"""

import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from deit_ray import storage
from deit_ray.config import Experiment
from deit_ray.journal import iterate_segments

POLL_S = 1.0  # between looks at the journals of running trials
RETRY_S = 5.0
HASTE_S = 5.0  # the same when the study ends by Ctrl-C or an error
PATIENCE_S = 20.0  # how long the end of a study waits for a server that is away
BATCH = 1000  # points in one request, MLflow's limit

STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped early": "KILLED", "cancelled": "KILLED"}


@dataclass
class Run:
    """A run as the driver knows it; its MLflow id is filled in by the delivery thread."""

    name: str
    journal: str | None
    run_id: str | None = None
    next_segment: int = 0
    ended: bool = field(default=False)


class Tracker:
    """Delivers to MLflow. Use it as a context manager: leaving it waits for what is queued, a while.

    Args:
        uri: MLflow's tracking URI.
        experiment: MLflow's name of the experiment.
        artifacts: where artifacts go when the store is a local database.
        warn: tells a person that tracking is behind.
    """

    def __init__(self, uri: str, experiment: str, artifacts: str | None, warn: Callable[[str], None]):
        self.uri, self.experiment, self.artifacts, self.warn = uri, experiment, artifacts, warn
        self.jobs: queue.Queue = queue.Queue()
        self.live: list[Run] = []
        self.closing, self.behind = threading.Event(), False
        self.client = self.experiment_id = None
        self.thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self.thread.start()

    @classmethod
    def of(cls, experiment: Experiment, console) -> "Tracker":
        results = storage.absolute(experiment.results.uri)
        return cls(tracking_uri(experiment), experiment.tracking.experiment, storage.join(results, "mlruns"), console.warn)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind, *exception) -> None:
        self.closing.set()
        self.thread.join(PATIENCE_S if kind is None else HASTE_S)
        if self.thread.is_alive():
            self.warn(f"MLflow at {self.uri} did not answer; {self.jobs.qsize()} deliveries are left in the journals")

    def start_run(
        self,
        name: str,
        tags: dict[str, str],
        params: dict[str, str],
        folder: str,
        parent: Run | None = None,
        journal=True,
    ) -> Run:
        """Opens a run, or finds it where it was opened before: its identity is its folder.

        Args:
            name: what MLflow's list shows.
            tags, params: of the run.
            folder: URI of the run's results; its experiment.yaml becomes an artifact, its journal the curves.
            parent: the study's run, for a trial.
            journal: whether the folder has one.
        """
        run = Run(name, storage.join(folder, "journal") if journal else None)
        self.live.append(run)

        def open_run():
            from mlflow.entities import Param
            from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_SOURCE_NAME, MLFLOW_USER

            found = self.client.search_runs([self.experiment_id], f"tags.`deit_ray.folder` = '{folder}'", max_results=1)
            if found:
                run.run_id = found[0].info.run_id
                self.client.update_run(run.run_id, status="RUNNING")
                return
            all_tags = {f"deit_ray.{key}": value for key, value in tags.items()} | {"deit_ray.folder": folder}
            all_tags |= {MLFLOW_SOURCE_NAME: "deit-ray", MLFLOW_USER: os.environ.get("USER", "unknown")}
            if parent is not None:
                all_tags[MLFLOW_PARENT_RUN_ID] = parent.run_id
            run.run_id = self.client.create_run(self.experiment_id, tags=all_tags, run_name=name).info.run_id
            self.client.log_batch(run.run_id, params=[Param(k, str(v)) for k, v in params.items()])
            self._log_artifact(run, storage.join(folder, "experiment.yaml"))

        self.jobs.put(open_run)
        return run

    def end_run(self, run: Run, outcome: str, folder: str, *files: str, metrics: dict[str, float] | None = None) -> None:
        """Delivers the rest of a run's journal and some of its files, and closes it.

        Args:
            outcome: finished, failed: REASON, stopped early at epoch N, or cancelled; MLflow's status follows from it.
            folder: where the files are.
            files: names of artifacts.
            metrics: last values that are in no journal.
        """

        def close_run():
            from mlflow.entities import Metric

            self._deliver_points(run)
            now = time.time_ns() // 1_000_000
            self.client.log_batch(run.run_id, metrics=[Metric(k, v, now, 0) for k, v in (metrics or {}).items()])
            for file in files:
                self._log_artifact(run, storage.join(folder, file))
            self.client.set_tag(run.run_id, "outcome", outcome)
            status = next(status for prefix, status in STATUS.items() if outcome.startswith(prefix))
            self.client.set_terminated(run.run_id, status)
            run.ended = True

        self.jobs.put(close_run)

    def _deliver(self) -> None:
        while True:
            if not self._try(self._connect):
                return
            closing = self.closing.is_set()
            try:
                job = self.jobs.get(timeout=POLL_S if not closing else 0.01)
            except queue.Empty:
                if closing:
                    return
                self.live = [run for run in self.live if not run.ended]
                for run in self.live:
                    if run.run_id:
                        self._try(lambda run=run: self._deliver_points(run))
                continue
            if not self._try(job):
                return

    def _try(self, job: Callable[[], None]) -> bool:
        """Does a job, again and again while it fails; False when the end came first."""
        deadline = None
        while True:
            try:
                job()
            except Exception as error:  # whatever the server or the network raises: the journals keep the data
                if not self.behind:
                    self.behind = True
                    self.warn(f"MLflow at {self.uri} does not take deliveries ({type(error).__name__}: {str(error)[:200]}); "
                              "training goes on, they are tried again")  # fmt: skip
                if self.closing.is_set():
                    deadline = deadline or time.monotonic() + PATIENCE_S / 2
                    if time.monotonic() > deadline:
                        return False
                self.closing.wait(RETRY_S) if not self.closing.is_set() else time.sleep(1)
            else:
                if self.behind:
                    self.behind = False
                    self.warn(f"MLflow at {self.uri} takes deliveries again")
                return True

    def _connect(self) -> None:
        if self.client is not None:
            return
        quiet_mlflow()
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                location = self.artifacts if self.uri.startswith("sqlite:") else None
                kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens on training runs
                self.experiment_id = client.create_experiment(self.experiment, artifact_location=location, tags=kind)
            except MlflowException:
                found = client.get_experiment_by_name(self.experiment)  # made by another driver in between
        if found is not None:
            self.experiment_id = found.experiment_id
        self.client = client

    def _deliver_points(self, run: Run) -> None:
        if run.journal is None:
            return
        from mlflow.entities import Metric

        for points in iterate_segments(run.journal, run.next_segment):
            metrics = [Metric(p.name, p.value, p.time_ms, p.step) for p in points]
            for first in range(0, len(metrics), BATCH):
                self.client.log_batch(run.run_id, metrics=metrics[first : first + BATCH])
            run.next_segment += 1

    def _log_artifact(self, run: Run, uri: str) -> None:
        if not storage.exists(uri):
            return
        if storage.is_local(uri):
            self.client.log_artifact(run.run_id, storage.local_path(uri))
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / uri.rpartition("/")[2]
            path.write_bytes(storage.read_bytes(uri))
            self.client.log_artifact(run.run_id, str(path))


def tracking_uri(experiment: Experiment) -> str:
    """MLflow's URI of an experiment: the one it names, or a SQLite file next to the results."""
    if experiment.tracking.uri:
        return experiment.tracking.uri
    results = storage.absolute(experiment.results.uri)
    if not storage.is_local(results):
        from deit_ray.errors import UserError

        raise UserError(f"tracking.uri: missing; results.uri is {results}, where no SQLite file can be: name an MLflow server")
    return f"sqlite:///{results}/mlflow.db"


def quiet_mlflow() -> None:
    """Keeps MLflow and the database migrations that it runs from writing to the terminal."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # read when MLflow is imported
    logging.getLogger("alembic").setLevel(logging.ERROR)
