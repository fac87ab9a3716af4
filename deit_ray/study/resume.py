"""What a resume finds: how far a study's trials came before its driver died, and what it does with each."""

import math
from dataclasses import dataclass

from optuna.trial import TrialState

from deit_ray import storage
from deit_ray.outcome import Outcome
from deit_ray.results.folders import JOURNAL, saved_steps
from deit_ray.results.journal import iterate_points
from deit_ray.study.budget import exceeded
from deit_ray.study.records import TrialRecord
from deit_ray.study.schedule import StudyScheduler
from deit_ray.study.study import Study
from deit_ray.trial.failure import read_failure

Results = tuple[tuple[float, int, float], ...]  # (time in s, epoch, value) of each


@dataclass(frozen=True)
class Reconciled:
    """What a resume does with a trial.

    Attributes:
        action: kept, ended, continued or run again.
        step: the step of the checkpoint from which the trial continues; 0 if it has none.
        outcome: the outcome of a trial that had ended before its driver could note the end; else None.
        late: the results that the trial had measured and its driver had not noted, see `late_results`.
    """

    number: int
    action: str
    step: int = 0
    outcome: Outcome | None = None
    late: Results = ()

    @property
    def text(self) -> str:
        """The decision in words."""
        if self.outcome:
            return f"had {self.outcome.brief}; noted"
        return f"{self.action} from step {self.step}" if self.step else "run again from the beginning"


@dataclass(frozen=True)
class Preview:
    """What a resume would do.

    Attributes:
        name: name of the study.
        trials: what it would do with each trial, in words, by number.
        missing: the number of new trials that it would run.
        ends: the budget that would end the study at once; None if there is none.
    """

    name: str
    trials: dict[int, str]
    missing: int
    ends: str | None


def dry_run(study: Study, overrides: dict) -> Preview:
    """What a resume would do with each trial of a study; nothing is done.

    Args:
        overrides: see `Study.amended`.

    Raises:
        UserError: an override is refused, or a driver runs the study.
    """
    experiment = study.amended(overrides)
    with study.driving():  # so that no driver changes what is read
        found = reconcile(study, StudyScheduler(experiment))
    trials = {trial.number: _previewed(study, trial) for trial in found}
    ends = exceeded(experiment, study.records(), study.spent)
    return Preview(study.name, trials, max(0, experiment.search.trials - len(found)), ends)


def _previewed(study: Study, found: Reconciled) -> str:
    if found.action != "kept":
        return found.text
    outcome = study.trial(found.number).outcome
    return f"keep: {outcome.text if outcome else ''}"


def reconcile(study: Study, scheduler: StudyScheduler) -> list[Reconciled]:
    """Decides about each trial of a study without a driver, and shows the scheduler all results.

    The scheduler sees the noted results first, in the order in which they came, and then the late ones. So a
    late result does not change what was decided on an earlier one.
    """
    trials = [trial for trial in study.records() if trial.state != TrialState.WAITING]
    noted = [(*result, trial.number) for trial in trials for result in _noted(trial)]
    for _, epoch, value, number in sorted(noted):
        scheduler.judge(number, epoch, value)
    late = {trial.number: late_results(study, trial) for trial in trials if trial.state == TrialState.RUNNING}
    for _, epoch, value, number in sorted(
        (*result, number) for number, results in late.items() for result in results
    ):
        scheduler.judge(number, epoch, value)
    return [decide(study, trial, scheduler, late.get(trial.number, ())) for trial in trials]


def decide(study: Study, trial: TrialRecord, scheduler: StudyScheduler, late: Results) -> Reconciled:
    """Decides about one trial without a process. The scheduler must have seen its late results."""
    if trial.state.is_finished():
        return Reconciled(trial.number, "kept")
    folder = study.trial_folder(trial.number)
    step = max(saved_steps(folder), default=0)
    last = max([trial.epoch, *(epoch for _, epoch, _ in late)])
    stopped, failure = scheduler.stopped_at(trial.number), read_failure(folder)
    outcome = None
    if last >= study.experiment.train.epochs:
        outcome = Outcome.finished()
    elif stopped is not None:
        outcome = Outcome.stopped_early(stopped)
    elif failure is not None and failure.kind == "failed":
        outcome = Outcome.failed(failure.reason)
    if outcome:
        return Reconciled(trial.number, "ended", step, outcome, late)
    return Reconciled(trial.number, "continued" if step else "run again", step, None, late)


def late_results(study: Study, trial: TrialRecord) -> Results:
    """The results that a trial had measured and its driver had not noted, in order.

    They count up to the last whole checkpoint. Later ones will be measured again, with the same values.
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
    return tuple(sorted(result for result in results if result[1] not in trial.values))


def _noted(trial: TrialRecord) -> Results:
    """The results of a trial that its driver has noted."""
    times = trial.times
    return tuple((times.get(epoch, math.inf), epoch, value) for epoch, value in trial.values.items())
