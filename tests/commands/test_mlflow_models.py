"""MLflow's models give the answers of `deit-ray predict`, which takes them by their names in MLflow."""

import base64
import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from deit_ray.commands.predict import find_model, predict
from deit_ray.errors import UserError
from deit_ray.study.study import Study
from tests.support.commands import call, wait_for
from tests.support.pictures import image_file, turned
from tests.support.servers import answers, free_port, kill_session
from tests.support.tracked import models_below, registered_by


@pytest.fixture
def pictures(tmp_path) -> dict[str, bytes]:
    """Image files by path: of two formats, one that asks for a rotation, and a broken one."""
    contents = {
        "a.jpg": image_file("JPEG"),
        "b.png": image_file("PNG"),
        "c.jpg": turned("JPEG", 6),
        "d.jpg": image_file("JPEG")[:500],
    }
    found = {str(tmp_path / name): content for name, content in contents.items()}
    for path, content in found.items():
        Path(path).write_bytes(content)
    return found


@pytest.fixture
def best(finished_study, server) -> str:
    """The URI of the finished study's best model in MLflow's registry."""
    return f"models:/{registered_by(server.uri, finished_study.folder).name}@best"


def assert_same_answers(rows: list[dict], model: str, pictures: dict[str, bytes]) -> None:
    """MLflow's answers are those of `predict`."""
    for row, prediction in zip(rows, predict(model, list(pictures)), strict=True):
        assert row["problem"] == prediction.problem
        assert row["classes"] == [name for name, _ in prediction.classes]
        assert row["probabilities"] == pytest.approx([p for _, p in prediction.classes], abs=1e-6)
        name, probability = prediction.classes[0] if prediction.classes else (None, None)
        assert row["class"] == name
        assert row["probability"] == (probability and pytest.approx(probability, abs=1e-6))


def test_mlflow_loads_the_model_of_each_finished_trial(finished_study, server, pictures, best, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    images = pd.DataFrame({"image": list(pictures.values())})
    study = Study.open("short-1", str(finished_study.results))
    for found in models_below(server.uri, finished_study.folder):
        model = mlflow.pyfunc.load_model(found.model_uri)
        folder = found.tags["deit_ray.folder"]
        assert_same_answers(model.predict(images).to_dict("records"), folder, pictures)
    model = mlflow.pyfunc.load_model(best)
    assert_same_answers(
        model.predict(images).to_dict("records"), study.trial_folder(study.best().number), pictures
    )
    first = model.predict(images.iloc[1:2], params={"top": 1})
    assert (list(first.index), [len(classes) for classes in first["classes"]]) == ([1], [1])
    # its own example, as MLflow's pages show it
    assert list(model.input_example.columns) == ["image"]
    assert model.predict(model.input_example)["problem"][0] is None
    with pytest.raises(mlflow.MlflowException, match="Incompatible input types"):
        model.predict(pd.DataFrame({"image": [1.0]}))


def test_predict_and_evaluate_take_a_model_of_mlflow(
    finished_study, server, pictures, best, tints, monkeypatch, tmp_path
):
    results, image = finished_study.results, next(iter(pictures))
    own = call("predict", "short-1", image, "--results", results)
    assert own.status == 0
    by_study = {"models:/short-1@best"} & {best}  # the study in the results names its server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    (run,) = {model.source_run_id for model in models_below(server.uri, best_folder(finished_study))}
    (model,) = models_below(server.uri, best_folder(finished_study))
    version = best.replace("@best", "/1")
    for name in (best, version, best.replace("@best", "/latest"), model.model_uri, f"runs:/{run}/model"):
        asked = call("predict", name, image, "--results", tmp_path)
        assert (asked.status, asked.out) == (0, own.out)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for name in by_study:
        assert call("predict", name, image, "--results", results).out == own.out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    ended = call("evaluate", best, "--data", tints, "--split", "val", "--results", tmp_path / "results")
    value = Study.open("short-1", str(results)).best().value  # of the moving average, which was saved
    assert f"val/top1 {value:.4f}" in ended.out
    name = best.removeprefix("models:/")
    assert (tmp_path / "results" / f"{name}-evaluation" / "tints-val" / "classes.csv").exists()


def best_folder(finished_study) -> str:
    study = Study.open(finished_study.name, str(finished_study.results))
    return study.trial_folder(study.best().number)


def test_a_run_of_its_own_has_a_model_beside_its_results(finished_run, monkeypatch):
    """MLflow's database lies next to the results; the model's file is the run's own, not a copy."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{finished_run.results}/mlflow.db"
    (model,) = models_below(uri, finished_run.folder)
    path = find_model(model.model_uri, str(finished_run.results))
    assert Path(path).samefile(finished_run.folder / "model.safetensors")
    assert registered_by(uri, finished_run.folder) is None


WRONG = {  # a model that a person names: why there is none
    "models:/nobody@best": r"MLflow at \S+ has no registered model nobody; it has: .*\w",
    "BEST@worst": r"has no alias worst of \S+; it has: \S+@best$",
    "BEST/7": r"has no version 7 of \S+; it has: 1$",
    "models:/m-0123456789abcdef": "has no such model$",
    "runs:/0123456789abcdef/model": "has no such run$",
    "models:/": "is no model that MLflow can have; allowed are models:/STUDY@best",
    "models:/a/b/c": "is no model that MLflow can have; allowed are models:/STUDY@best",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_that_mlflow_does_not_have_is_one_sentence(server, best, monkeypatch, wrong):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    ended = call("predict", wrong.replace("BEST", best.removesuffix("@best")), "x.png")
    assert ended.status == 1
    assert re.search(WRONG[wrong], ended.error), ended.error


def test_an_mlflow_that_is_not_there_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"there is no MLflow to ask: \S+/mlflow.db does not exist; set"):
        find_model("models:/short-1@best", str(tmp_path))
    gone = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gone)
    with pytest.raises(UserError, match=f"^MLflow at {gone}: connection refused"):
        find_model("models:/short-1@best", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(UserError, match="there is no MLflow at sqlite"):
        find_model("models:/short-1@best", str(tmp_path))
    assert not (tmp_path / "none.db").exists()


def test_mlflow_serves_a_model_to_other_programs(finished_study, server, pictures, best, serving, tmp_path):
    """As a person does: `mlflow models serve`, and an image as base64 in JSON."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", best, "--env-manager", "local"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": server.uri} | serving
    with open(tmp_path / "serve.log", "wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: process.poll() is not None or answers(f"{url}/ping"), 120)
        images = [base64.b64encode(content).decode() for content in pictures.values()]
        body = {"dataframe_split": {"columns": ["image"], "data": [[image] for image in images]}}
        request = urllib.request.Request(
            f"{url}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            rows = json.loads(answer.read())["predictions"]
        assert_same_answers(rows, best_folder(finished_study), pictures)
    finally:
        kill_session(process)
