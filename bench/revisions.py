"""Runs commands of any revision of this code, to the end or to a kill at a run's first checkpoint.

Only the command line and the results folder are used, so the modules of a revision may be anywhere.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND_S = 900.0  # a command that takes longer hangs
CHECKPOINTS = "checkpoint_manager_snapshot.json"  # Ray Train's list of a run's checkpoints
FIND_PACKAGE = "import importlib.util; print(importlib.util.find_spec('deit_ray').origin)"


def clean_up_when_terminated() -> None:
    """Makes a SIGTERM end this process as an error does: what it has started and written is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextlib.contextmanager
def checked_out(revision: str, folder: Path) -> Iterator[Path]:
    """Checks a revision out into a temporary git worktree, which is removed at the end."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


class CommandLine:
    """The command line of a tree of the code.

    Args:
        tree: the root of a checkout.
        folder: the working folder of the commands: data and results are in it.
        scratch: a folder for the temporary files of Ray and of killed commands. Its path must be short, since
            Ray makes sockets below it.

    Raises:
        RuntimeError: Python would run other code than the tree's.
    """

    def __init__(self, tree: Path, folder: Path, scratch: Path):
        module = "deit_ray" if (tree / "deit_ray" / "__main__.py").exists() else "deit_ray.cli"
        self.command = [sys.executable, "-m", module]
        self.folder, self.log = folder, scratch / "commands.log"
        paths = {"PYTHONPATH": str(tree), "RAY_TMPDIR": str(scratch), "TMPDIR": str(scratch)}
        self.environment = os.environ | paths | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self.environment.pop("RAY_ADDRESS", None)  # each command starts a Ray of its own
        find = [sys.executable, "-c", FIND_PACKAGE]
        answer = subprocess.check_output(find, cwd=folder, env=self.environment, text=True)
        found = Path(answer.strip())
        if not found.is_relative_to(tree):
            raise RuntimeError(f"{tree}: Python would run {found} instead")

    def run(self, *arguments: str) -> str:
        """Runs a command to its end, and returns what it prints.

        Raises:
            RuntimeError: the command failed, with all that it said.
        """
        with self._start(arguments) as process:
            output = process.communicate(timeout=COMMAND_S)[0]
        if process.returncode:
            raise self._error(arguments, f"ended with {process.returncode}", output)
        return output

    def kill_at_checkpoint(self, run: str, *arguments: str) -> None:
        """Starts a command, and kills it and its Ray as soon as a run has its first checkpoint.

        Args:
            run: the run's folder in the results, such as student-1 or study-1/trial-0001.

        Raises:
            RuntimeError: the command ended before that, or took too long.
        """
        snapshot = self.folder / "results" / run / CHECKPOINTS
        with self._start(arguments) as process:
            deadline = time.monotonic() + COMMAND_S
            while not snapshot.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise self._error(arguments, f"{run} has no checkpoint at which to kill it")
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGKILL)  # first: the driver cannot note the death of its workers
            process.wait()

    @contextlib.contextmanager
    def _start(self, arguments: tuple[str, ...]) -> Iterator[subprocess.Popen]:
        """Starts a command in a session of its own; at the end, kills all that is left of the session."""
        command = [*self.command, *arguments]
        with open(self.log, "wb") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True,
            )  # fmt: skip
        try:
            yield process
        finally:
            while left := processes_of(process.pid):
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.poll()
                time.sleep(0.1)
            process.wait()
            process.stdout.close()

    def _error(self, arguments: tuple[str, ...], problem: str, output: str = "") -> RuntimeError:
        log = self.log.read_text(errors="replace")[-3000:]
        return RuntimeError(f"{' '.join(arguments)}: {problem}\n{output}{log}")


def processes_of(session: int) -> list[int]:
    """The pids of a session's running processes, Ray's daemons included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                state, _, _, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its_session) == session and state != "Z":
                    found.append(int(entry.name))
    return found
