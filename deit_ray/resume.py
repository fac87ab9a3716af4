"""What a resume finds: how far the trials of a study had come when its driver went away, and what is to be done with each."""

import math
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from deit_ray import storage
from deit_ray.console import Console
from deit_ray.failure import read_failure
from deit_ray.journal import iterate_segments
from deit_ray.run import JOURNAL, saved_steps
from deit_ray.schedule import StudyScheduler
from deit_ray.study import Study


@dataclass(frozen=True)
class Reconciled:
    """What a resume does with a trial.

    Attributes:
        action: kept, ended, continued or run again.
        step: the checkpoint that it goes on from; 0 where there is none.
        outcome: of one that had come to its end before anybody was told.
    """

    number: int
    action: str
    step: int = 0
    outcome: str | None = None


def dry_run(name: str, results: str, console: Console, amend: dict | None = None) -> list[Reconciled]:
    """Says what a resume would do with each trial of a study, and does nothing."""
    study = Study.open(name, results)
    trials = (amend or {}).get("search.trials", study.experiment.search.trials)
    with study.driving():  # nobody else does
        found = reconcile(study, StudyScheduler(study.experiment))
    console.show_resume(study, found, max(0, trials - len(found)))
    return found


def reconcile(study: Study, scheduler: StudyScheduler) -> list[Reconciled]:
    """What is to be done with each trial of a study that nobody drives; shows the scheduler all that is known.

    Results of unfinished trials count as far as their last whole checkpoint goes; what came later is measured again, to the same values.
    """
    metric, epochs = study.experiment.search.metric, study.experiment.train.epochs
    trials = study.optuna.get_trials(deepcopy=False)
    open_trials = [trial for trial in trials if trial.state == TrialState.RUNNING]
    folders = {trial.number: study.trial_folder(trial.number) for trial in open_trials}
    results = [(*reported, trial.number) for trial in trials for reported in _reported(trial)]
    for trial in open_trials:
        known = trial.intermediate_values
        results += [(*late, trial.number) for late in saved_results(folders[trial.number], metric) if late[1] not in known]
    for _, epoch, value, number in sorted(results):
        scheduler.judge(number, epoch, value)
    found = []
    for trial in trials:
        if trial.state == TrialState.WAITING:
            continue
        if trial.state != TrialState.RUNNING:
            found.append(Reconciled(trial.number, "kept"))
            continue
        step = max(saved_steps(folders[trial.number]), default=0)
        last = max((epoch for _, epoch, _, number in results if number == trial.number), default=0)
        stopped, failure = scheduler.stopped_at(trial.number), read_failure(folders[trial.number])
        if last >= epochs:
            found.append(Reconciled(trial.number, "ended", step, "finished"))
        elif stopped is not None:
            found.append(Reconciled(trial.number, "ended", step, f"stopped early at epoch {stopped}"))
        elif failure is not None and failure.kind == "failed":
            found.append(Reconciled(trial.number, "ended", step, f"failed: {failure.reason}"))
        else:
            found.append(Reconciled(trial.number, "continued" if step else "run again", step))
    return found


def saved_results(folder: str, metric: str) -> list[tuple[float, int, float]]:
    """(time in s, epoch, value) of a trial's evaluations up to its last whole checkpoint, from its journal."""
    saved = max(saved_steps(folder), default=-1)
    points = {(p.name, p.step): p for found in iterate_segments(storage.join(folder, JOURNAL), 0) for p in found}
    evaluations = [(point, points.get((metric, step))) for (name, step), point in points.items() if name == "epoch" and step <= saved]
    return [(value.time_ms / 1000, int(epoch.value), value.value) for epoch, value in evaluations if value is not None]


def _reported(trial: FrozenTrial) -> list[tuple[float, int, float]]:
    """(time in s, epoch, value) of what Optuna knows of a trial."""
    times = trial.user_attrs.get("times", {})
    return [(times.get(str(epoch), math.inf), epoch, value) for epoch, value in trial.intermediate_values.items()]
