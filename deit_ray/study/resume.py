"""What a resume finds: how far the trials of a study had come when its driver went away, and what is to be done with each."""

import math
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from deit_ray import storage
from deit_ray.results.folders import JOURNAL, saved_steps
from deit_ray.results.journal import iterate_points
from deit_ray.study.budget import exceeded
from deit_ray.study.schedule import StudyScheduler
from deit_ray.study.study import Study
from deit_ray.terminal.console import Console
from deit_ray.trial.failure import read_failure


@dataclass(frozen=True)
class Reconciled:
    """What a resume does with a trial.

    Attributes:
        action: kept, ended, continued or run again.
        step: the checkpoint that it goes on from; 0 where there is none.
        outcome: of one that had come to its end before anybody was told.
        late: what it had measured and Optuna was not told, see `late_results`.
    """

    number: int
    action: str
    step: int = 0
    outcome: str | None = None
    late: tuple[tuple[float, int, float], ...] = ()


def dry_run(name: str, results: str, console: Console, amend: dict | None = None) -> list[Reconciled]:
    """Says what a resume would do with each trial of a study, and does nothing."""
    study = Study.open(name, results)
    experiment = study.amended(amend or {})
    with study.driving():  # nobody else does
        found = reconcile(study, StudyScheduler(experiment))
    ends = exceeded(experiment, study.optuna.get_trials(deepcopy=False), study.spent)
    console.show_resume(study, found, max(0, experiment.search.trials - len(found)), ends)
    return found


def reconcile(study: Study, scheduler: StudyScheduler) -> list[Reconciled]:
    """What is to be done with each trial of a study that nobody drives; shows the scheduler all that is known.

    First what its drivers were told, in the order in which that came, then what trials had measured since: so no later
    result changes what was decided on an earlier one.
    """
    trials = [trial for trial in study.optuna.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]
    told = [
        (seconds, epoch, value, trial.number) for trial in trials for seconds, epoch, value in _told(trial)
    ]
    for _, epoch, value, number in sorted(told):
        scheduler.judge(number, epoch, value)
    late = {trial.number: late_results(study, trial) for trial in trials if trial.state == TrialState.RUNNING}
    for _, epoch, value, number in sorted(
        (*result, number) for number, results in late.items() for result in results
    ):
        scheduler.judge(number, epoch, value)
    return [decide(study, trial, scheduler, late.get(trial.number, ())) for trial in trials]


def decide(study: Study, trial: FrozenTrial, scheduler: StudyScheduler, late: tuple) -> Reconciled:
    """What is to be done with one trial that nobody runs, whose late results the scheduler has seen."""
    if trial.state.is_finished():
        return Reconciled(trial.number, "kept")
    folder = study.trial_folder(trial.number)
    step = max(saved_steps(folder), default=0)
    last = max([*trial.intermediate_values, *(epoch for _, epoch, _ in late)], default=0)
    stopped, failure = scheduler.stopped_at(trial.number), read_failure(folder)
    if last >= study.experiment.train.epochs:
        return Reconciled(trial.number, "ended", step, "finished", late)
    if stopped is not None:
        return Reconciled(trial.number, "ended", step, f"stopped early at epoch {stopped}", late)
    if failure is not None and failure.kind == "failed":
        return Reconciled(trial.number, "ended", step, f"failed: {failure.reason}", late)
    return Reconciled(trial.number, "continued" if step else "run again", step, None, late)


def late_results(study: Study, trial: FrozenTrial) -> tuple[tuple[float, int, float], ...]:
    """(time in s, epoch, value) of what a trial had measured and Optuna was not told, in order.

    It counts as far as the last whole checkpoint goes; what came later is measured again, to the same values.
    """
    folder, metric = study.trial_folder(trial.number), study.experiment.search.metric
    saved = max(saved_steps(folder), default=-1)
    points = {(point.name, point.step): point for point in iterate_points(storage.join(folder, JOURNAL))}
    evaluations = [
        (point, points.get((metric, step)))
        for (name, step), point in points.items()
        if name == "epoch" and step <= saved
    ]
    results = [
        (value.time_ms / 1000, int(epoch.value), value.value)
        for epoch, value in evaluations
        if value is not None
    ]
    return tuple(sorted(result for result in results if result[1] not in trial.intermediate_values))


def _told(trial: FrozenTrial) -> list[tuple[float, int, float]]:
    """(time in s, epoch, value) of what Optuna was told of a trial."""
    times = trial.user_attrs.get("times", {})
    return [
        (times.get(str(epoch), math.inf), epoch, value) for epoch, value in trial.intermediate_values.items()
    ]
