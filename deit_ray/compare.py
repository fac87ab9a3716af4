"""Why two runs differ, and whether one can be had again."""

import difflib
import math
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from deit_ray import storage
from deit_ray.config import Experiment, flatten
from deit_ray.console import Console
from deit_ray.errors import UserError
from deit_ray.failure import FAILURE
from deit_ray.folders import JOURNAL, experiment_of, find_run, measured, name_of, new_folder, results_of
from deit_ray.journal import iterate_points
from deit_ray.load import load_experiment
from deit_ray.origin import origin_of, read_origins
from deit_ray.study import DATABASE, Study

CLOCK = ("perf/", "cost/")  # metrics that depend on the clock
Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Difference:
    """What differs between two runs, studies, trials or experiment files; a key that is missing on one side is None there.

    Attributes:
        names: of the two.
        settings: both values by dotted key.
        code, packages, data, machine: both values by what they are; None where it is not known of one of them.
        patch: the uncommitted changes of the code, as a unified diff of the two patches.
        metric: that the experiments rank by.
        values: of each one (best, last), or None where nothing was measured.
    """

    names: tuple[str, str]
    settings: dict[str, Pair]
    code: dict[str, Pair] | None
    patch: str
    packages: dict[str, Pair] | None
    data: dict[str, Pair] | None
    machine: dict[str, Pair] | None
    metric: str
    values: tuple[tuple[float, float] | None, tuple[float, float] | None]

    @property
    def known(self) -> bool:
        """Whether it was noted of both what made them."""
        return self.code is not None

    def __bool__(self) -> bool:
        return bool(self.settings or self.code or self.packages or self.data or self.machine)


def compare(a: str, b: str, results: str = "results") -> Difference:
    """What differs between two runs.

    Args:
        a, b: each a run, study or trial, see `folders.find_run`, or an experiment file, of which the settings alone are known.

    Raises:
        UserError: one of them does not exist.
    """
    sides = [_side(name, results) for name in (a, b)]
    names, experiments, folders = zip(*sides, strict=True)
    settings = _pairs(*(flatten(experiment.as_dict()) for experiment in experiments))
    values = tuple(folder and value_of(folder, experiment) for _, experiment, folder in sides)
    made_by = compare_origins(*map(origin_of, folders))
    return Difference(names, settings, **made_by, metric=experiments[0].search.metric, values=values)


def compare_origins(a: dict | None, b: dict | None) -> dict[str, Any]:
    """The fields of a `Difference` that follow from the two origins."""
    if a is None or b is None:
        return {"code": None, "patch": "", "packages": None, "data": None, "machine": None}
    patches = [(origin["code"]["changes"] or "").splitlines() for origin in (a, b)]
    patch = "\n".join(difflib.unified_diff(*patches, "changes of A", "changes of B", lineterm=""))
    code = _pairs(*({key: value for key, value in o["code"].items() if key != "changes"} for o in (a, b)))
    if patch:
        code["uncommitted changes"] = tuple(f"{len(p)} lines" if p else "none" for p in patches)
    data = _pairs(*({"fingerprint": o["data"]["fingerprint"], "teacher's weights": o["teacher"]} for o in (a, b)))
    return {
        "code": code,
        "patch": patch,
        "packages": _pairs(a["packages"], b["packages"]),
        "data": data,
        "machine": _pairs(a["machine"], b["machine"]),
    }


def value_of(folder: str, experiment: Experiment) -> tuple[float, float] | None:
    """(best, last) value of the ranked metric of a run or trial; of a study twice the value of its best trial."""
    if storage.exists(storage.join(folder, DATABASE)):
        trials = Study.open(posixpath.basename(folder), results_of(folder)).optuna.get_trials(deepcopy=False)
        best = max((trial.value for trial in trials if trial.state.name == "COMPLETE"), default=None)
        return best and (best, best)
    values = {step: value for step, value in measured(folder, experiment.search.metric).items() if math.isfinite(value)}
    return (max(values.values()), values[max(values)]) if values else None


def _side(name: str, results: str) -> tuple[str, Experiment, str | None]:
    """(name, experiment, folder), without a folder for an experiment file."""
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return name, load_experiment(name), None
    folder = find_run(name, results)
    return name_of(folder), experiment_of(folder), folder


def _pairs(a: dict, b: dict) -> dict[str, Pair]:
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}


@dataclass(frozen=True)
class Reproduction:
    """How a run's second time compares with its first.

    Attributes:
        names: of the run and of its repetition.
        step: up to which they are compared.
        equal, differing: numbers of metric points that both have.
        first: the first point that differs: (metric, step, value then, value now).
        missing, added: points (metric, step) that only the first or only the second time has.
        difference: of what made them.
    """

    names: tuple[str, str]
    step: int
    equal: int
    differing: int
    first: tuple[str, int, float, float] | None
    missing: list[tuple[str, int]]
    added: list[tuple[str, int]]
    difference: Difference

    @property
    def same(self) -> bool:
        return not (self.differing or self.missing or self.added)


def reproduce(
    name: str, results: str = "results", address: str | None = None, console: Console | None = None, verbose: bool = False
) -> Reproduction:
    """Trains a run or trial again in a new folder and compares every metric but those that depend on the clock.

    A trial that was stopped early is trained as far as it came, under the schedule of the whole.

    Args:
        name: see `folders.find_run`.

    Raises:
        UserError: there is no such run, it has measured nothing, or it did not begin at its beginning.
    """
    from deit_ray.run import steps_per_epoch, train_in

    folder = find_run(name, results)
    if storage.exists(storage.join(folder, DATABASE)):
        raise UserError(f"{name}: is a study; name one of its trials, such as {posixpath.basename(folder)}/0")
    origins, then = read_origins(folder), points_of(folder)
    if origins and "continues" in origins[-1]:
        source = name_of(origins[-1]["continues"]["folder"])
        raise UserError(f"{name}: continues {source}, so it cannot be had again in one go; reproduce {source} and continue that")
    experiment = experiment_of(folder)
    last, per_epoch = max((step for _, step in then), default=0), steps_per_epoch(experiment)
    epochs = math.ceil(last / per_epoch)
    if storage.exists(storage.join(folder, FAILURE)) and last % per_epoch:
        epochs = last // per_epoch  # the epoch in which it failed would fail again
        last = epochs * per_epoch
    if not epochs:
        raise UserError(f"{name}: has measured nothing, so there is nothing to compare with")
    again = experiment.with_overrides(
        {
            "name": f"{name_of(folder).replace('/', '-')}-again",
            "train.epochs": epochs,
            "optim.schedule_epochs": experiment.optim.schedule_epochs or experiment.train.epochs,
        }
    )
    splits = ("val", *{"test" for metric, _ in then if metric.startswith("test/")})
    trained = train_in(lambda e: new_folder(e, f"{name_of(folder)} once more."), again, address, console, verbose, splits)
    now = points_of(trained.folder)
    if all(step < last or metric.startswith("train/") for metric, step in then):
        # it stopped before an evaluation that its repetition, which ends there, makes
        now = {key: value for key, value in now.items() if key[1] < last or key[0].startswith("train/")}
    difference = compare(folder, trained.folder, results)
    return Reproduction((name_of(folder), trained.name), last, **compare_points(then, now, last), difference=difference)


def points_of(folder: str) -> dict[tuple[str, int], float]:
    """Every metric point of a journal by (name, step), but those that depend on the clock."""
    points = iterate_points(storage.join(folder, JOURNAL))
    return {(p.name, p.step): p.value for p in points if not p.name.startswith(CLOCK)}


def compare_points(a: dict[tuple[str, int], float], b: dict[tuple[str, int], float], last: int) -> dict[str, Any]:
    """The fields of a `Reproduction` that follow from two journals' points, up to a step."""
    a, b = ({key: value for key, value in points.items() if key[1] <= last} for points in (a, b))
    both = sorted(a.keys() & b.keys(), key=lambda key: (key[1], key[0]))
    differing = [key for key in both if a[key] != b[key] and not (math.isnan(a[key]) and math.isnan(b[key]))]
    return {
        "equal": len(both) - len(differing),
        "differing": len(differing),
        "first": (*differing[0], a[differing[0]], b[differing[0]]) if differing else None,
        "missing": sorted(a.keys() - b.keys(), key=lambda key: key[1]),
        "added": sorted(b.keys() - a.keys(), key=lambda key: key[1]),
    }


def show_difference(found: Difference) -> Group:
    """A `Difference` as the terminal shows it."""
    parts = []
    for title, pairs in (("settings", found.settings), *_made_by(found)):
        if pairs:
            parts += [_table(title, pairs, found.names), Text()]
    if found.patch:
        parts += [Text("uncommitted changes, A's patch against B's", style="bold"), Syntax(found.patch, "diff", theme="ansi_dark"), Text()]
    if not found:
        parts.append(Text("nothing differs" if found.known else "no setting differs", style="green"))
    if not found.known:
        parts.append(Text("code, packages, data and machine: not known of both", style="yellow"))
    values = {f"{found.metric}, {which}": tuple(v and f"{v[i]:.4f}" for v in found.values) for i, which in enumerate(("best", "last"))}
    if any(found.values):
        parts.append(_table("result", values, found.names))
    return Group(*parts)


def show_reproduction(found: Reproduction) -> Group:
    """A `Reproduction` as the terminal shows it."""
    total = found.equal + found.differing
    style = "bold green" if found.same else "bold red"
    lines = [
        Text(f"{found.names[1]}: {found.equal} of {total} metric points up to step {found.step} equal those of {found.names[0]}", style)
    ]
    if found.first:
        metric, step, then, now = found.first
        lines.append(Text(f"  {found.differing} differ, first {metric} at step {step}: {then!r} then, {now!r} now"))
    for points, when in ((found.missing, "then"), (found.added, "now")):
        if points:
            lines.append(Text(f"  {len(points)} measured only {when}, first {points[0][0]} at step {points[0][1]}"))
    made = [(title, pairs) for title, pairs in _made_by(found.difference) if pairs]
    if not found.difference.known:
        lines.append(Text("code, packages, data and machine of then: not noted", "yellow"))
    elif not made:
        lines.append(Text("code, packages, data and machine are the same"))
    return Group(*lines, *(_table(title, pairs, ("then", "now")) for title, pairs in made))


def _made_by(found: Difference) -> list[tuple[str, dict[str, Pair] | None]]:
    return [("code", found.code), ("packages", found.packages), ("data", found.data), ("machine", found.machine)]


def _table(title: str, pairs: dict[str, Pair], names: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title)
    for name in names:
        table.add_column(name, overflow="fold")
    for key, values in pairs.items():
        table.add_row(key, *(Text(_shown(value)) for value in values))
    return table


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)
