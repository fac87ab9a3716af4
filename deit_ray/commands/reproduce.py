"""Trains a run again, and compares every metric of both."""

import math
import posixpath
from dataclasses import dataclass
from typing import Any

from deit_ray import storage
from deit_ray.commands.diff import Difference, compare
from deit_ray.errors import UserError
from deit_ray.results.folders import JOURNAL, experiment_of, find_run, name_of, new_folder
from deit_ray.results.journal import iterate_points
from deit_ray.results.origin import check_numerics, read_origins
from deit_ray.study.database import is_study
from deit_ray.terminal.session import Session
from deit_ray.trial.failure import FAILURE
from deit_ray.trial.resolve import pin_tracking
from deit_ray.trial.run import steps_per_epoch, train_in

CLOCK = ("perf/", "cost/", "system/")  # metrics that depend on the clock


@dataclass(frozen=True)
class Reproduction:
    """The comparison of a run with its repetition.

    Attributes:
        names: names of the run and of its repetition.
        step: last step that is compared.
        equal, differing: numbers of metric points that both have, with equal and with different values.
        first: the first point that differs: (metric, step, value then, value now).
        missing, added: points (metric, step) of the run alone, and of the repetition alone.
        difference: the differences between their settings, code, packages, data and machines.
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
        """Whether both measured the same points, with equal values."""
        return not (self.differing or self.missing or self.added)


def reproduce(name: str, session: Session | None = None) -> Reproduction:
    """Trains a run or trial again in a new folder, and compares every metric that does not depend on the
    clock.

    A trial that was stopped early is trained for the epochs that it had, under the schedule of all its
    epochs.

    Args:
        name: see `folders.find_run`.
        session: see `Session`; the run is looked up in its `results`.

    Raises:
        UserError: there is no such run, it has measured nothing, it continues another run, or a version
            with other numbers has trained it.
    """
    session = session or Session()
    folder = find_run(name, session.results)
    if is_study(folder):
        raise UserError(f"{name}: is a study; name one of its trials, such as {posixpath.basename(folder)}/0")
    check_numerics(name, folder)
    origins, then = read_origins(folder), points_of(folder)
    if origins and "continues" in origins[-1]:
        source = name_of(origins[-1]["continues"]["folder"])
        raise UserError(
            f"{name}: continues {source}, so it cannot be reproduced in one step; "
            f"reproduce {source}, then continue the new run"
        )
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
    again = pin_tracking(again, session)
    comment = f"{name_of(folder)} once more."
    trained = train_in(lambda e: new_folder(e, comment), again, session, splits, has_begun=True)
    now = points_of(trained.folder)
    if all(step < last or metric.startswith("train/") for metric, step in then):
        # the run stopped before the evaluation at this step; its repetition ends here, and evaluates
        now = {key: value for key, value in now.items() if key[1] < last or key[0].startswith("train/")}
    difference = compare(folder, trained.folder, session.results)
    return Reproduction(
        (name_of(folder), trained.name), last, **compare_points(then, now, last), difference=difference
    )


def points_of(folder: str) -> dict[tuple[str, int], float]:
    """The metric points of a journal that do not depend on the clock: values by (name, step)."""
    points = iterate_points(storage.join(folder, JOURNAL))
    return {(p.name, p.step): p.value for p in points if not p.name.startswith(CLOCK)}


def compare_points(
    a: dict[tuple[str, int], float], b: dict[tuple[str, int], float], last: int
) -> dict[str, Any]:
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
