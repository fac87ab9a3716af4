"""The artifacts of a database next to the results follow the results when these are moved or copied."""

import shutil
from pathlib import Path

import mlflow
import pytest

from deit_ray.outcome import Outcome
from deit_ray.tracking.tracker import Tracker
from tests.support.tracked import EXPERIMENT, Told, Trial, start

pytestmark = pytest.mark.usefixtures("impatient")


def track(results: Path, artifacts: Path | None = None) -> tuple[mlflow.MlflowClient, str]:
    """Delivers a run with a file that is new; returns a client, and MLflow's id of the run."""
    trial = Trial(results / "run-1")
    (results / "run-1" / "file.txt").write_text(str(results))
    uri, artifacts = f"sqlite:///{results}/mlflow.db", artifacts or results / "mlruns"
    with Tracker(uri, EXPERIMENT, str(artifacts), Told()) as tracker:
        run = start(tracker, trial)
        tracker.end_run(run, Outcome.cancelled(), trial.folder, "file.txt")
    return mlflow.MlflowClient(uri), run.record.run_id


@pytest.mark.parametrize("way", [shutil.move, shutil.copytree])
def test_artifacts_follow_results_that_were_moved_or_copied(tmp_path, way):
    before, after = tmp_path / "before", tmp_path / "after"
    _, run_id = track(before)
    way(before, after)
    shutil.rmtree(after / "run-1")  # so that a new run is made beside the old one
    kept = sorted(path for path in before.rglob("*") if path.is_file())
    client, new = track(after)
    assert sorted(path for path in before.rglob("*") if path.is_file()) == kept
    for found, text in ((run_id, str(before)), (new, str(after))):
        place = client.get_run(found).info.artifact_uri
        assert place.startswith(f"{after}/mlruns/")
        assert Path(client.download_artifacts(found, "file.txt", str(tmp_path))).read_text() == text


def test_a_persons_own_place_of_artifacts_stays(tmp_path):
    own, results = tmp_path / "own" / "mlruns", tmp_path / "results"
    own.mkdir(parents=True)
    results.mkdir()
    mlflow.MlflowClient(f"sqlite:///{results}/mlflow.db").create_experiment(EXPERIMENT, str(own))
    client, run_id = track(results)
    assert Path(f"{own}/{run_id}/artifacts/file.txt").exists()
    assert client.get_run(run_id).info.artifact_uri.startswith(str(own))
