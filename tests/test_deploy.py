"""The files of deploy/ for other clusters; deploy/slurm.sh is tried in tests/cluster/test_slurm.py."""

import yaml

from tests.conftest import ROOT


def test_kuberays_file_names_an_experiment_and_versions_of_this_project():
    job = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())["spec"]
    experiment = job["entrypoint"].split()[2].removeprefix("/home/ray/deit_ray/")
    assert (ROOT / experiment).is_file()
    assert f"ray=={job['rayClusterSpec']['rayVersion']}" in (ROOT / "constraints.txt").read_text()
