"""Clusters: paths that other nodes cannot reach are refused, and only emergencies of Ray reach a person."""

import json
import os
import subprocess
import sys

import pytest

from deit_ray.cluster import connect, surroundings
from deit_ray.errors import UserError
from tests.conftest import ROOT

TWO_NODES = """
import sys
from ray.cluster_utils import Cluster
import deit_ray

data, results = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
keys = {"data.uri": data, "results.uri": results, "distillation.kind": "none"}
try:
    experiment = deit_ray.load_experiment("experiments/digits_student.yaml", keys)
    deit_ray.train(experiment, deit_ray.Session(address=cluster.address))
except deit_ray.UserError as error:
    print("refused:", error)
cluster.shutdown()
"""


def test_a_results_path_that_other_nodes_cannot_reach_is_refused(own_ray, tints, tmp_path):
    command = [sys.executable, "-c", TWO_NODES, tints, str(tmp_path / "results")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert "refused: results.uri: " in done.stdout, done.stdout + done.stderr[-2000:]
    assert "is a local path" in done.stdout
    assert "the cluster has 2 nodes" in done.stdout
    assert "set it to a place on a network file system" in done.stdout
    assert not (tmp_path / "results").exists()


def test_an_emergency_reaches_a_person_and_advice_does_not():
    heard = []
    advice = "WARNING: 10 PYTHON worker processes have been started on node: ... with address: 192.0.2.2."
    killed = "4 Workers (tasks / actors) killed due to memory pressure (OOM),"
    crashed = "0 Workers crashed due to other reasons"
    connect._pass_on([advice, f"{killed}\n   {crashed}"], heard.append)
    assert heard == [f"{killed} {crashed}"]


def test_a_cluster_that_scales_from_zero_counts_with_what_it_could_have(tmp_path, monkeypatch):
    import yaml

    described = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    (tmp_path / "bootstrap.yaml").write_text(json.dumps(described))  # JSON is YAML
    monkeypatch.setattr(surroundings, "BOOTSTRAP", str(tmp_path / "bootstrap.yaml"))
    counted = dict.fromkeys(("CPU", "GPU"), 0.0)
    for count, resources in connect._node_types():
        for name in counted:
            counted[name] += count * resources.get(name, 0)
    # four g5.12xlarge and two c6i.8xlarge; nothing trains on the head
    assert counted == {"CPU": 4 * 48 + 2 * 32, "GPU": 4 * 4}


def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(UserError, match=r"train.device: cuda, but the cluster has no GPU"):
        connect.training_device("cuda", {"CPU": 8.0})
    assert connect.training_device("auto", {"CPU": 8.0}) == "cpu"
    assert connect.training_device("auto", {"CPU": 8.0, "GPU": 1.0}) == "cuda"
