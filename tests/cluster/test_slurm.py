"""deploy/slurm.sh on two hosts, with stand-ins for Slurm's own commands."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.hosts import NETWORK, USER, address_of

NODES = (20, 21)
JOB = 4321
BIN = Path(sys.executable).parent
SLURM = {
    "SLURM_JOB_ID": JOB,
    "SLURM_JOB_NODELIST": ",".join(f"h{node}" for node in NODES),
    "SLURM_CPUS_PER_TASK": 1,
}
# srun runs a command on a node with the environment and folder of the job's script, and ends it when it ends
SRUN = f"""
while [[ $1 == --* ]]; do
  if [[ $1 == --nodelist=* ]]; then node=${{1#--nodelist=h}}; fi
  shift
done
run="stty -onlcr; $(export -p | grep -v ' SSH_'); cd $PWD; exec $(printf '%q ' "$@")"
exec ssh -tt -i ~/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR \\
  "{USER}@{NETWORK}$node" "$run" < /dev/null
"""
COMMANDS = {
    "scontrol": "tr , '\\n' <<< \"$3\"",
    "srun": SRUN,
    "python3": f'exec {BIN}/python "$@"',
    "deit-ray": f'exec {BIN}/python -m deit_ray "$@"',
    "ray": f'exec {BIN}/ray "$@"',
}


@pytest.fixture(scope="module")
def nodes(hosts):
    """Two nodes with the project and Slurm's commands in the home folder."""
    hosts.start(*NODES)
    for node in NODES:
        place = f"{USER}@{address_of(node)}"
        ssh = " ".join(["ssh", *hosts.ssh_options()])
        for files in ([ROOT / "deit_ray", ROOT / "deploy"], [hosts.key]):
            subprocess.run(["rsync", "-a", "-e", ssh, *map(str, files), f"{place}:"], check=True)
        for name, text in COMMANDS.items():
            write = f"mkdir -p bin; cat > bin/{name}; chmod +x bin/{name}"
            subprocess.run(
                [*ssh.split(), place, write], input=f"#!/bin/bash\n{text}\n", text=True, check=True
            )
    return hosts


def test_slurms_script_starts_ray_on_every_node_runs_the_command_and_leaves_nothing(nodes):
    values = " ".join(f"{name}={value}" for name, value in SLURM.items())
    run = f"PATH=~/bin:$PATH PYTHONPATH=~ {values} deploy/slurm.sh doctor"
    done = nodes.ssh(NODES[0], run, check=False, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "2 CPUs and 0 GPUs" in done.stdout
    assert "2 nodes agree" in done.stdout
    assert "nothing is wrong" in done.stdout
    for node in NODES:
        left = nodes.ssh(node, "pgrep -af 'raylet|gcs_server'", check=False).stdout
        assert left == "", left
