"""bench/gpu.py runs to its end, so that no part of it runs for the first time on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

from bench import gpu
from tests.conftest import ROOT
from tests.support.commands import wait_for

PARTS = ["tests", "study", "step", "augment", "mfu", "stream", "models"]


def test_the_script_for_a_gpu_runs_from_end_to_end_without_one(own_ray):
    command = [sys.executable, ROOT / "bench" / "gpu.py", "--tiny", "--all"]
    ended = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert [(line["part"], line["ended"]) for line in lines if "ended" in line] == [
        (part, "well") for part in PARTS
    ], ended.stderr
    assert ended.returncode == 0
    found = {line["part"]: line["figures"] for line in lines if "figures" in line}
    assert found["tests"] == {"tests_failed": 0}
    study = found["study"]
    assert (study["trials"], study["finished"], study["most_at_once"]) == (2, 2, 2)
    assert study["points"] > 50
    assert (study["lost"], study["ranked_differently"]) == (0, 0)
    for part, figure in (
        ("step", "gpu_vs_timm_compiled"),
        ("augment", "gpu_share_of_step"),
        ("mfu", "mfu_of_matmul_deit_b"),
        ("models", "gpu_vs_ours_not_compiled"),
    ):
        assert found[part][figure] > 0
    assert 0 <= found["stream"]["data_wait_frac"] < 1


def test_a_part_that_hangs_is_ended_in_time_with_all_its_processes(tmp_path, capsys):
    hang = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "open(sys.argv[1], 'w').write(str(child.pid))\n"
        "time.sleep(1000)\n"
    )
    command = [sys.executable, "-c", hang, str(tmp_path / "pid")]
    assert not gpu.run_apart("hangs", command, 3, dict(os.environ))
    assert json.loads(capsys.readouterr().out)["ended"] == "out of time after 3 s"
    child = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    wait_for(lambda: not child.exists() or ") Z " in child.read_text())
