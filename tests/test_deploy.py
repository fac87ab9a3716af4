"""The files of deploy/ for other clusters."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tests.conftest import ROOT

SCRIPTS = {  # what Slurm gives: here every node of the allocation is this machine
    "scontrol": "printf 'a\\nb\\n'",
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "python3": f'exec {sys.executable} "$@"',
    "deit-ray": f'exec {sys.executable} -m deit_ray "$@"',
    "ray": f'exec {Path(sys.executable).parent}/ray "$@"',
}


def test_slurms_script_starts_ray_on_every_node_and_runs_the_command(own_ray, tmp_path):
    for name, text in SCRIPTS.items():
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/bash\n{text}\n")
        script.chmod(0o755)
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "a,b", "SLURM_CPUS_PER_TASK": "1"}
    done = subprocess.run(
        [ROOT / "deploy" / "slurm.sh", "doctor"],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env=os.environ | slurm | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "2 CPUs and 0 GPUs" in done.stdout
    assert "2 nodes agree" in done.stdout
    assert "nothing is wrong" in done.stdout
    left = subprocess.run(["pgrep", "-f", f"ray-{os.getpid()}"], capture_output=True, text=True, check=False)
    assert left.stdout == ""
    shutil.rmtree(f"/tmp/ray-{os.getpid()}")


def test_kuberays_file_names_an_experiment_and_versions_of_this_project():
    job = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())["spec"]
    experiment = job["entrypoint"].split()[2].removeprefix("/home/ray/deit_ray/")
    assert (ROOT / experiment).is_file()
    assert f"ray=={job['rayClusterSpec']['rayVersion']}" in (ROOT / "constraints.txt").read_text()
