"""Memory and CPU time of a process and all its descendants. Read from /proc, so Linux only."""

import contextlib
import os
import threading
from pathlib import Path


class PeakMemory:
    """Measures the peak memory of a process and all its descendants, Ray's daemons included, while entered.

    Args:
        root: pid of the process; by default this one.
        every_s: seconds between measurements. A measurement takes milliseconds for each process.

    Attributes:
        peak: bytes; see `memory_bytes`.
    """

    def __init__(self, root: int | None = None, every_s: float = 0.1):
        self.root, self.every_s = root, every_s

    def __enter__(self) -> "PeakMemory":
        self.peak, self.stop = memory_bytes(self.root), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(self.every_s):
            self.peak = max(self.peak, memory_bytes(self.root))


def memory_bytes(root: int | None = None) -> int:
    """The proportional set size of a process (by default this one) and all its descendants, in bytes."""
    total = 0
    for pid in family(root):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += sum(
                int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")
            )
    return total


def cpu_seconds(root: int | None = None) -> float:
    """The CPU seconds (user and system) of a process (by default this one) and all its descendants.

    Descendants that have ended are included.
    """
    ticks = 0
    for pid in family(root):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            ticks += sum(map(int, _stat(pid)[11:15]))  # utime, stime, and those of ended children
    return ticks / os.sysconf("SC_CLK_TCK")


def family(root: int | None = None) -> list[int]:
    """The pids of a process (by default this one) and its descendants."""
    root, parents = root or os.getpid(), {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                parents[int(folder.name)] = int(_stat(int(folder.name))[1])
    return [pid for pid in parents if root in _ancestors(pid, parents)]


def _ancestors(pid: int, parents: dict[int, int]) -> set[int]:
    found = set()
    while pid and pid not in found:
        found.add(pid)
        pid = parents.get(pid, 0)
    return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat, beginning with the third one, the state."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
