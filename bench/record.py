"""Records measurements: each benchmark appends its figures and machine to a file in bench/results/."""

import datetime
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def record(bench: str, figures: dict) -> None:
    """Prints a benchmark's figures as one line of JSON, and appends the line to bench/results/BENCH.jsonl.

    The file also gets the command, machine, commit and date.

    Args:
        bench: the benchmark's name.
        figures: numbers by name; a name ends in the unit.
    """
    line = {"bench": bench, "figures": figures}
    print(json.dumps(line))
    circumstances = {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *map(_anywhere, sys.argv[1:])]),
        "machine": describe_machine(),
        "commit": describe_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{bench}.jsonl", "a") as file:
        file.write(json.dumps(line | circumstances) + "\n")


def _anywhere(argument: str) -> str:
    """The last part of an absolute path, since the rest means nothing on another machine."""
    return os.path.basename(argument.rstrip("/")) if os.path.isabs(argument) else argument


def describe_machine() -> dict:
    """The processor's model, the cores this process may use, the memory, and the GPU if there is one."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = {
        "cpu": models[0] if models else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
    }
    return machine | ({"gpu": gpu} if (gpu := describe_gpu()) else {})


def describe_gpu() -> str | None:
    """The GPU's name, as NVIDIA's driver tells it; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.splitlines()[0] if found.returncode == 0 and found.stdout else None


def describe_commit() -> str:
    """The commit checked out, with -dirty where the tree differs from it; unknown in a copy without .git."""
    if not (ROOT / ".git").exists():
        return "unknown"
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
