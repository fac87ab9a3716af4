"""A study whose results are on an object store, with a real Ray, a real S3 API server and a real MLflow."""

import contextlib
import json
import os
import re
import subprocess

import boto3
import pytest
import ray

from deit_ray import storage
from deit_ray.experiment.load import dump_experiment
from deit_ray.results import lease
from deit_ray.results.folders import saved_steps
from deit_ray.results.journal import iterate_points
from deit_ray.study.object_log import ObjectLog
from deit_ray.study.study import Study
from tests.conftest import SMALL_STEPS, STUDY
from tests.study.test_kills import table
from tests.study.test_study import assert_mlflow_agrees
from tests.support.commands import DEIT_RAY, call, command, wait_for
from tests.support.pictures import image_file
from tests.support.servers import MlflowServer

STUDY_FILES = {"best.yaml", "driver.json", "experiment.yaml", "model.safetensors", "origin.json"}
TRIAL_FILES = {"checkpoint_manager_snapshot.json", "experiment.yaml", "tracking.json", "worker-0.json"}


@pytest.fixture
def results(bucket) -> str:
    return f"{bucket}/results"


@pytest.fixture
def start(finished_study, make_small, results, tmp_path):
    """Starts the command that drives a study on S3, on the session's Ray; it ends with the context."""

    @contextlib.contextmanager
    def start_study(**keys):
        text = dump_experiment(make_small(results, STUDY | keys))
        (tmp_path / "short.yaml").write_text(text)
        address = ["--address", ray.get_runtime_context().gcs_address]
        with command("tune", tmp_path / "short.yaml", *address) as driver:
            try:
                yield driver
            finally:
                driver.kill()

    return start_study


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder without files, in which this process then works."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture
def there(own_ray, elsewhere, results, tmp_path):
    """Runs a command to its end as on another machine, and returns what it printed.

    The machine has another name, if this process may change it, another home, and no file of the first one.
    """
    rename = ["unshare", "--uts", "sh", "-c", 'hostname elsewhere && exec "$@"', "-"]
    before = rename if os.geteuid() == 0 else []
    (tmp_path / "home").mkdir()

    def run(*arguments) -> str:
        ended = subprocess.run(
            [*before, *DEIT_RAY, *map(str, arguments)],
            cwd=elsewhere,
            env=os.environ | {"HOME": str(tmp_path / "home")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
        )
        assert ended.returncode == 0, ended.stdout
        return ended.stdout

    return run


def wait_for_driver(driver, condition) -> None:
    wait_for(lambda: driver.poll() is not None or condition(), 400)
    assert driver.poll() is None, driver.communicate()[0]


def assert_undisturbed(results: str, expected: dict, uri: str, trials: int) -> None:
    """The study has what an undisturbed one has, and MLflow has it once."""
    assert table(results) == {number: expected[number] for number in range(trials)}
    assert_mlflow_agrees(Study.open("short", results), uri, trials)
    for number in range(trials):
        points = iterate_points(f"{results}/short-1/trial-{number:04d}/journal")
        names = [(point.name, point.step) for point in points]
        assert len(names) == len(set(names))


def assert_everything_is_there(results: str, trials: int) -> None:
    """Every file of a finished study is an object."""
    place, _, prefix = results.removeprefix("s3://").partition("/")
    found = {
        entry.key.removeprefix(f"{prefix}/") for entry in boto3.resource("s3").Bucket(place).objects.all()
    }
    expected = {f"short-1/{name}" for name in (*STUDY_FILES, "study.log/00000000.json")}
    for number in range(trials):
        trial = f"short-1/trial-{number:04d}"
        kept = [f"step-{step:08d}" for step in saved_steps(f"{results}/{trial}")]
        files = [
            f"{step}/{file}" for step in kept for file in ("model.safetensors", "ema.safetensors", "state.pt")
        ]
        expected |= {f"{trial}/{file}" for file in (*TRIAL_FILES, *files, "journal/000000.jsonl")}
    assert kept
    assert expected - found == set()
    assert not [key for key in found if ".partial" in key or ".probe" in key]


def test_a_study_on_s3_that_is_taken_over_and_resumed_elsewhere_equals_an_undisturbed_one(
    start, finished_study, results, server, elsewhere, tints, tmp_path
):
    options, folder = ["--results", results], f"{results}/short-1"
    with start(**{"search.trials": 2}) as driver:
        wait_for_driver(driver, lambda: saved_steps(f"{folder}/trial-0000"))
        second = call("tune", "--resume", "short", *options)
        assert (second.status, second.out) == (1, "")
        assert re.search(rf"short-1: is running already, on \S+ as process {driver.pid};", second.error)
        assert f"driven by process {driver.pid} on " in call("status", "short", *options).out
        # another process takes the study over, although its driver lives
        ObjectLog(f"{folder}/study.log", "short-1").begin_writing()
        output = driver.communicate(timeout=120)[0]
    assert driver.returncode == 1, output
    said = r"^error: short-1: another driver, process \d+ on \S+, has taken over the study; nothing is lost$"
    assert re.search(said, output, re.MULTILINE), output
    assert "Traceback" not in output
    assert table(results)[0][0].name == "RUNNING"

    resumed = call("tune", "--resume", "short", *options)
    assert resumed.status == 0, resumed
    assert_undisturbed(results, table(finished_study.results), server.uri, 2)
    assert_everything_is_there(results, 2)

    shown = call("status", "short", *options).out
    assert len(re.findall(r"^ +\d+ +(?:finished|stopped early) ", shown, re.MULTILINE)) == 2
    assert f"{folder}/trial-0001" in call("status", "short", 1, *options).out
    best = call("best", "short", *options)
    assert (best.status, best.out.split()[-1]) == (0, f"{folder}/model.safetensors")
    assert "nothing to deliver" in call("sync", "short", *options).out
    assert call("diff", "short/0", "short/1", *options).status == 0
    assert "is not running" in call("stop", "short", *options).error
    tested = Study.open("short", results).tested.metrics["test/top1"]
    evaluated = call("evaluate", "short", "--data", tints, *options)
    assert re.search(rf"test/top1 +{tested:.3f}", evaluated.out), evaluated
    (tmp_path / "image.jpg").write_bytes(image_file("JPEG"))
    predicted = {
        call("predict", model, tmp_path / "image.jpg", *options).out
        for model in ("short", folder, f"{folder}/model.safetensors")
    }
    assert len(predicted) == 1
    assert re.search("reddish|greenish|bluish", predicted.pop())
    assert call("ui", "--optuna", tmp_path / "copy.db", *options).out.startswith("short-1: copied")


def test_a_study_on_s3_whose_driver_machine_and_mlflow_are_lost_is_resumed_on_another_machine(
    start, there, finished_study, results, tmp_path
):
    def lose(mlflow: MlflowServer, folder: str) -> MlflowServer:
        """Kills an MLflow server, and starts an empty one at its address."""
        mlflow.kill()
        empty = MlflowServer(tmp_path / folder, port=mlflow.port)
        empty.start()
        return empty

    options, mlflow = ["--results", results], MlflowServer(tmp_path / "mlflow")
    try:
        mlflow.start()
        with start(**{"tracking.uri": mlflow.uri}) as driver:
            study = f"{results}/short-1"
            wait_for_driver(driver, lambda: storage.exists(f"{study}/trial-0001/journal"))
            driver.kill()
            output = driver.communicate(timeout=120)[0]
        uri = f"{study}/{lease.LEASE}"
        left = json.loads(storage.read_bytes(uri)) | {"machine": "", "host": "lost"}
        storage.write_bytes(uri, json.dumps(left).encode())
        refused = call("tune", "--resume", "short", "--results", results).error
        assert "on lost as process" in refused, output
        wait_for(lambda: lease.driver_of(study) is None, 2 * lease.LEASE_S)

        mlflow = lose(mlflow, "second")
        there("tune", "--resume", "short", *options)  # it delivers the trials that have ended again
        assert_undisturbed(results, table(finished_study.results), mlflow.uri, 3)
        assert_everything_is_there(results, 3)

        mlflow = lose(mlflow, "third")
        assert "short-1: MLflow has everything of 4 runs" in there("sync", "short", *options)
        assert "short-1: nothing to deliver: MLflow had everything of 4 runs" in there(
            "sync", "short", *options
        )
        assert_undisturbed(results, table(finished_study.results), mlflow.uri, 3)
    finally:
        mlflow.kill()


def test_runs_on_s3_are_continued_and_reproduced_on_another_machine(there, make_small, results, tmp_path):
    options = ["--results", results]
    (tmp_path / "half.yaml").write_text(dump_experiment(make_small(results, {"name": "half", "seed": 3})))
    there("train", tmp_path / "half.yaml")
    there("train", "--continue", "half", "--epochs", 3, "--schedule", "hold", *options)
    assert saved_steps(f"{results}/half-1-1")[-1] == 3 * SMALL_STEPS
    assert "equal those of half-1" in " ".join(there("reproduce", "half-1", *options).split())
