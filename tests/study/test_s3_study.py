"""A study whose results are on an object store, with a real Ray, a real S3 API server and a real MLflow."""

import json
import re

import pytest
import ray

from deit_ray import storage
from deit_ray.experiment.load import dump_experiment
from deit_ray.results import lease
from deit_ray.results.folders import saved_steps
from deit_ray.results.journal import iterate_points
from deit_ray.study.object_log import ObjectLog
from deit_ray.study.study import Study
from tests.conftest import STUDY
from tests.study.test_kills import table
from tests.study.test_study import assert_mlflow_agrees
from tests.support.commands import call, command, wait_for

TRIALS = 2


@pytest.fixture
def begun(finished_study, make_small, bucket, tmp_path):
    """The command that drives a study on S3, in the middle of the first trial."""
    text = dump_experiment(make_small(f"{bucket}/results", STUDY | {"search.trials": TRIALS}))
    (tmp_path / "short.yaml").write_text(text)
    address = ["--address", ray.get_runtime_context().gcs_address]
    trial = f"{bucket}/results/short-1/trial-0000"
    with command("tune", tmp_path / "short.yaml", *address) as driver:
        wait_for(lambda: driver.poll() is not None or saved_steps(trial), 120)
        assert driver.poll() is None, driver.communicate()[0]
        yield driver


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder without files, in which this process then works."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert not list(folder.iterdir())


def assert_undisturbed(results: str, expected: dict, uri: str) -> None:
    """The study has what an undisturbed one has, and MLflow has it once."""
    assert table(results) == {number: expected[number] for number in range(TRIALS)}
    assert_mlflow_agrees(Study.open("short", results), uri, TRIALS)
    for number in range(TRIALS):
        points = iterate_points(f"{results}/short-1/trial-{number:04d}/journal")
        names = [(point.name, point.step) for point in points]
        assert len(names) == len(set(names))


def test_a_study_on_s3_that_is_taken_over_and_resumed_elsewhere_equals_an_undisturbed_one(
    begun, finished_study, bucket, server, elsewhere
):
    results = f"{bucket}/results"
    second = call("tune", "--resume", "short", "--results", results)
    assert (second.status, second.out) == (1, "")
    assert re.search(rf"short-1: is running already, on \S+ as process {begun.pid};", second.error)
    assert f"driven by process {begun.pid} on " in call("status", "short", "--results", results).out

    # another process takes the study over, although its driver lives
    ObjectLog(f"{results}/short-1/study.log", "short-1").begin_writing()
    output = begun.communicate(timeout=60)[0]
    assert begun.returncode == 1, output
    said = r"^error: short-1: another driver, process \d+ on \S+, has taken over the study; nothing is lost$"
    assert re.search(said, output, re.MULTILINE), output
    assert "Traceback" not in output
    assert table(results)[0][0].name == "RUNNING"

    resumed = call("tune", "--resume", "short", "--results", results)
    assert resumed.status == 0, resumed
    assert_undisturbed(results, table(finished_study.results), server.uri)
    shown = call("status", "short", "--results", results).out
    assert len(re.findall(r"^ +\d+ +(?:finished|stopped early) ", shown, re.MULTILINE)) == TRIALS
    best = call("best", "short", "--results", results)
    assert (best.status, best.out.split()[-1]) == (0, f"{results}/short-1/model.safetensors")
    assert "nothing to deliver" in call("sync", "short", "--results", results).out
    assert call("diff", "short/0", "short/1", "--results", results).status == 0
    assert "is not running" in call("stop", "short", "--results", results).error


def test_a_study_on_s3_whose_driver_and_machine_are_lost_resumes_on_another_machine(
    begun, own_ray, finished_study, bucket, server, elsewhere
):
    results = f"{bucket}/results"
    begun.kill()
    begun.communicate(timeout=60)
    # as on another machine, nobody here can see that the process has ended
    uri = f"{results}/short-1/{lease.LEASE}"
    storage.write_bytes(uri, json.dumps(json.loads(storage.read_bytes(uri)) | {"host": "elsewhere"}).encode())
    assert "on elsewhere as process" in call("tune", "--resume", "short", "--results", results).error
    wait_for(lambda: lease.driver_of(f"{results}/short-1") is None, 2 * lease.LEASE_S)
    resumed = call("tune", "--resume", "short", "--results", results)
    assert resumed.status == 0, resumed
    assert_undisturbed(results, table(finished_study.results), server.uri)
    verified = call("best", "short", "--results", results, "--verify")
    assert verified.out.endswith("difference 0\n"), verified
