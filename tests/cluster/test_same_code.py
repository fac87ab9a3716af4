"""A cluster of which one node has other code than the driver: no trial runs there, and none is lost."""

import os
import shutil
import subprocess
import sys

import pytest

from deit_ray.cluster.code import PACKAGE, check_same_code, code_hash, hash_of
from deit_ray.errors import HopelessError, OtherCodeError, UnavailableError
from deit_ray.experiment.load import dump_experiment, load_experiment
from deit_ray.trial.failure import describe_failure
from deit_ray.trial.trainer import is_hopeless
from tests.conftest import EXPERIMENTS, ROOT, SMALL
from tests.support.commands import command, output_of
from tests.support.data import write_tints

# a head that trains nothing, and a node that imports deit_ray from a folder of its own
TWO_NODES = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
cluster.add_node(num_cpus=2, env_vars={"PYTHONPATH": sys.argv[1]})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def other_node(own_ray, bucket, tmp_path, monkeypatch):
    """A cluster's address, and the folder from which its second node imports deit_ray."""
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "other" / "deit_ray"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    nodes = subprocess.Popen(
        [sys.executable, "-c", TWO_NODES, str(package.parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    yield nodes.stdout.readline().strip(), package
    nodes.communicate("", timeout=60)


def test_a_process_refuses_other_code_and_its_trial_blames_the_surroundings(tmp_path):
    check_same_code(None)
    check_same_code(code_hash())
    with pytest.raises(
        OtherCodeError, match=f"other code of deit_ray .{code_hash()}. than the driver .0123."
    ):
        check_same_code("0123")
    failure = describe_failure(OtherCodeError("other code"), str(tmp_path))
    assert (failure.kind, failure.reason) == ("unavailable", "other code")
    # a restart of the workers would meet the same code again; a lost disk may come back
    assert [is_hopeless(kind("")) for kind in (OtherCodeError, HopelessError, UnavailableError)] == [1, 1, 0]


def test_a_node_with_other_code_stops_the_study_until_it_has_the_same(other_node, bucket, tmp_path):
    address, package = other_node
    write_tints(f"{bucket}/tints", {"train": 400, "test": 90})
    keys = SMALL | {
        "name": "spread",
        "data.uri": f"{bucket}/tints",
        "results.uri": f"{bucket}/results",
        "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db",
        "distillation.kind": "none",
        "search.trials": 2,
        "search.max_concurrent": 1,
        "search.space": {"optim.lr": {"choice": [1e-3, 2e-3]}},
    }
    file = tmp_path / "spread.yaml"
    file.write_text(dump_experiment(load_experiment(EXPERIMENTS / "digits_student.yaml", keys)))
    changed, content = package / "rng.py", (package / "rng.py").read_bytes()
    resume = ["tune", "--resume", "spread", "--results", f"{bucket}/results", "--address", address]

    # the code changes while the study runs
    lines = []
    with command("tune", file, "--address", address) as study:
        for line in study.stdout:
            lines.append(line)
            if "trial   0 finished" in line:
                changed.write_bytes(content + b"\n")
    other, said = hash_of(package), "".join(lines)
    assert other != code_hash()
    refusal = f"has other code of deit_ray ({other}) than the driver ({code_hash()})"
    assert f"error: spread-1: trial 1: the machine {os.uname().nodename} {refusal}" in said, said
    assert "once this is fixed, resume with: deit-ray tune --resume spread-1" in said

    # then no trial starts at all
    again = output_of(*resume)
    assert f"error: the machine {os.uname().nodename} {refusal}" in again, again
    status = output_of("status", "spread", "--results", f"{bucket}/results")
    assert "1 finished, 1 interrupted" in status, status

    changed.write_bytes(content)
    assert "spread-1: done" in output_of(*resume)
    status = output_of("status", "spread", "--results", f"{bucket}/results")
    assert "2 finished" in status, status
