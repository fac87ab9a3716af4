"""The command line as people use it, in a process of its own."""

import subprocess
import sys
import time
from pathlib import Path

DEIT_RAY = [sys.executable, "-m", "deit_ray"]
SPACE = {
    "augment.strength": {"float": [0, 2]},
    "optim.lr": {"log": [3e-4, 1e-2]},
    "distillation.weight": {"float": [0.1, 0.9]},
}


def command(*arguments, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [*DEIT_RAY, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def output_of(*arguments, seconds: float = 120, **options) -> str:
    """What a command prints until it ends."""
    with command(*arguments, **options) as process:
        return process.communicate(timeout=seconds)[0]


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def session_processes(session: int) -> list[int]:
    """Processes of a session, Ray's daemons included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found
