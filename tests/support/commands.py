"""The command line, in a process of its own or in this one."""

import contextlib
import io
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import typer

from deit_ray.cli.main import app, main

DEIT_RAY = [sys.executable, "-m", "deit_ray"]
SPACE = {
    "augment.strength": {"float": [0, 2]},
    "optim.lr": {"log": [3e-4, 1e-2]},
    "distillation.weight": {"float": [0.1, 0.9]},
}
succeeded: Counter[str] = Counter()  # how often each command has ended without an error in this session


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error: the last one. Before it, one line may say what the command has begun."""
        *begun, error = self.err.splitlines()
        assert len(begun) <= 1, self.err
        assert error.startswith("error: "), self.err
        return error


def call(*arguments) -> Ended:
    """Runs a command in this process; a new process would need seconds for imports."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["deit-ray", *map(str, arguments)]
    with patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
    ended = Ended(status, out.getvalue(), err.getvalue())
    if "--help" not in argv and not any(line.startswith("error: ") for line in ended.err.splitlines()):
        succeeded[name_of(argv[1:])] += 1
    return ended


def command(*arguments, **options) -> subprocess.Popen:
    """Starts a command in a process of its own, as people do.

    Popen gets no `preexec_fn`: with one, it forks this process instead of using vfork. Ray's gRPC in this
    process may then never hear of an actor again, and the next trial is waited for without end.
    """
    return subprocess.Popen(
        [*DEIT_RAY, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def output_of(*arguments, seconds: float = 120, **options) -> str:
    """Runs a command in a process of its own; returns everything that it prints."""
    with command(*arguments, **options) as process:
        return process.communicate(timeout=seconds)[0]


def all_commands() -> list[str]:
    """The names of all commands, such as `tune` and `data prepare`."""

    def below(command, prefix: str) -> list[str]:
        inner = getattr(command, "commands", {})  # only a group has them
        if not inner:
            return [prefix.strip()]
        return [name for word, entry in inner.items() for name in below(entry, f"{prefix}{word} ")]

    return below(typer.main.get_command(app), "")


def name_of(arguments: list[str]) -> str:
    """The name of the command that the arguments call, such as `data prepare`; empty if they call none."""
    return next((name for name in all_commands() if arguments[: len(name.split())] == name.split()), "")


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def session_processes(session: int) -> list[int]:
    """The pids of a session's processes, Ray's daemons included."""
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
