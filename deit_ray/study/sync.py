"""The MLflow runs of a study or a single run: the driver delivers them while it runs, `sync` afterwards."""

import contextlib
import json
import posixpath
from collections.abc import Iterator
from datetime import datetime

from optuna.trial import TrialState

from deit_ray import storage
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment
from deit_ray.experiment.load import dump_experiment
from deit_ray.outcome import Kind, Outcome
from deit_ray.results.folders import BEST, EXPERIMENT, RUN, find_run, recorded
from deit_ray.results.lock import driving
from deit_ray.study.database import is_study
from deit_ray.study.records import TrialRecord
from deit_ray.study.study import Study
from deit_ray.terminal.console import Console
from deit_ray.terminal.format import counted, short
from deit_ray.tracking.tracked import Record, Run
from deit_ray.tracking.tracker import Tracker
from deit_ray.trial.failure import read_failure
from deit_ray.trial.run import best_name, best_of, start_single

PATIENCE_S = 30.0  # longest wait while no delivery succeeds
LIMIT_S = 24 * 3600.0  # longest wait


def sync(name: str, results: str = "results", console: Console | None = None) -> int:
    """Delivers to MLflow what is missing there of a study, or of a run made by `deit_ray.train`.

    Args:
        name: name of the study or run, such as digits_search-1, or digits_search for the newest.
        results: folder of the results.
        console: where messages go; by default only warnings are shown.

    Returns:
        The number of runs that MLflow now has: the study's own and its trials'.

    Raises:
        UserError: there is no such study or run; it is running, so its driver delivers; or MLflow does not
            take everything.
    """
    console = console or Console(quiet=True)
    folder = find_run(name, results)
    name = posixpath.basename(folder)
    study = Study.open(name, results) if is_study(folder) else None
    experiment = study.experiment if study else recorded(folder)
    with study.driving() if study else driving(folder, name), Tracker.of(experiment, console) as tracker:
        with tracker.runs.collecting():
            runs = list(deliver_study(tracker, study) if study else deliver_run(tracker, experiment, folder))
        left = tracker.finish(
            PATIENCE_S,
            LIMIT_S,
            lambda done, total: console.say(f"  {done} of {counted(total, 'run')} checked"),
        )
    if left:
        missing, error = tracker.describe_left(left), tracker.last_error or "it does not answer"
        raise UserError(f"{name}: MLflow at {tracker.uri} does not take deliveries: {missing}; {error}")
    refused = [run.name for run in runs if run.refused]
    if refused:
        raise UserError(f"{name}: MLflow does not take all of {', '.join(refused)}; see the warnings above")
    had = "MLflow has" if tracker.has_changed else "nothing to deliver: MLflow had"
    console.say(f"{name}: {had} everything of {counted(len(runs), 'run')}")
    return len(runs)


def deliver_study(tracker: Tracker, study: Study) -> Iterator[Run]:
    """Gives a tracker everything about a study: its own run, and the run of each trial."""
    parent = start_study(tracker, study)
    yield parent
    for trial in study.trials():
        if trial.state != TrialState.WAITING:
            run = start_trial(tracker, study, trial, parent)
            if trial.state.is_finished():
                end_trial(tracker, study, trial, run)
            yield run
    if study.outcome:
        end_study(tracker, study, parent, study.outcome)


def start_study(tracker: Tracker, study: Study) -> Run:
    """The study's own run, the parent of its trials' runs."""
    fixed = {
        key: str(study.experiment.get(key))
        for key in ("seed", "train.epochs", "student.model", "search.trials")
    }
    started = [trial.started for trial in study.trials() if trial.started]
    tags = {"study": study.name, "kind": "study"}
    return tracker.start_run(
        study.name, tags, fixed, study.folder, journal=False, started_ms=to_ms(min(started, default=None))
    )


def start_trial(tracker: Tracker, study: Study, trial: TrialRecord, parent: Run) -> Run:
    """A trial's run. Writes the trial's experiment into the trial's folder, unless it is there already.

    A trial that was not started, since it cannot run, may have no valid experiment.
    """
    folder, number, params = study.trial_folder(trial.number), trial.number, trial.params
    refused = trial.outcome is not None and trial.outcome.is_refused
    if not refused:
        content = dump_experiment(study.trial_experiment(params)).encode()
        with contextlib.suppress(FileExistsError):
            storage.create_bytes(storage.join(folder, EXPERIMENT), content)
    name = f"trial {number:03d} " + " ".join(
        f"{key.rpartition('.')[2]}={short(value)}" for key, value in params.items()
    )
    tags = {"study": study.name, "kind": "trial", "trial": str(number)}
    return tracker.start_run(name, tags, params, folder, parent, started_ms=to_ms(trial.started))


def end_trial(tracker: Tracker, study: Study, trial: TrialRecord, run: Run) -> None:
    """Ends a trial's run with the trial's outcome; see the table in docs/architecture.md.

    A finished trial gets the value by which the leaderboard ranks it, under a name that no other trial has.
    """
    is_finished = trial.ending.kind == Kind.FINISHED and trial.value is not None
    metrics = {best_name(study.experiment): trial.value} if is_finished else {}
    folder = study.trial_folder(trial.number)
    tracker.end_run(run, trial.ending, folder, metrics=metrics, ended_ms=to_ms(trial.ended))


def is_delivered(study: Study, number: int) -> bool:
    """Whether an ended trial was delivered, with its outcome's MLflow status; the trial's folder says so."""
    record = Record.read(study.trial_folder(number))
    return record is not None and record.is_delivered(study.trial(number).ending)


def end_study(tracker: Tracker, study: Study, run: Run, outcome: Outcome) -> None:
    """Ends the study's own run, with its best trial."""
    if outcome.kind != Kind.FINISHED:
        tracker.end_run(run, outcome, study.folder)
        return
    metrics = {best_name(study.experiment): study.best().value}
    if study.tested:
        metrics |= study.tested.metrics
    tracker.end_run(run, outcome, study.folder, BEST, metrics=metrics)


def deliver_run(tracker: Tracker, experiment: Experiment, folder: str) -> Iterator[Run]:
    """Gives a tracker everything about a single training run."""
    run = start_single(tracker, experiment, folder)
    yield run
    if storage.exists(storage.join(folder, RUN)):
        outcome = Outcome.parse(json.loads(storage.read_bytes(storage.join(folder, RUN)))["outcome"])
    elif (failure := read_failure(folder)) is not None and failure.kind == "failed":
        outcome = Outcome.failed(failure.reason)
    else:
        return  # it is running, or was interrupted and can be resumed
    metrics = best_of(experiment, folder) if outcome.kind == Kind.FINISHED else {}
    tracker.end_run(run, outcome, folder, metrics=metrics)


def to_ms(moment: datetime | None) -> int | None:
    """Milliseconds since 1970 of one of Optuna's datetimes, which are in local time."""
    return None if moment is None else int(moment.timestamp() * 1000)
