"""MLflow gets the model of every finished run, and a study's best in its registry, once, whatever fails."""

import json
import time
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from deit_ray.outcome import Outcome
from deit_ray.tracking import tracker as tracking
from deit_ray.tracking.delivery import Delivery
from deit_ray.tracking.fetch import fetch_model
from deit_ray.tracking.model_server import ModelServer
from deit_ray.tracking.model_state import Weights
from deit_ray.tracking.tracked import Desired, Ending, Run
from deit_ray.tracking.tracker import Tracker
from tests.support.tracked import (
    EXPERIMENT,
    FINISHED,
    Told,
    Trial,
    deliver,
    models_below,
    registered_by,
    versions_of,
)

pytestmark = pytest.mark.usefixtures("impatient")
METRIC = "best/val_top1"
FILES = {
    "MLmodel",
    "conda.yaml",
    "experiment.yaml",
    "input_example.json",
    "model.safetensors",
    "python_env.yaml",
    "requirements.txt",
    "serving_input_example.json",
}


class SmallStudy:
    """A study whose trials have ended: `deliver` gives MLflow everything of it, with the last as its best."""

    def __init__(self, folder: Path):
        self.own, self.trials = Trial(folder), []
        self.add()

    def add(self) -> None:
        trial = Trial(Path(self.own.folder, f"trial-{len(self.trials):04d}"))
        trial.measure(1)
        trial.save_model(f"weights {len(self.trials)}".encode())
        self.trials.append(trial)

    def runs(self) -> list[Run]:
        """The runs as MLflow must have them, that of the study last."""
        name = Path(self.own.folder).name
        tags = {"deit_ray.study": name, "deit_ray.folder": self.own.folder}
        parent = Run(Desired(name, self.own.folder, tags, {}, None, 1000))
        children = []
        for number, trial in enumerate(self.trials):
            tags = {"deit_ray.study": name, "deit_ray.folder": trial.folder}
            model = Weights(f"{trial.folder}/model.safetensors", "epoch-1")
            ending = Ending(FINISHED, (), {METRIC: number / 10}, 2000, model=model)
            desired = Desired(
                f"trial {number}", trial.folder, tags, {"lr": "1"}, f"{trial.folder}/journal", 1000, ending
            )
            children.append(Run(desired, parent))
        best = Ending(FINISHED, (), {}, 3000, best=children[-1])
        parent.desired = replace(parent.desired, ending=best)
        return [*children, parent]

    def deliver(self, server: ModelServer, told: Told | None = None) -> None:
        delivery = Delivery(server, told if told is not None else Told())
        for run in self.runs():
            delivery.deliver(run)

    def assert_delivered(self, uri: str, versions: int = 1) -> None:
        """MLflow has each model once, and the best one in its registry."""
        client = mlflow.MlflowClient(uri)
        found = models_below(uri, self.own.folder, EXPERIMENT)
        assert [model.tags["deit_ray.folder"] for model in found] == [t.folder for t in self.trials]
        for model, trial in zip(found, self.trials, strict=True):
            (run,) = trial.runs(uri)
            assert (str(model.status), model.source_run_id) == ("READY", run.info.run_id)
            assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
            assert {file.path for file in client.list_logged_model_artifacts(model.model_id)} == FILES
            assert model.tags["deit_ray.id"] == f"{trial.record()['id']}-epoch-1"
            assert [(metric.key, metric.value) for metric in model.metrics] == [
                (METRIC, run.data.metrics[METRIC])
            ]
            assert model.params == {"lr": "1"}
            assert run.info.status == "FINISHED"
            assert trial.delivered(uri) == trial.written()
            assert len(client.get_metric_history(run.info.run_id, METRIC)) == 1
        registered = registered_by(uri, self.own.folder)
        made = versions_of(uri, registered.name)
        assert len(made) == versions
        best = made[-1]
        assert registered.aliases == {"best": best.version}
        assert best.tags["deit_ray.id"] == found[-1].tags["deit_ray.id"]
        assert best.run_id == found[-1].source_run_id
        named = [{"name": registered.name, "version": int(best.version)}]
        assert json.loads(found[-1].tags["mlflow.modelVersions"]) == named
        (parent,) = self.own.runs(uri)
        listed = [output.model_id for output in parent.outputs.model_outputs]  # each best one that it had
        assert (listed.count(found[-1].model_id), len(listed)) == (1, versions)


@pytest.fixture
def study(tmp_path) -> SmallStudy:
    """A study of one trial; its name is that of no other test's."""
    return SmallStudy(tmp_path / f"{tmp_path.name.replace('_', '-')}-{time.time_ns()}")


def new_server(uri: str, kind: type = ModelServer, artifacts: str | None = None) -> ModelServer:
    return kind(uri, EXPERIMENT, artifacts, lambda: None)


def test_every_finished_trial_has_a_model_and_the_best_is_registered(server, study):
    study.deliver(new_server(server.uri))
    study.assert_delivered(server.uri)
    study.deliver(new_server(server.uri))  # as a sync does
    study.assert_delivered(server.uri)
    study.add()  # as a resume with more trials, whose new one is the best
    study.deliver(new_server(server.uri))
    study.assert_delivered(server.uri, versions=2)


PARTS = ("logged-models", "outputs", "registered-models", "model-versions", "mlflow-artifacts", "log-batch")


def test_each_request_whose_answer_is_lost_is_done_once(server, proxy, study, monkeypatch):
    fail_each_once(server, proxy, study, "fail_after", monkeypatch)


@pytest.mark.parametrize("mode", ["close_after", "refuse_before"])
def test_each_request_that_fails_otherwise_is_done_once(thorough, server, proxy, study, mode, monkeypatch):
    fail_each_once(server, proxy, study, mode, monkeypatch)


def fail_each_once(server, proxy, study: SmallStudy, mode: str, monkeypatch) -> None:
    """Delivers a study while each kind of request about models fails when it comes for the first time."""
    monkeypatch.setattr(tracking, "PAUSE_S", (0.02, 0.05))
    failed = set()

    def mode_for(path: str) -> str:
        proxy.seen.append(path)
        kind = kind_of(proxy.method, path)
        if kind in failed or not any(part in path for part in PARTS):
            return "pass"
        failed.add(kind)
        return mode

    proxy._mode_for = mode_for
    told = Told()
    with Tracker(proxy.uri, EXPERIMENT, None, told) as tracker:
        for run in study.runs():
            tracker.runs.add(run)
        tracker.wake.set()
    study.assert_delivered(server.uri)
    assert failed >= {
        "POST logged-models search",
        "POST logged-models",
        "GET logged-models ID",
        "upload",
        "POST runs outputs",
        "POST runs log-batch",
        "PATCH logged-models ID",
        "GET registered-models get",
        "POST registered-models create",
        "GET model-versions search",
        "POST model-versions create",
        "POST registered-models alias",
    }
    assert not [text for text in told if not text.startswith("tracking ")], told


def kind_of(method: str, path: str) -> str:
    """The kind of a request: its method, and its path without ids. All uploads are one kind."""
    if "mlflow-artifacts" in path:
        return "upload"
    words = path.partition("?")[0].removeprefix("/api/2.0/mlflow/").split("/")
    return " ".join([method, *("ID" if any(c.isdigit() for c in word) else word for word in words)])


class Killed(Exception):
    """Stands for the end of the process."""


def test_a_driver_that_is_killed_after_any_request_loses_and_doubles_nothing(server, study):
    """The next driver begins with what the killed one had saved, and with what MLflow had got."""

    class Mortal(ModelServer):
        left = 0

        def _request(self, function, *arguments, **options):
            answer = super()._request(function, *arguments, **options)
            Mortal.left -= not function.__name__.startswith(("get", "search"))
            if Mortal.left == 0:
                raise Killed
            return answer

    kills, done = 0, False
    while not done:  # each driver changes one to three things in MLflow; an upload is two
        Mortal.left = 1 + kills % 3
        try:
            study.deliver(new_server(server.uri, Mortal))
            done = True
        except Killed:
            kills += 1
    assert kills > 12
    study.assert_delivered(server.uri)


def test_second_models_and_versions_of_late_requests_are_deleted(thorough, server, study):
    study.deliver(new_server(server.uri))
    client, (model,) = mlflow.MlflowClient(server.uri), models_below(server.uri, study.own.folder, EXPERIMENT)
    name = registered_by(server.uri, study.own.folder).name
    (version,) = versions_of(server.uri, name)
    own = {key: value for key, value in model.tags.items() if key.startswith("deit_ray.")}
    client.create_logged_model(model.experiment_id, "late", model.source_run_id, own)
    client.create_model_version(
        name, f"models:/{model.model_id}", tags=dict(version.tags), model_id=model.model_id
    )
    study.deliver(new_server(server.uri))
    study.assert_delivered(server.uri)
    client.delete_logged_model(model.model_id)  # a person deletes it: a sync makes it again
    client.delete_run(study.trials[0].runs(server.uri)[0].info.run_id)
    study.deliver(new_server(server.uri))
    (again,) = models_below(server.uri, study.own.folder, EXPERIMENT)
    assert again.model_id != model.model_id
    (version,) = versions_of(server.uri, name)
    assert version.tags["deit_ray.model"] == again.model_id


def test_a_name_that_another_study_has_gets_letters_of_the_identity(thorough, server, study, tmp_path):
    study.deliver(new_server(server.uri))
    name, told = Path(study.own.folder).name, Told()
    other = SmallStudy(tmp_path / "elsewhere" / name)
    other.deliver(new_server(server.uri), told)
    longer = f"{name}-{other.own.record()['id'][:8]}"
    assert registered_by(server.uri, other.own.folder).name == longer
    assert told.count_of(f"the best model of this study is models:/{longer}@best") == 1
    other.deliver(new_server(server.uri), told)
    assert len(told) == 1
    study.assert_delivered(server.uri)
    other.assert_delivered(server.uri)


def test_a_store_of_artifacts_that_fails_holds_back_models_alone(thorough, server, proxy, study):
    told = Told()
    proxy.misbehave("refuse_before", "mlflow-artifacts")
    with Tracker(proxy.uri, EXPERIMENT, None, told) as tracker:
        for run in study.runs():
            tracker.runs.add(run)
    (trial,) = study.trials
    assert trial.delivered(server.uri) == trial.written()
    assert {run.info.status for each in (trial, study.own) for run in each.runs(server.uri)} == {"FINISHED"}
    assert told.count_of("MLflow takes no artifacts") == 1
    proxy.misbehave("pass")
    study.deliver(new_server(proxy.uri))  # as a sync does
    study.assert_delivered(server.uri)


@pytest.mark.parametrize("part", ["logged-models", "registered-models"])
def test_a_server_without_models_gets_everything_else(thorough, server, proxy, study, part):
    told = Told()
    study.add()
    proxy.misbehave("missing", part)
    study.deliver(new_server(proxy.uri), told)
    assert told == ["MLflow takes no models (it is older than MLflow 3); everything else is delivered"]
    for each in (*study.trials, study.own):
        (run,) = each.runs(server.uri)
        assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "finished")
        assert each is study.own or each.delivered(server.uri) == each.written()


def test_a_run_that_was_continued_gets_another_model(thorough, server, tmp_path):
    trial = Trial(tmp_path / "long-1")
    trial.measure(1)
    for version, weights in (("step-10", b"first"), ("step-20", b"second"), ("step-20", b"second")):
        trial.save_model(weights)
        deliver(server.uri, trial, model=Weights(f"{trial.folder}/model.safetensors", version))
    found = models_below(server.uri, trial.folder, EXPERIMENT)
    identity = trial.record()["id"]
    assert [model.tags["deit_ray.id"] for model in found] == [f"{identity}-step-10", f"{identity}-step-20"]
    assert {model.name for model in found} == {"long-1"}
    client = mlflow.MlflowClient(server.uri)
    paths = [Path(fetch_model(model.model_uri, server.uri)) for model in found]
    assert [path.read_bytes() for path in paths] == [b"first", b"second"]
    assert len(client.get_run(found[0].source_run_id).outputs.model_outputs) == 2


def test_in_a_folder_of_this_machine_a_model_is_a_link_and_takes_no_bytes(thorough, study, tmp_path):
    uri, artifacts = f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "my mlruns")
    study.deliver(new_server(uri, artifacts=artifacts))
    study.assert_delivered(uri)
    (linked,) = Path(artifacts).glob("models/*/artifacts/model.safetensors")
    assert linked.samefile(f"{study.trials[0].folder}/model.safetensors")
    study.trials[0].save_model(b"another")  # as every file, it is written beside and renamed
    assert linked.read_bytes() == b"weights 0"


def test_a_run_that_has_not_finished_has_no_model(server, tmp_path):
    trial = Trial(tmp_path / "failed-1")
    trial.save_model(b"weights")
    deliver(server.uri, trial, outcome=Outcome.failed("x"))
    assert models_below(server.uri, trial.folder, EXPERIMENT) == []
