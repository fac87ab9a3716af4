"""`doctor` looks at this machine, its Ray, the data and MLflow, and leaves nothing behind."""

import re
import time
from pathlib import Path

import mlflow
import pytest

from deit_ray.commands import doctor
from deit_ray.commands.doctor import Node, look_at_node
from deit_ray.experiment.load import default_experiment, load_experiment
from deit_ray.results.origin import package_versions
from tests.support.commands import call
from tests.support.servers import free_port

LINE = re.compile(r"^(\S.*?)  +(ok|wrong) +(.*)$", re.MULTILINE)


def lines(ended) -> dict[str, tuple[str, str]]:
    """What `doctor` printed: (ok or wrong, what was found) by check."""
    return {subject: (state, found) for subject, state, found in LINE.findall(ended.out)}


def test_a_machine_a_data_set_and_an_mlflow_server_are_looked_at(ray_cluster, small_file, server, tmp_path):
    path, client = small_file(), mlflow.MlflowClient(server.uri)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "run").mkdir()
    artifacts = Path(server.folder, "artifacts")
    before = len(client.search_experiments()), sorted(artifacts.rglob("*.txt"))
    ended = call("doctor", "--experiment", path)
    assert ended.status == 0, ended
    found = lines(ended)
    assert {state for state, _ in found.values()} == {"ok"}
    assert found["tracking"][1].startswith(f"{server.uri}: wrote and read a metric and an artifact in ")
    assert re.search(r": 400 train, 90 test images, fingerprint \w{12}$", found["data"][1])
    assert found["experiment"][1] == "short fits, and trains on cpu"
    assert "a study" not in ended.out
    assert (len(client.search_experiments()), sorted(artifacts.rglob("*.txt"))) == before
    assert ended.out.splitlines()[-1] == "nothing is wrong"
    assert list((tmp_path / "results").iterdir()) == [tmp_path / "results" / "run"]


def test_what_is_wrong_has_a_remedy_and_the_exit_status_says_so(ray_cluster, small_file, tmp_path):
    gone = f"http://127.0.0.1:{free_port()}"
    keys = {"data.uri": tmp_path / "none", "tracking.uri": gone, "train.cpus_per_worker": "99.0"}
    options = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    ended = call("doctor", "--experiment", small_file(), *options)
    assert ended.status == 1
    wrong = {subject: said for subject, (state, said) in lines(ended).items() if state == "wrong"}
    host = next(subject for subject in wrong if subject.startswith("data on "))
    assert f"{tmp_path / 'none'}" in wrong[host]
    assert f"MLflow at {gone}: connection refused; start it, or correct tracking.uri" in wrong["tracking"]
    assert "a trial can never start: it needs 1 worker x (99 training" in wrong["experiment"]
    assert "lower train.workers" in wrong["experiment"]
    assert len(wrong) == 3
    assert ended.out.splitlines()[-1] == "3 things to fix"


def test_a_study_that_the_disk_cannot_hold_is_wrong(small_file):
    keys = {"search.space": {"optim.lr": {"log": [1e-4, 1e-2]}}, "search.trials": 10**9}
    (check,) = doctor._results(load_experiment(small_file(**keys)))
    assert re.search(r"GB free below .*: short can take [\d,]+ TB; see deit-ray plan", check.found)
    assert check.remedy


def node(host: str = "here", **values) -> Node:
    fine = {"code": "abc", "versions": package_versions(), "clock": 0.0, "wrong": ()}
    fine |= {"data": None, "data_fails": False, "sees_results": True}
    return Node(host, **(fine | values))


@pytest.mark.parametrize(
    ("there", "subject", "said"),
    [
        ({"code": "def"}, "code", r"differs: abc on here, def on there; bring the same sources"),
        (
            {"versions": package_versions() | {"ray": "2.1"}},
            "versions",
            r"ray 2\.1 on there, here 2.*; install",
        ),
        ({"data": "no manifest", "data_fails": True}, "data on there", r"no manifest; bring the data there"),
        ({"sees_results": False}, "results on there", r"this one does not see; set results\.uri to s3"),
        ({"clock": 60.0}, "clocks", r"differ from this machine's: there by \+60 s; set each: "),
    ],
)
def test_nodes_that_differ_are_named(there, subject, said, monkeypatch):
    nodes = [node(data="1 train images"), node("there", **{"data": "1 train images"} | there)]
    apart = {found.host: found.clock for found in nodes}
    wrong = [check for check in doctor.compare_nodes(nodes, apart, "data/x", "results") if check.remedy]
    assert [check.subject for check in wrong] == [subject]
    assert re.search(said, f"{wrong[0].found}; {wrong[0].remedy}")


def test_a_node_says_what_is_wrong_with_it(tints, tmp_path, monkeypatch):
    found = look_at_node(tints, str(tmp_path / "probe"))
    assert abs(found.clock - time.time()) < 30
    assert (found.data_fails, found.sees_results, found.wrong) == (False, False, ())
    monkeypatch.setattr("resource.getrlimit", lambda kind: (256, 1024))
    (check,) = look_at_node(None, None).wrong
    assert check.subject == "open files"
    said = [
        check for check in doctor.compare_nodes([node(wrong=(check,))], {}, None, "results") if check.remedy
    ]
    assert [check.subject for check in said] == ["open files on here"]


def test_an_experiment_is_not_needed():
    assert default_experiment({}).data.uri == doctor.NO_DATA
