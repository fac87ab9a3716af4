"""Runs inputs and commands that people have, as processes of the command line, and counts what goes wrong.

    python bench/faults.py
    python bench/faults.py --without-ray
    python bench/faults.py --only 'npz_*' prepare
    python bench/faults.py --inputs FILE

Only the run of all cases is recorded. It takes about 25 minutes on two slow cores, 8 of them without Ray.

Four figures, each of which must be 0, and the number of cases:

- lost: a file of the user was changed or is gone;
- silent: exit status 0 with wrong or missing pixels, labels or samples and no line that says so; a right
  input that is refused; a refusal or a note without the words that a person needs;
- raw: an exception's class, a Python repr, a traceback or a line of a library's log without --verbose;
- late: the first line after more than a second, or a mistake that is visible without Ray reported after Ray
  has started, or a command that does not end.

The first line is measured with pipes for all commands, and in a terminal for one of each kind. One that seems
late is measured again, alone, at the end. The bound of one second is scaled by what an empty Python process
takes then, compared with the least that it took: `control`.
"""

import argparse
import contextlib
import fnmatch
import itertools
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench.faulty.arrays  # noqa: E402
import bench.faulty.experiments  # noqa: E402
import bench.faulty.folders  # noqa: E402
import bench.faulty.images  # noqa: E402
import bench.faulty.out  # noqa: E402
import bench.faulty.people  # noqa: E402
import bench.faulty.ray  # noqa: E402
import bench.faulty.surroundings  # noqa: E402
import bench.faulty.tables  # noqa: E402
import bench.faulty.tars  # noqa: E402, F401
from bench.faulty.expect import BOUND  # noqa: E402
from bench.faulty.generic import cases_of  # noqa: E402
from bench.faulty.raw import raw_parts  # noqa: E402
from bench.faulty.shared import make_shared  # noqa: E402
from bench.faulty.stage import (  # noqa: E402
    CASES,
    FIRST_LINE_S,
    Case,
    Fault,
    SetupError,
    Stage,
    control_s,
    digests,
    first_line_s,
)
from bench.record import record  # noqa: E402
from bench.revisions import clean_up_when_terminated  # noqa: E402

FIGURES = ("lost", "silent", "raw", "late")
TERMINAL = 80  # columns
CONFIRMED = 5


def main() -> None:
    arguments = parse()
    clean_up_when_terminated()
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    # children must not inherit that a signal is ignored, as below nohup; a handler is not inherited
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)
    cases = chosen(arguments)
    if arguments.list:
        for case in cases:
            print(f"{case.name:40} {case.owner}{', needs Ray' if case.ray else ''}")
        return
    with tempfile.TemporaryDirectory(prefix="b-") as folder:
        bench = Bench(Path(folder), arguments.jobs, arguments.quick, arguments.minutes or float("inf"))
        bench.run(cases)
        bench.report(cases, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="patterns of cases, rows or owners")
    parser.add_argument("--list", action="store_true", help="print the cases, and run none")
    parser.add_argument("--without-ray", action="store_true", help="leave out cases that start a Ray")
    parser.add_argument("--inputs", metavar="FILE", help="run also the CASES of a script that makes inputs")
    parser.add_argument("--jobs", type=int, default=2, help="cases without Ray that run at once")
    parser.add_argument("--minutes", type=float, help="start no further case after so long; record nothing")
    parser.add_argument("--quick", action="store_true", help="measure no first lines, and record nothing")
    parser.add_argument("--table", metavar="FILE", help="write the failing cases as a table by owner")
    return parser.parse_args()


def chosen(arguments: argparse.Namespace) -> list[Case]:
    """The cases that the options name; those without Ray come first."""
    cases = list(CASES.values())
    if arguments.inputs:
        cases = cases_of(Path(arguments.inputs)) + cases
    if arguments.only:
        named = [
            case
            for case in cases
            if any(
                fnmatch.fnmatch(name, p) for p in arguments.only for name in (case.name, case.row, case.owner)
            )
        ]
        cases = named
    if arguments.without_ray:
        cases = [case for case in cases if not case.ray]
    return sorted(cases, key=lambda case: case.ray)


class Bench:
    """Runs cases, and keeps what they found.

    Args:
        folder: a folder for everything; it is removed afterwards.
        jobs: cases without Ray that run at once.
        quick: measures no first lines.
        minutes: no case starts later.
    """

    def __init__(self, folder: Path, jobs: int, quick: bool, minutes: float):
        self.folder, self.jobs, self.quick, self.minutes = folder, jobs, quick, minutes
        self.faults: dict[str, list[Fault]] = {}
        self.stages: list[Stage] = []
        self.broken: list[str] = []
        self.seconds: dict[str, float] = {}
        self.lock, self.numbers = threading.Lock(), itertools.count()
        self.began = time.monotonic()
        self.quiet_s = min(control_s() for _ in range(5))

    def run(self, cases: list[Case]) -> None:
        self.shared = make_shared(self.folder / "shared")
        before = digests(self.shared)
        first_of_rows = {case.row: case.name for case in reversed(cases)}
        with ThreadPoolExecutor(self.jobs) as pool:
            quick = [case for case in cases if not case.ray]
            try:
                list(pool.map(lambda case: self.run_one(case, first_of_rows[case.row] == case.name), quick))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for case in cases:
            if case.ray:
                self.run_one(case, False)
        self.measure_first_lines()
        after = digests(self.shared)
        if changed := [path for path in before if before[path] != after.get(path)]:
            text = f"what was only read was changed: {', '.join(map(str, changed[:5]))}"
            self.faults["shared"] = [Fault("lost", text)]
            self.show("shared", self.faults["shared"])
        for stage in self.stages:
            stage.remove()

    def run_one(self, case: Case, in_terminal: bool) -> None:
        if time.monotonic() - self.began > 60 * self.minutes:
            return
        began = time.monotonic()
        stage = Stage(self.folder / f"{next(self.numbers):03d}", self.shared, case.name)
        try:
            case.act(stage)
            if in_terminal:
                stage.measure_terminal_too()
            stage.find_lost()
        except SetupError as error:
            self.broken.append(f"{case.name}: {error}")
        except Exception:
            self.broken.append(f"{case.name}: {traceback.format_exc()}")
        finally:
            stage.end()
        for seen in stage.seen:
            for part in [] if {"--verbose", "-v"} & set(seen.words) else raw_parts(seen.text):
                stage.fault("raw", f"{seen.line}: {part}")
        self.seconds[case.name] = time.monotonic() - began
        with self.lock:
            self.stages.append(stage)
            self.faults[case.name] = stage.faults
            self.show(case.name, stage.faults)

    def show(self, name: str, faults: list[Fault]) -> None:
        if not faults:
            print(f"ok {name}", flush=True)
        for fault in faults:
            print(f"{name}  {fault.figure}  {fault.text}", flush=True)

    def measure_first_lines(self) -> None:
        """Measures again, with nothing beside it, each first line that came late.

        Once a command was found late CONFIRMED times, its first measurement counts.
        """
        self.slowest, self.factor, confirmed = (0.0, ""), 1.0, Counter()
        for stage in [] if self.quick else self.stages:
            for line, launch, seen_s in stage.suspects:
                command = (*line.split()[1:3], seen_s is None)
                if confirmed[command] >= CONFIRMED:
                    if seen_s is not None:
                        self.add_late(stage, f"{line}: first line after {seen_s:.1f} s, measured once")
                    continue
                factor = max(1.0, control_s() / self.quiet_s)
                columns = TERMINAL if seen_s is None else 0
                took = first_line_s(launch, columns)
                if took > FIRST_LINE_S * factor:
                    took = min(took, first_line_s(launch, columns))
                self.slowest = max(self.slowest, (took / factor, line))
                self.factor = max(self.factor, factor)
                if took > FIRST_LINE_S * factor:
                    confirmed[command] += 1
                    where = "in a terminal" if columns else "with pipes"
                    self.add_late(
                        stage, f"{line}: first line after {took:.1f} s {where}, bound {factor:.1f} s"
                    )

    def add_late(self, stage: Stage, text: str) -> None:
        fault = Fault("late", text)
        self.faults[stage.name].append(fault)
        self.show(stage.name, [fault])

    def report(self, cases: list[Case], arguments: argparse.Namespace) -> None:
        """Prints and records the figures; the exit status is 1 unless all are 0."""
        counts = Counter(fault.figure for faults in self.faults.values() for fault in faults)
        failing = [name for name, faults in self.faults.items() if faults]
        minutes = (time.monotonic() - self.began) / 60
        print(f"{len(failing)} of {len(cases)} cases fail; {minutes:.1f} minutes")
        print(f"pixels: thumbnails may differ by {BOUND:g} grey levels")
        print(
            f"control: an empty Python process takes {1000 * self.quiet_s:.0f} ms, and took up to "
            f"{self.factor:.1f} times as long; the slowest first line came after {self.slowest[0]:.2f} s "
            f"of a quiet machine: {self.slowest[1]}"
        )
        longest = sorted(self.seconds, key=self.seconds.get)[-5:]
        print("longest: " + ", ".join(f"{name} {self.seconds[name]:.0f} s" for name in reversed(longest)))
        for text in self.broken:
            print(f"the bench failed: {text}")
        if arguments.table:
            Path(arguments.table).write_text(table(cases, self.faults), errors="backslashreplace")
        figures = {name: counts[name] for name in FIGURES} | {"cases": len(cases)}
        if self.broken:
            raise SystemExit(f"{figures}: not recorded, since {len(self.broken)} cases could not run")
        partly = arguments.only or arguments.quick or arguments.without_ray or len(self.seconds) < len(cases)
        if partly:
            print(f"{figures}, {len(self.seconds)} of them run: not recorded")
        else:
            record("faults", figures)
        if failing:
            raise SystemExit(1)


def table(cases: list[Case], faults: dict[str, list[Fault]]) -> str:
    """The failing cases by owner, in Markdown."""
    lines = [f"# Failing cases, {time.strftime('%H:%M')}", ""]
    for owner in sorted({case.owner for case in cases}):
        mine = [case for case in cases if case.owner == owner]
        failing = [case for case in mine if faults.get(case.name)]
        lines += [f"## {owner}: {len(failing)} of {len(mine)} fail", ""]
        if failing:
            lines += ["| case | figure | seen and expected |", "| --- | --- | --- |"]
        for case in failing:
            for fault in faults[case.name]:
                text = " ".join(fault.text.split()).replace("|", "\\|")
                lines.append(f"| {case.name} | {fault.figure} | {text[:420]} |")
        lines.append("")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
