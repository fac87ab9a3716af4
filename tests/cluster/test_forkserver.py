"""The processes of a local Ray are forks of one that has imported everything, and as separate as Ray's
own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

PRELOADED = "colorsys"  # nothing else imports it


@pytest.fixture(scope="module")
def found() -> dict:
    """What `main` finds in a process of its own."""
    command, environment = [sys.executable, __file__], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_forked_processes_are_as_separate_as_rays_own(own_ray, found):
    first, second = found["workers"]
    assert first["preloaded"]
    assert second["preloaded"]
    assert first["parent"] == second["parent"] == found["server"]
    for what in ("pid", "ray's id", "random", "numpy's random", "group", "log"):
        assert first[what] != second[what], what
    assert first["group"] == first["pid"]


def test_a_process_with_a_runtime_environment_starts_in_rays_own_way(own_ray, found):
    assert not found["with an environment"]["preloaded"]
    assert found["with an environment"]["variable"] == "x"


def test_a_killed_fork_server_is_started_again_and_none_outlives_ray(own_ray, found):
    assert found["after a kill"]["preloaded"]
    assert found["after a kill"]["parent"] != found["server"]
    deadline = time.monotonic() + 5
    while (alive := servers_of(found["session"])) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive == []


def test_children_of_a_killed_process_are_killed_as_rays_own_are(own_ray, found):
    assert not found["grandchild lives"]


def servers_of(session: str) -> list[int]:
    """The processes whose output goes to the log of a session's fork server."""
    log, found = f"{session}/logs/forkserver.log", []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                output, command = os.readlink(folder / "fd" / "1"), (folder / "cmdline").read_text()
            except (
                FileNotFoundError,
                ProcessLookupError,
                PermissionError,
            ):  # it has ended, or is another user's
                continue
            if output == log and "forkserver.py" in command:
                found.append(int(folder.name))
    return found


def describe_process() -> dict:
    import random

    import numpy as np
    import ray

    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "group": os.getpgid(0),
        "preloaded": PRELOADED in sys.modules,
        "ray's id": ray.UniqueID.from_random().hex(),
        "random": random.random(),
        "numpy's random": np.random.random(),
        "log": os.readlink("/proc/self/fd/1"),
        "variable": os.environ.get("A_VARIABLE"),
    }


def main() -> None:
    import ray

    from deit_ray.cluster import connect

    @ray.remote(num_cpus=0)
    class Process:
        def describe(self):
            return describe_process()

        def start_child(self):
            return subprocess.Popen(["sleep", "600"]).pid

    def describe(actor) -> dict:
        return ray.get(actor.describe.remote())

    with connect.connected("local", False, print, (PRELOADED,)):
        session = str(Path(describe_log := ray.get(Process.remote().describe.remote())["log"]).parent.parent)
        assert describe_log.startswith("/")
        actors = [Process.remote() for _ in range(2)]
        workers = [describe(actor) for actor in actors]
        (server,) = servers_of(session)
        other = describe(Process.options(runtime_env={"env_vars": {"A_VARIABLE": "x"}}).remote())
        child = ray.get(actors[0].start_child.remote())
        os.kill(workers[0]["pid"], signal.SIGKILL)
        os.kill(server, signal.SIGKILL)
        time.sleep(2)
        after = describe(Process.remote())
        lives = os.path.exists(f"/proc/{child}")
    if lives:
        os.kill(child, signal.SIGKILL)
    found = {
        "session": session,
        "server": server,
        "workers": workers,
        "with an environment": other,
        "after a kill": after,
        "grandchild lives": lives,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
