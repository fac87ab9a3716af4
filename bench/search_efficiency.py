"""Measures how many epochs a search spends until a trial is within 1% of the best reachable value.

Whole studies run in virtual time, four trials at once (bench/searching/loop.py): each method's own searcher
and scheduler objects are called in the order of Ray Tune's events. All begin with the same recipe, which is
good and not best. A learning curve comes from a documented function with noise
(bench/searching/problems.py: LearningCurves). A study that does not get there counts with all the epochs that
it may spend, 120 full trainings; so a method that often fails looks better than it is.

Ratios are of the mean epochs over paired seeds, with 95% bootstrap intervals. A bound is met when the
interval's upper end meets it. One study of ours and one of Ray's stock also run through the real Ray Tune,
and must make the same proposals and stops (`decisions_differing`).

Syne Tune takes part where `import syne_tune` works. It is no dependency: it comes into a folder of its own
with `pip install --no-deps --target FOLDER syne-tune==0.16.0 dill==0.4.1 statsmodels==0.15.0 patsy==1.0.3
tqdm==4.70.1 xgboost-cpu==3.2.0`, and PYTHONPATH names this folder.

    python bench/search_efficiency.py [--seeds N] [--processes N] [--keep FILE] [--quick]
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy; processes share the cores
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import optuna  # noqa: E402

from bench.record import RESULTS, record  # noqa: E402
from bench.searching.intervals import Ratio, ratio_of_means  # noqa: E402
from bench.searching.loop import Method, run_study  # noqa: E402
from bench.searching.methods import Ours, StoppedAsFinished, StoppedUnseen, make_stock, ours  # noqa: E402
from bench.searching.peers import OptunaHalving, SyneTune  # noqa: E402
from bench.searching.problems import EPOCHS, PROBLEMS, LearningCurves, Problem  # noqa: E402

Make = Callable[[Problem, int], Method]
MOST_EPOCHS = 120 * EPOCHS
TUNE_TRIALS = 16  # trials of the study in the real Tune

RUNGS = {"grace_epochs": 5, "reduction_factor": 2}  # ours by default; every peer with early stopping has them

OURS: dict[str, Make] = {"ours": ours(**RUNGS)}
PEERS: dict[str, Make] = {
    "stock": partial(make_stock, grace_period=5, reduction_factor=2),
    "halving": partial(OptunaHalving, min_resource=5, reduction_factor=2),
    "syne_tune": partial(SyneTune, name="ASHABORE", grace_period=5, reduction_factor=2),
    "random": ours(sampler="random", scheduler="none"),
}
# ours with one part left out or replaced; add a row here for every new part
VARIANTS: dict[str, Make] = {
    "no_sampler": ours(sampler="random"),
    "no_early_stopping": ours(scheduler="none"),
    "stopped_unseen": ours(StoppedUnseen),
    "stopped_as_finished": ours(StoppedAsFinished),
}
# they take longer here, so only the first seeds run
SLOW: dict[str, Make] = {
    "syne_bohb": partial(SyneTune, name="BOHB", grace_period=5, reduction_factor=2),
    "stock_defaults": make_stock,
    "stock_rungs": ours(grace_epochs=1, reduction_factor=4),
}
FEW = 5
SYNE_SEEDS = 30  # a study takes 8 s of a core
METHODS = OURS | PEERS | VARIANTS | SLOW
NAMES = {
    "ours": "ours",
    "stock": "Ray's OptunaSearch and ASHAScheduler",
    "halving": "Optuna's TPE and SuccessiveHalvingPruner",
    "syne_tune": "Syne Tune's ASHABORE",
    "syne_bohb": "Syne Tune's BOHB",
    "random": "random search without early stopping",
    "no_sampler": "ours without the sampler: random values, early stopping",
    "no_early_stopping": "ours without early stopping",
    "stopped_unseen": "ours without learning from stopped trials",
    "stopped_as_finished": "ours, a stopped trial learnt as if it had finished with its last value",
    "stock_defaults": "Ray's OptunaSearch and ASHAScheduler by default: rungs 1, 4, 16, one in four survives",
    "stock_rungs": "ours with these rungs",
}
BOUNDS = {"stock": 0.7, "random": 0.33}


def main() -> None:
    arguments = parse()
    began = time.monotonic()
    groups = plan(arguments.seeds, arguments.quick)
    studies = [
        (problem, seed, name) for problem, names, seeds in groups for seed in range(seeds) for name in names
    ]
    epochs = run_all(studies, arguments.processes, arguments.keep)
    figures, text = {"seeds": arguments.seeds}, []
    for problem in dict.fromkeys(problem for problem, _, _ in groups):
        found = {
            name: [epochs[problem, seed, name] for seed in range(seeds)]
            for other, names, seeds in groups
            for name in names
            if other == problem
        }
        figures |= figures_of(found, "" if problem == "curves" else f"{problem}_")
        text += [f"## {PROBLEMS[problem].__name__}", "", *table_of(found), ""]
    print("\n".join(text))
    figures |= compare_in_tune(8 if arguments.quick else TUNE_TRIALS)
    figures["minutes"] = (time.monotonic() - began) / 60
    rounded = {name: round(value, 3) for name, value in figures.items()}
    if arguments.quick:
        print(json.dumps(rounded))
        return
    head = [
        "# The epochs that a search spends",
        "",
        f"By bench/search_efficiency.py, {arguments.seeds} seeds.",
        "",
    ]
    (RESULTS / "search_efficiency.md").write_text("\n".join(head + text).rstrip() + "\n")
    record("search_efficiency", rounded)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200, help="paired seeds")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="studies at a time")
    parser.add_argument("--keep", type=Path, help="a file for finished studies; those in it do not run again")
    parser.add_argument("--quick", action="store_true", help="few methods, one function; nothing is recorded")
    return parser.parse_args()


def plan(seeds: int, quick: bool) -> list[tuple[str, list[str], int]]:
    """What runs, in order: function, methods, seeds. Nothing was tuned on the second function."""
    fast = [name for name in OURS | PEERS if name != "syne_tune"]
    if quick:
        return [("curves", fast, seeds)]
    groups = [("curves", fast, seeds), ("curves", list(VARIANTS), seeds), ("mfhartmann", fast, seeds)]
    slow = ["stock_defaults", "stock_rungs"]
    if importlib.util.find_spec("syne_tune"):
        slow.append("syne_bohb")
        groups.append(("curves", ["syne_tune"], min(seeds, SYNE_SEEDS)))
    return [*groups, ("curves", slow, min(seeds, FEW))]


def run_all(
    studies: list[tuple[str, int, str]], processes: int, kept: Path | None
) -> dict[tuple[str, int, str], int]:
    """Runs studies in processes; returns the epochs that each spent.

    Args:
        studies: (problem, seed, method) of each.
        kept: a file of JSON lines to which every ended study is added; its studies do not run again.
    """
    found = dict(read_kept(kept)) if kept else {}
    todo = [study for study in studies if study not in found]
    with multiprocessing.get_context("spawn").Pool(processes, initializer=be_quiet) as pool:
        for count, (study, epochs) in enumerate(pool.imap_unordered(run_one, todo), 1):
            found[study] = epochs
            if kept:
                with open(kept, "a") as file:
                    file.write(json.dumps([*study, epochs]) + "\n")
            if count % 100 == 0:
                print(f"{count} of {len(todo)} studies", file=sys.stderr, flush=True)
    return found


def read_kept(path: Path) -> Iterable[tuple[tuple[str, int, str], int]]:
    if path.exists():
        for line in path.read_text().splitlines():
            *study, epochs = json.loads(line)
            yield tuple(study), epochs


def be_quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def run_one(study: tuple[str, int, str]) -> tuple[tuple[str, int, str], int]:
    """Runs one study; a study that does not get there has spent all its epochs."""
    name, seed, method = study
    problem = PROBLEMS[name](seed)
    virtual = run_study(METHODS[method](problem, seed), problem, MOST_EPOCHS)
    return study, virtual.epochs if virtual.reached else MOST_EPOCHS


def figures_of(found: dict[str, list[int]], prefix: str) -> dict[str, float]:
    """The figures of one function.

    Args:
        found: epochs of each seed, by method.
        prefix: begins the figures' names.
    """
    figures = {f"{prefix}epochs_{name}": sum(epochs) / len(epochs) for name, epochs in found.items()}
    for name in BOUNDS:
        figures |= ratio_of_means(found["ours"], found[name]).figures(f"{prefix}epochs_vs_{name}")
    return figures | best_peer(found)[1].figures(f"{prefix}vs_best_peer")


def best_peer(found: dict[str, list[int]]) -> tuple[str, Ratio]:
    """The peer that spent the fewest epochs beside ours, random search aside; and ours over it."""
    ratios = {
        name: ratio_of_means(found["ours"][: len(found[name])], found[name])
        for name in PEERS
        if name != "random" and name in found
    }
    best = max(ratios, key=lambda name: ratios[name].value)
    return best, ratios[best]


def table_of(found: dict[str, list[int]]) -> list[str]:
    """A Markdown table: a row for each method."""
    lines = [
        "| method | mean epochs | studies that did not get there | over ours |",
        "| --- | --- | --- | --- |",
    ]
    for name, epochs in found.items():
        failed = sum(spent == MOST_EPOCHS for spent in epochs)
        over = "" if name == "ours" else str(ratio_of_means(epochs, found["ours"][: len(epochs)]))
        few = f", {len(epochs)} seeds" if len(epochs) < len(found["ours"]) else ""
        lines.append(
            f"| {NAMES[name]}{few} | {sum(epochs) / len(epochs):.0f} | {failed / len(epochs):.0%} | {over} |"
        )
    return lines


def compare_in_tune(trials: int) -> dict[str, int]:
    from bench.searching.in_tune import compare_all

    be_quiet()
    problem = LearningCurves(0)
    methods = {
        "ours": ours(Ours, trials=trials)(problem, 0),
        "stock": make_stock(problem, 0, most_trials=trials),
    }
    return compare_all(problem, 0, trials, methods)


if __name__ == "__main__":
    main()
