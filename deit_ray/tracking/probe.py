"""Whether an MLflow server works: a run with a metric and an artifact is written, read back and deleted."""

import contextlib
import tempfile
import time
import uuid
from pathlib import Path

from deit_ray.errors import UnavailableError
from deit_ray.tracking.delivery import quiet_mlflow
from deit_ray.tracking.moved import follow_artifacts
from deit_ray.tracking.reasons import naming_server
from deit_ray.tracking.server import check_active

METRIC, VALUE, FILE = "deit_ray/probe", 0.5, "probe.txt"


def probe(uri: str, experiment: str, artifacts: str | None) -> str:
    """Writes a metric and an artifact into a new run, reads them back, and deletes the run with both.

    Where the experiment does not exist yet, the run is in an experiment of its own, which is deleted too.

    Args:
        uri: MLflow's tracking URI.
        experiment: MLflow's name of the experiment.
        artifacts: folder of the artifacts when the store is a local database.

    Returns:
        What was done, in words.

    Raises:
        UnavailableError: MLflow does not answer, or does not have what was written.
        UserError: somebody deleted the experiment.
    """
    quiet_mlflow()
    with naming_server(uri):
        return _probe(uri, experiment, artifacts)


def _probe(uri: str, experiment: str, artifacts: str | None) -> str:
    from mlflow.tracking import MlflowClient

    if artifacts is not None:
        follow_artifacts(uri, artifacts)
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    if found is not None:
        check_active(found)
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if found is None:
            location = artifacts if uri.startswith("sqlite:") else None
            made = client.create_experiment(f"deit_ray-doctor-{uuid.uuid4().hex}", location)
            stack.callback(client.delete_experiment, made)
        run = client.create_run(made if found is None else found.experiment_id, run_name="deit-ray doctor")
        stack.callback(client.delete_run, run.info.run_id)
        _write_and_read(client, run.info.run_id, stack)
    return f"wrote and read a metric and an artifact in {time.perf_counter() - begin:.1f} s"


def _write_and_read(client, run_id: str, stack: contextlib.ExitStack) -> None:
    token = uuid.uuid4().hex
    client.log_metric(run_id, METRIC, VALUE)
    values = [point.value for point in client.get_metric_history(run_id, METRIC)]
    if values != [VALUE]:
        raise UnavailableError(f"it answers with the metric {values}, where {VALUE} was written")
    with tempfile.TemporaryDirectory() as folder:
        path, back = Path(folder, FILE), Path(folder, "back")
        path.write_text(token)
        back.mkdir()
        stack.callback(_delete_artifact, client, run_id)
        client.log_artifact(run_id, str(path))
        if Path(client.download_artifacts(run_id, FILE, str(back))).read_text() != token:
            raise UnavailableError("it answers with another artifact than was written")


def _delete_artifact(client, run_id: str) -> None:
    """Deletes the artifact, which MLflow keeps with a deleted run."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    uri = client.get_run(run_id).info.artifact_uri
    get_artifact_repository(uri, tracking_uri=client.tracking_uri).delete_artifacts(FILE)
