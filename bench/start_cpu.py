"""CPU seconds that the start of a trial costs: before its processes were forked, and with the working tree.

A study of eight trials and one of four, of five epochs of digits each, run as `deit-ray tune` runs them, two
at a time. The CPU seconds of all processes of the first, less those of the second, less those inside
optimizer steps and evaluations, divided by four, are what a trial costs besides its work: processes that
start, imports, the stream, checkpoints, tracking. Costs of a study as a whole, such as Ray's start and the
imports of the fork server, cancel out.

Run as a program, this is the study itself, with the code of whatever tree PYTHONPATH names.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from unittest import mock

from revisions import checked_out

BENCH = Path(__file__).resolve().parent
BEFORE = "cf08551"  # the last commit before
EPOCHS, STEPS = 5, 100
FEW, MANY = 4, 8
POLL_S = 0.03


def measure_start_cpu(digits: str, teacher: str) -> dict[str, float]:
    """The CPU seconds of a trial's start with the old code and with the working tree's.

    Args:
        digits: the folder of the prepared digits.
        teacher: path of a teacher's model.safetensors.
    """
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        checked_out(BEFORE, Path(folder) / "before") as tree,
    ):
        before = start_cpu_s(tree, digits, teacher)
    now = start_cpu_s(BENCH.parent, digits, teacher)
    return {"start_cpu_before_s": before, "start_cpu_s": now, "start_cpu_ratio": now / before}


def start_cpu_s(tree: Path, digits: str, teacher: str) -> float:
    few, many = (run_study(tree, digits, teacher, trials) for trials in (FEW, MANY))
    print(f"{tree.name:10} {FEW} trials: {few}; {MANY} trials: {many}", flush=True)
    return (many.outside_s - few.outside_s) / (MANY - FEW)


class Spent:
    """CPU seconds of a study: of all its processes by name, and inside the optimizer steps and
    evaluations."""

    def __init__(self, by_name: Counter, inside_s: float):
        self.by_name, self.inside_s = by_name, inside_s

    @property
    def outside_s(self) -> float:
        return self.by_name.total() - self.inside_s

    def __str__(self) -> str:
        return f"{self.by_name.total():.1f} s, {self.inside_s:.1f} inside steps and evaluations"


def run_study(tree: Path, digits: str, teacher: str, trials: int) -> Spent:
    """Runs a study with the code of a work tree in a process of its own, and adds up its CPU seconds."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        command = [sys.executable, __file__, digits, teacher, folder, str(trials)]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL)
        with CpuOfFamily(process.pid) as family:
            code = process.wait()
            if code:
                raise RuntimeError(f"the study of {tree} ended with {code}")
            family.wait_for_its_end()
        notes = [json.loads(note.read_text()) for note in Path(folder, "notes").iterdir()]
        if len(notes) != trials or {note["evaluations"] for note in notes} != {EPOCHS}:
            raise RuntimeError(
                f"{len(notes)} trials of {[note['evaluations'] for note in notes]} evaluations"
            )
        return Spent(family.by_name(), sum(note["inside_s"] for note in notes))


class CpuOfFamily:
    """CPU seconds of a process and of all that it started, those included that ended or lost their parent.

    Ray's raylet ignores SIGCHLD, so that the system forgets what its children have used: they are looked at
    every POLL_S seconds instead, and the last look at a process counts. It misses half of POLL_S for each
    process on average.
    """

    def __init__(self, root: int):
        self.root = root
        self.ticks: dict[tuple[int, str], int] = {}  # by pid and start time: pids are used again
        self.names: dict[tuple[int, str], str] = {}
        self.members, self.living = {root}, {root}

    def __enter__(self) -> "CpuOfFamily":
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop.set()
        self.thread.join()

    def wait_for_its_end(self, timeout_s: float = 60.0) -> None:
        """Ray's daemons outlive the driver by seconds."""
        deadline = time.monotonic() + timeout_s
        while self.living and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def by_name(self) -> Counter:
        found = Counter()
        for process, ticks in self.ticks.items():
            found[self.names.get(process, "")] += ticks / os.sysconf("SC_CLK_TCK")
        return found

    def _watch(self) -> None:
        while not self.stop.wait(POLL_S):
            self._look()

    def _look(self) -> None:
        stats = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
                stats[int(pid)] = Path(f"/proc/{pid}/stat").read_text()
        fields = {pid: stat.rpartition(")")[2].split() for pid, stat in stats.items()}
        grown = True
        while grown:
            found = {
                pid for pid, field in fields.items() if int(field[1]) in self.members and field[0] != "Z"
            }
            grown = not found <= self.members
            self.members |= found
        self.living = self.members & fields.keys()
        self.members &= fields.keys()
        for pid in self.living:
            process = (pid, fields[pid][19])
            self.ticks[process] = int(fields[pid][11]) + int(fields[pid][12])
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                name = (
                    b" ".join(word.rpartition(b"/")[2] for word in words[:4] if word != b"-u")
                    .decode()
                    .strip()
                )
                if name and not (name.startswith("ray::IDLE") and process in self.names):
                    self.names[process] = (
                        name  # a process that ends has none, and an idle one had a better one
                    )


def main(digits: str, teacher: str, folder: str, trials: str) -> None:
    """The study."""
    import deit_ray

    driver = import_any("deit_ray.driver", "deit_ray.study.driver")
    notes = Path(folder) / "notes"
    notes.mkdir()
    keys = {
        "data.uri": digits,
        "results.uri": f"{folder}/results",
        "distillation.teacher": {"weights": teacher},
        "train.epochs": EPOCHS,
        "search.trials": int(trials),
    }
    experiment = deit_ray.load_experiment(BENCH.parent / "experiments" / "digits_search.yaml", keys)
    make = driver.make_trial

    def make_noted(*arguments):
        trainer = make(*arguments)
        trainer.train_loop_per_worker = NotedLoop(trainer.train_loop_per_worker, notes)
        return trainer

    with mock.patch.object(driver, "make_trial", make_noted):
        deit_ray.tune(experiment)


def import_any(*names: str):
    """The first module of these that there is: they have moved between the two commits.

    The old name comes first. The old tree has no module of the new name, but an editable install may find the
    new tree's.
    """
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            return import_module(name)
    raise ModuleNotFoundError(names)


class NotedLoop:
    """A worker's loop that writes down the CPU seconds inside its optimizer steps and evaluations."""

    def __init__(self, loop: Callable, notes: Path):
        self.loop, self.notes = loop, notes

    def __call__(self, config: dict) -> None:
        stream = import_module("deit_ray.data.stream")
        make_stream, spent = stream.Stream, {"inside_s": 0.0, "steps": 0, "evaluations": 0}
        with contextlib.ExitStack() as patches:

            def make_stream_then_patch(*arguments):
                batches = make_stream(*arguments)  # flows while the models are imported, as without the notes
                worker = import_any("deit_ray.worker", "deit_ray.training.worker")
                step = import_any("deit_ray.step", "deit_ray.training.step").TrainStep
                for owner, name, key in ((step, "__call__", "steps"), (worker, "evaluate", "evaluations")):
                    noted = note_cpu(getattr(owner, name), spent, key)
                    patches.enter_context(mock.patch.object(owner, name, noted))
                return batches

            patches.enter_context(mock.patch.object(stream, "Stream", make_stream_then_patch))
            self.loop(config)
        (self.notes / f"{os.urandom(8).hex()}.json").write_text(json.dumps(spent))


def note_cpu(function: Callable, spent: dict, key: str) -> Callable:
    """A function that adds the CPU time of its thread; with one torch thread there is no other."""

    def noted(*arguments, **keys):
        begin = time.thread_time()
        try:
            return function(*arguments, **keys)
        finally:
            spent["inside_s"] += time.thread_time() - begin
            spent[key] += 1

    return noted


if __name__ == "__main__":
    main(*sys.argv[1:])
