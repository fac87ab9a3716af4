"""Compares two runs, studies, trials or experiment files."""

import difflib
import math
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deit_ray.experiment.config import Experiment, flatten
from deit_ray.experiment.load import load_experiment
from deit_ray.results.folders import (
    experiment_of,
    find_run,
    measured,
    name_of,
    results_of,
)
from deit_ray.results.origin import origin_of
from deit_ray.study.database import is_study
from deit_ray.study.study import Study

Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Difference:
    """The differences between two runs, studies, trials or experiment files.

    Where a key is missing on one side, its value there is None.

    Attributes:
        names: both names.
        settings: both values by dotted key.
        code, packages, data, machine: both values by name; None where one side has no origin.json.
        patch: unified diff of the two patches of uncommitted changes.
        metric: metric by which the first experiment ranks.
        values: (best, last) value of the metric on each side; None where nothing was measured.
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
        """Whether both have an origin.json, which names their code, packages, data and machine."""
        return self.code is not None

    def __bool__(self) -> bool:
        return bool(self.settings or self.code or self.packages or self.data or self.machine)


def compare(a: str, b: str, results: str = "results") -> Difference:
    """The differences between two runs.

    Args:
        a, b: each a run, study or trial, see `folders.find_run`, or an experiment file, which has only
            settings.
        results: folder in which runs and studies are looked up.

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
    """The fields of a `Difference` that follow from two origins, see `origin.note_origin`."""
    if a is None or b is None:
        return {"code": None, "patch": "", "packages": None, "data": None, "machine": None}
    patches = [(origin["code"]["changes"] or "").splitlines() for origin in (a, b)]
    patch = "\n".join(difflib.unified_diff(*patches, "changes of A", "changes of B", lineterm=""))
    code = _pairs(*({key: value for key, value in o["code"].items() if key != "changes"} for o in (a, b)))
    if patch:
        code["uncommitted changes"] = tuple(f"{len(p)} lines" if p else "none" for p in patches)
    data = _pairs(
        *({"fingerprint": o["data"]["fingerprint"], "teacher's weights": o["teacher"]} for o in (a, b))
    )
    return {
        "code": code,
        "patch": patch,
        "packages": _pairs(a["packages"], b["packages"]),
        "data": data,
        "machine": _pairs(a["machine"], b["machine"]),
    }


def value_of(folder: str, experiment: Experiment) -> tuple[float, float] | None:
    """(best, last) value of a run's or trial's ranked metric; for a study, its best trial's value twice.

    A study's database says the values of its trials, as in the leaderboard.
    """
    if is_study(folder):
        best = Study.open(posixpath.basename(folder), results_of(folder)).find_best()
        return None if best is None else (best.value, best.value)
    parent, _, name = folder.rpartition("/")
    if name.startswith("trial-") and is_study(parent):
        study = Study.open(posixpath.basename(parent), results_of(folder))
        trial = study.trial(int(name.removeprefix("trial-")))
        return None if trial.best is None else (trial.best, trial.last)
    values = {
        step: value
        for step, value in measured(folder, experiment.search.metric).items()
        if math.isfinite(value)
    }
    return (max(values.values()), values[max(values)]) if values else None


def _side(name: str, results: str) -> tuple[str, Experiment, str | None]:
    """(name, experiment, folder) of one side; the folder is None for an experiment file."""
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return name, load_experiment(name), None
    folder = find_run(name, results)
    return name_of(folder), experiment_of(folder), folder


def _pairs(a: dict, b: dict) -> dict[str, Pair]:
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}
