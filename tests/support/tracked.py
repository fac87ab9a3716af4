"""Runs to track: folders with journals, and what MLflow has of these runs."""

import json
from pathlib import Path

import mlflow

from deit_ray import storage
from deit_ray.outcome import Outcome
from deit_ray.results.journal import JournalWriter, iterate_points
from deit_ray.tracking.curves import is_curve
from deit_ray.tracking.tracked import Run
from deit_ray.tracking.tracker import Tracker

EXPERIMENT = "tests"
FINISHED = Outcome.finished()


class Told(list):
    """What a person was told."""

    def __call__(self, text: str) -> None:
        self.append(text)

    def count_of(self, words: str) -> int:
        return sum(words in text for text in self)


class Trial:
    """A trial's folder, with its journal."""

    def __init__(self, folder: Path):
        self.folder = str(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "experiment.yaml").exists():
            (folder / "experiment.yaml").write_text("name: x\n")
        self.journal, self.step = JournalWriter(f"{folder}/journal"), 0

    def measure(self, points: int = 5) -> None:
        for _ in range(points):
            self.step += 1
            self.journal.add({"train/loss": 1 / self.step, "val/top1": self.step / 100}, self.step)
        self.journal.flush()

    def save_model(self, weights: bytes) -> None:
        storage.write_bytes(f"{self.folder}/model.safetensors", weights)

    def record(self) -> dict:
        return json.loads(Path(self.folder, "tracking.json").read_text())

    def change_record(self, **values) -> None:
        Path(self.folder, "tracking.json").write_text(json.dumps(self.record() | values))

    def written(self) -> list[tuple]:
        """The points of the journal that are curves in MLflow."""
        return [
            (point.name, point.step, point.value, point.time_ms)
            for point in sorted(iterate_points(f"{self.folder}/journal"), key=lambda p: (p.name, p.step))
            if is_curve(point.name)
        ]

    def runs(self, uri: str) -> list:
        """The trial's runs in MLflow that are not deleted."""
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        return (
            client.search_runs([experiment.experiment_id], f"tags.`deit_ray.folder` = '{self.folder}'")
            if experiment
            else []
        )

    def delivered(self, uri: str) -> list[tuple]:
        """The points of the trial's only run in MLflow."""
        (run,) = self.runs(uri)
        return sorted((p.key, p.step, p.value, p.timestamp) for p in history_of(uri, run))


def runs_below(uri: str, folder) -> list:
    """The MLflow runs of all runs, studies and trials below a results folder."""
    client = mlflow.MlflowClient(uri)
    experiment_id = client.get_experiment_by_name("deit_ray").experiment_id
    return client.search_runs([experiment_id], f"tags.`deit_ray.folder` LIKE '{folder}/%'", max_results=1000)


def history_of(uri: str, run) -> list:
    """All points of a run's curves in MLflow; the final values, best/NAME, are in no journal."""
    client = mlflow.MlflowClient(uri)
    names = [name for name in run.data.metrics if not name.startswith("best/")]
    return [point for name in names for point in client.get_metric_history(run.info.run_id, name)]


def models_below(uri: str, folder, experiment: str = "deit_ray") -> list:
    """MLflow's models of a run, or of all trials of a study, by its folder; the earliest first."""
    client = mlflow.MlflowClient(uri)
    found = client.search_logged_models(
        [client.get_experiment_by_name(experiment).experiment_id], max_results=1000
    )
    own = [model for model in found if f"{model.tags.get('deit_ray.folder')}/".startswith(f"{folder}/")]
    return sorted(own, key=lambda model: (model.creation_timestamp, model.model_id))


def registered_by(uri: str, folder):
    """MLflow's registered model of a study, by its folder; None if there is none."""
    found = mlflow.MlflowClient(uri).search_registered_models(max_results=1000)
    return next((model for model in found if model.tags.get("deit_ray.folder") == str(folder)), None)


def versions_of(uri: str, name: str) -> list:
    """The versions of a registered model, the earliest first."""
    found = mlflow.MlflowClient(uri).search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda version: int(version.version))


def ranked_by_mlflow(
    uri: str, study: Path | str, metric: str, experiment: str = "deit_ray"
) -> list[tuple[int, float]]:
    """(number, best value of a metric) of the trials that have it, as MLflow's table sorts them.

    Args:
        study: its folder.
    """
    client, best = mlflow.MlflowClient(uri), f"best/{metric.replace('/', '_')}"
    runs = client.search_runs(
        [client.get_experiment_by_name(experiment).experiment_id],
        f"tags.`deit_ray.folder` LIKE '{study}/trial-%'",
        order_by=[f"metrics.`{best}` DESC"],
    )
    found = [(int(run.data.tags["deit_ray.trial"]), run.data.metrics.get(best)) for run in runs]
    return [(number, value) for number, value in found if value is not None]


def inputs_of(run) -> dict[str, tuple[str, str, int | None]]:
    """The data sets of an MLflow run by context: (name, digest, number of rows)."""
    found = {}
    for given in run.inputs.dataset_inputs:
        (context,) = [tag.value for tag in given.tags if tag.key == "mlflow.data.context"]
        rows = json.loads(given.dataset.profile or "{}").get("num_rows")
        found[context] = (given.dataset.name, given.dataset.digest, rows)
    assert len(found) == len(run.inputs.dataset_inputs)
    return found


def start(tracker: Tracker, trial: Trial, **options) -> Run:
    return tracker.start_run("trial 000", {"kind": "trial"}, {"optim.lr": 1e-3}, trial.folder, **options)


def deliver(uri: str, trial: Trial, told: Told | None = None, outcome: Outcome = FINISHED, **ending) -> None:
    """Starts a trial's run, delivers all its points, and ends it."""
    with Tracker(uri, EXPERIMENT, None, told if told is not None else Told()) as tracker:
        tracker.end_run(start(tracker, trial), outcome, trial.folder, **ending)
