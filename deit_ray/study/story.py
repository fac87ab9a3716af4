"""The story of a study: what its trials have found, what it cost, and how it continues, as plain values.

It has several faces, which add nothing to it: `status` and `tune` (cli/views.py), the description of the
study's run in MLflow (description.py), and the page that `report` writes (page.py, with figures.py).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deit_ray import storage
from deit_ray.accuracy import chance_remark, show_accuracy
from deit_ray.outcome import MODEL, Kind
from deit_ray.results.folders import BEST
from deit_ray.results.origin import describe_other_numerics
from deit_ray.study.records import TrialRecord
from deit_ray.terminal.format import counted, duration, short

if TYPE_CHECKING:
    import pandas as pd

    from deit_ray.experiment.config import Search
    from deit_ray.study.study import Study

BEST_SHOWN = 20  # trials of a leaderboard
RUNNING, INTERRUPTED = "running", "interrupted"  # states of a study that has not ended
MORE = "+20"  # trials that the command to extend a study names
LEAST_FINISHED = 10  # finished trials without which no importance is computed
TOP, TOP_TRIALS = 0.1, 5  # PED-ANOVA compares the best tenth with all trials, but at least so many trials


@dataclass(frozen=True)
class Command:
    """A command of deit-ray that a story names; `hints.command` or `hints.anywhere` writes it.

    Attributes:
        purpose: what it is for.
        words: its words, without deit-ray and --results.
        takes_results: whether it takes --results.
    """

    purpose: str
    words: tuple[str, ...]
    takes_results: bool = True


@dataclass(frozen=True)
class Stops:
    """The trials that were stopped early after one epoch.

    Attributes:
        epoch: that epoch.
        count: number of trials.
        lowest, highest: the ends of their best values; NaN if none has a value.
    """

    epoch: int
    count: int
    lowest: float
    highest: float


@dataclass(frozen=True)
class Failures:
    """The trials that failed for one reason, by number."""

    reason: str
    numbers: tuple[int, ...]


@dataclass(frozen=True, repr=False)
class Story:
    """What there is to say about a study.

    Attributes:
        name, folder: of the study.
        metric, keys: what it ranks by, and the searched keys.
        epochs: of a trial of full length.
        state: running, interrupted, or why it has ended.
        driver: host, pid and start of the process that runs it.
        counts: number of trials by state.
        missing: the number of trials not drawn yet.
        spent_s, gpu_s: wall time and GPU time so far.
        money: the price of that GPU time; None if `cost.per_gpu_hour` is not set.
        board: see `Study.leaderboard`.
        images: the number of images on which the metric is measured; None if it is not known.
        choices: the number of evaluations from which the best trial's value was chosen.
        tested: the best trial's metrics on the test images; empty if they were not measured.
        largest: see `StudyRecord.largest`.
        importances: each searched key's share in being among the best trials, the largest first; empty with
            fewer than `LEAST_FINISHED` finished trials.
        rule: how trials are stopped early, in words.
        stops: the trials that were, by epoch.
        failures: the trials that failed, the most frequent reason first.
        trained_epochs: of all trials together.
        refusal: why the study cannot be resumed here; None if it can.
        records: all trials, with their curves and times: the data of figures.
    """

    name: str
    folder: str
    metric: str
    keys: list[str]
    epochs: int
    state: str
    driver: dict | None
    counts: dict[str, int]
    missing: int
    spent_s: float
    gpu_s: float
    board: pd.DataFrame
    images: float | None
    tested: dict[str, float]
    largest: dict[str, float]
    money: float | None = None
    choices: int = 1
    importances: dict[str, float] = field(default_factory=dict)
    rule: str = ""
    stops: list[Stops] = field(default_factory=list)
    failures: list[Failures] = field(default_factory=list)
    trained_epochs: int = 0
    refusal: str | None = None
    records: list[TrialRecord] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"{self.name}: {self.state}; {self.best_line()}"

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        from deit_ray.study.description import describe

        return describe(self)

    @property
    def has_ended(self) -> bool:
        return self.state not in (RUNNING, INTERRUPTED)

    @property
    def best(self) -> pd.Series | None:
        """The leaderboard's row of the best finished trial; None if no trial has finished."""
        first = self.board.iloc[0] if len(self.board) else None
        return first if first is not None and first["state"] == str(Kind.FINISHED) else None

    @property
    def best_params(self) -> dict:
        """The searched values of the best trial."""
        return {} if self.best is None else {key: self.best[key] for key in self.keys}

    def trial_counts(self) -> str:
        """How many trials are in which state, such as: 6 finished, 4 stopped early."""
        counts = [f"{count} {state}" for state, count in self.counts.items()]
        if self.missing:
            counts.append(f"{self.missing} not drawn yet")
        return ", ".join(counts) or "none"

    def cost(self) -> str:
        """Time, GPU time and money so far."""
        gpu = f", {self.gpu_s / 3600:.2f} GPU-hours" if self.gpu_s else ""
        money = f", {self.money:,.2f} (cost.per_gpu_hour)" if self.gpu_s and self.money is not None else ""
        return f"{duration(self.spent_s)}{'' if self.has_ended else ' so far'}{gpu}{money}"

    def saved(self) -> str | None:
        """The epochs that early stops have saved; None where there were none."""
        if not self.stops:
            return None
        saved = sum(stops.count * (self.epochs - stops.epoch) for stops in self.stops)
        return f"{self.trained_epochs} epochs were trained, {saved} were saved by early stops"

    def best_line(self) -> str:
        """The best trial with its values; or that there is none yet."""
        if self.best is None:
            return "no trial has finished" + ("" if self.has_ended else " yet")
        names = [name for name in ("test/top1", "test/top1_balanced") if name in self.tested]
        score = "".join(f", {name} {self.tested[name]:.4f}" for name in names)
        return f"trial {self.best['trial']}, {self.metric} {self.best['best']:.4f}{score}"

    def intervals(self) -> list[str]:
        """The intervals of the best trial's values; empty if the numbers of images are not known."""
        shown = []
        if self.best is not None and self.images:
            chosen = f", as the best of {self.choices} evaluations" if self.choices > 1 else ""
            shown.append(
                f"{self.metric} {show_accuracy(self.best['best'], self.images, self.choices)}{chosen}"
            )
        if "test/top1" in self.tested and "test/images" in self.tested:
            shown.append(f"test/top1 {show_accuracy(self.tested['test/top1'], self.tested['test/images'])}")
        return shown

    def remark(self) -> str | None:
        """Says that the best model is not better than always answering the largest class, if that is so.

        The test images decide, if the model was tested; else those by which it was chosen.
        """
        if self.best is None:
            return None
        if "test/top1" in self.tested:
            return chance_remark(
                "test/top1",
                self.tested["test/top1"],
                self.tested.get("test/images"),
                self.largest.get("test"),
            )
        split, _, name = self.metric.partition("/")
        share = self.largest.get(split) if name.startswith("top1") else None
        return chance_remark(self.metric, self.best["best"], self.images, share)

    def training(self) -> list[Command]:
        """The commands that train the best configuration again; empty if no trial has finished."""
        if self.best is None:
            return []
        if self.has_ended and storage.is_local(self.folder):
            config = storage.absolute(storage.join(self.folder, BEST))
            return [Command("train the best configuration again", ("train", config), False)]
        return [
            Command("write the best configuration and its weights", ("best", self.name, "--out", ".")),
            Command("train it again", ("train", f"{self.name}/{BEST}"), False),
        ]

    def continuing(self) -> list[Command]:
        """The commands that continue the study; empty if it cannot be continued."""
        if self.refusal or self.state.startswith("search.space"):  # each combination was tried
            return []
        resume = ("tune", "--resume", self.name)
        if self.state == RUNNING:
            return [
                Command("end it", ("stop", self.name)),
                Command("resume it if its process has died", resume),
            ]
        if self.state == INTERRUPTED:
            return [Command("resume it", resume)]
        if self.state.startswith("search.budget."):
            key = self.state.partition(":")[0]
            raised = (*resume, "--set", f"{key}=VALUE")
            return [Command("continue it with a larger budget", raised)]
        return [Command("add trials", (*resume, "--trials", MORE))]

    @property
    def model(self) -> str:
        """The address of the best model's weights, once the study has ended."""
        return storage.join(self.folder, MODEL)


def tell(study: Study, is_running: bool | None = None) -> Story:
    """The story of a study, as its database has it now.

    Args:
        is_running: whether a process runs it; by default its lock says so.
    """
    driver = None if is_running is False else study.driver()
    records, spent, experiment = study.records(), study.spent, study.experiment
    board = study.leaderboard(records)
    state = RUNNING
    if driver is None:
        board["state"] = board["state"].replace(RUNNING, INTERRUPTED)
        state = study.ended or INTERRUPTED
    best, price = study.find_best(records), experiment.cost.per_gpu_hour
    return Story(
        name=study.name,
        folder=study.folder,
        metric=experiment.search.metric,
        keys=list(experiment.search.space),
        epochs=experiment.train.epochs,
        state=state,
        driver=driver,
        counts={str(state): int(count) for state, count in board["state"].value_counts().items()},
        missing=max(0, experiment.search.trials - len(board)),
        spent_s=spent.wall_s,
        gpu_s=spent.gpu_s,
        money=None if price is None else price * spent.gpu_s / 3600,
        board=board,
        images=next((trial.images for trial in records if trial.images), None),
        choices=1 if best is None else best.choices,
        tested=study.tested_best(records),
        largest=study.largest,
        importances=importances(study, records),
        rule=describe_rule(experiment.search, experiment.train.epochs),
        stops=list(_stops(records)),
        failures=_failures(records),
        trained_epochs=sum(trial.epoch for trial in records),
        refusal=describe_other_numerics(study.name, study.folder) if driver is None else None,
        records=records,
    )


def importances(study: Study, records: list[TrialRecord]) -> dict[str, float]:
    """Each searched key's share in whether a finished trial is among the best, the largest first.

    The shares sum to 1. They are those of PED-ANOVA (Watanabe et al. 2023), see `evaluator`.

    Returns:
        An empty dict if fewer than `LEAST_FINISHED` trials have finished, or if no key makes a difference.
    """
    finished = sum(_has_value(trial) for trial in records)
    if finished < LEAST_FINISHED:
        return {}
    with warnings.catch_warnings(action="ignore"):  # of few trials; a person is told how many there are
        found = evaluator(finished).evaluate(study.optuna)
    total = sum(found.values())
    return {key: share / total for key, share in found.items()} if total > 0 else {}


def evaluator(finished: int):
    """Optuna's PED-ANOVA for so many finished trials.

    It compares the values of the best trials with those of all: the best tenth, but at least five trials, as
    Optuna's documentation advises.
    """
    from optuna.importance import PedAnovaImportanceEvaluator

    return PedAnovaImportanceEvaluator(target_quantile=max(TOP, min(0.5, TOP_TRIALS / finished)))


def _has_value(trial: TrialRecord) -> bool:
    return trial.state.name == "COMPLETE" and trial.value is not None and math.isfinite(trial.value)


def describe_rule(search: Search, epochs: int) -> str:
    """How a study stops trials early, in words."""
    if search.scheduler == "asha":
        rungs, rung = [], search.grace_epochs
        while rung <= epochs:
            rungs.append(str(rung))
            rung *= search.reduction_factor
        if not rungs:
            return "no trial is stopped early: search.grace_epochs is more than train.epochs"
        part = "half" if search.reduction_factor == 2 else f"1 in {search.reduction_factor}"
        return (
            f"after epoch {', '.join(rungs)} a trial goes on if it is in the best {part} of those that have "
            "got there (asha)"
        )
    if search.scheduler == "median":
        return (
            f"from epoch {search.grace_epochs} on, a trial is stopped whose best value is below the median "
            "of the other trials' means up to that epoch (median)"
        )
    return "no trial is stopped early (search.scheduler: none)"


def _stops(records: list[TrialRecord]) -> Iterator[Stops]:
    """The trials that were stopped early, by epoch, the earliest first."""
    by_epoch: dict[int, list[float]] = {}
    for trial in records:
        if trial.state.name == "PRUNED":
            by_epoch.setdefault(trial.epoch, []).append(math.nan if trial.best is None else trial.best)
    for epoch, values in sorted(by_epoch.items()):
        known = [value for value in values if not math.isnan(value)]
        yield Stops(epoch, len(values), min(known, default=math.nan), max(known, default=math.nan))


def _failures(records: list[TrialRecord]) -> list[Failures]:
    by_reason: dict[str, list[int]] = {}
    for trial in records:
        if trial.state.is_finished() and trial.ending.kind == Kind.FAILED:
            by_reason.setdefault(trial.ending.detail, []).append(trial.number)
    found = [Failures(reason, tuple(numbers)) for reason, numbers in by_reason.items()]
    return sorted(found, key=lambda failures: -len(failures.numbers))


def board_cells(row: pd.Series, keys: list[str]) -> list[str]:
    """A leaderboard's row as people read it: trial, state, epochs, best and last value, searched values."""
    close = "=" if row["close"] else " "
    error = f" ({row['low']:.3f}-{row['high']:.3f})" if row["low"] == row["low"] else ""
    value = f"{close} {row['best']:.4f}{error}" if row["best"] == row["best"] else "  -"
    last = f"{row['last']:.4f}" if row["last"] == row["last"] else "-"
    searched = ["-" if _is_missing(row[key]) else short(row[key]) for key in keys]
    return [str(row["trial"]), row["state"], str(row["epochs"]), value, last, *searched]


def _is_missing(value) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


TIES = "= within the error of the best: too few images to say which is better"


def tell_trial(trial: TrialRecord, metric: str, epochs: int, rule: str) -> str:
    """One line: what became of a trial that has ended.

    Args:
        epochs: of a trial of full length.
        rule: the name of the rule that stops trials early.
    """
    ending, best = trial.ending, ""
    if trial.best is not None and math.isfinite(trial.best):
        at = f" at epoch {trial.best_epoch}" if trial.best_epoch else ""
        best = f"{metric} {show_accuracy(trial.best, trial.images, trial.choices)}{at}"
    so_far = f" after epoch {trial.epoch} of {epochs}" if trial.epoch else " before its first evaluation"
    match ending.kind:
        case Kind.FINISHED:
            return (
                f"finished: {best or 'without a value'}, the best of {counted(trial.choices, 'evaluation')}"
            )
        case Kind.STOPPED_EARLY:
            return f"stopped early by {rule}{so_far}; its best {best or 'value is not known'}"
        case Kind.FAILED if ending.is_refused:
            return ending.detail
        case Kind.FAILED:
            return f"failed{so_far}: {ending.detail}"
    return f"cancelled{so_far}" + (f"; its best {best}" if best else "")
