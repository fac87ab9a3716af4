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
from deit_ray.results.folders import BEST, EXPERIMENT, REPORT, RUN, find_run, recorded
from deit_ray.results.lock import driving
from deit_ray.study.database import is_study
from deit_ray.study.description import describe, plain
from deit_ray.study.page import make_page
from deit_ray.study.records import Evaluated, TrialRecord
from deit_ray.study.story import tell, tell_trial
from deit_ray.study.study import AMENDABLE, Study
from deit_ray.terminal.console import Console
from deit_ray.terminal.format import counted, short
from deit_ray.tracking.tracked import Record, Run
from deit_ray.tracking.tracker import Tracker, describe_left
from deit_ray.tracking.view import View, study_view
from deit_ray.trial.described import (
    Made,
    as_param,
    best_name,
    error_name,
    final_metrics,
    final_metrics_of_run,
    params_of,
    params_of_study,
    weights_of,
    worker_tags,
)
from deit_ray.trial.failure import read_failure
from deit_ray.trial.run import start_single

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
    lock = study.driving() if study else driving(folder, name)
    with lock, Tracker.of(experiment, console, folder) as tracker:
        with tracker.runs.collecting():
            runs = list(deliver_study(tracker, study) if study else deliver_run(tracker, experiment, folder))
        left = tracker.finish(
            PATIENCE_S,
            LIMIT_S,
            lambda done, total: console.say(f"  {done} of {counted(total, 'run')} checked"),
        )
    if left:
        missing, error = describe_left(left), tracker.last_error or "it does not answer"
        raise UserError(f"{name}: MLflow at {tracker.uri} does not take deliveries: {missing}; {error}")
    refused = [run.name for run in runs if run.refused]
    if refused:
        raise UserError(f"{name}: MLflow does not take all of {', '.join(refused)}; see the warnings above")
    had = "MLflow has" if tracker.has_changed else "nothing to deliver: MLflow had"
    console.say(f"{name}: {had} everything of {counted(len(runs), 'run')}")
    return len(runs)


def deliver_study(tracker: Tracker, study: Study) -> Iterator[Run]:
    """Gives a tracker everything about a study: its own run, and the run of each trial."""
    made = Made.read(study.folder, study.experiment)
    parent, runs = start_study(tracker, study, made), {}
    yield parent
    tested = study.tested
    for trial in study.records():
        if trial.state != TrialState.WAITING:
            run = runs[trial.number] = start_trial(tracker, study, trial, parent, made)
            if trial.state.is_finished():
                end_trial(tracker, study, trial, run, tested)
            yield run
    describe_study(tracker, study, parent, is_running=False)
    if study.outcome:
        if not storage.exists(storage.join(study.folder, REPORT)):  # an earlier version ended the study
            save_report(study)
        best = study.find_best()
        end_study(tracker, study, parent, study.outcome, best and runs[best.number])


def start_study(tracker: Tracker, study: Study, made: Made) -> Run:
    """The study's own run, the parent of its trials' runs."""
    started = [trial.started for trial in study.records() if trial.started]
    return tracker.start_run(
        study.name,
        {"study": study.name, "kind": "study"} | made.tags(),
        params_of_study(study.experiment, AMENDABLE),
        study.folder,
        journal=False,
        started_ms=to_ms(min(started, default=None)),
        datasets=made.datasets(("train", "val", "test")),
        view=view_of(study.name, study.experiment),
    )


def view_of(name: str, experiment: Experiment) -> View:
    """How MLflow shows a study."""
    search = experiment.search
    names = (best_name(experiment), error_name(experiment))
    return study_view(name, search.metric, *names, list(search.space))


def describe_study(tracker: Tracker, study: Study, run: Run, is_running: bool) -> None:
    """Gives the study's own run its description, as the study is now."""
    tracker.describe_run(run, describe(tell(study, is_running)))


def save_report(study: Study) -> None:
    """Writes the page about a study that has ended into its folder, from where MLflow gets it."""
    storage.write_bytes(storage.join(study.folder, REPORT), make_page(tell(study, is_running=False)))


def start_trial(tracker: Tracker, study: Study, trial: TrialRecord, parent: Run, made: Made) -> Run:
    """A trial's run. Writes the trial's experiment into the trial's folder, unless it is there already.

    A trial that was not started, since it cannot run, may have no valid experiment.
    """
    folder, number, params = study.trial_folder(trial.number), trial.number, trial.params
    shown = {key: as_param(value) for key, value in ({"seed": study.experiment.seed} | params).items()}
    if not (trial.outcome is not None and trial.outcome.is_refused):
        experiment = study.trial_experiment(params)
        shown = params_of(experiment, params)
        with contextlib.suppress(FileExistsError):
            storage.create_bytes(storage.join(folder, EXPERIMENT), dump_experiment(experiment).encode())
    name = f"trial {number:03d} " + " ".join(
        f"{key.rpartition('.')[2]}={short(value)}" for key, value in params.items()
    )
    tags = {"study": study.name, "kind": "trial", "trial": str(number)} | made.tags(trial.ended)
    splits = ("train", "test" if study.experiment.search.metric.startswith("test/") else "val")
    started_ms, datasets = to_ms(trial.started), made.datasets(splits)
    return tracker.start_run(name, tags, shown, folder, parent, started_ms=started_ms, datasets=datasets)


def end_trial(
    tracker: Tracker, study: Study, trial: TrialRecord, run: Run, tested: Evaluated | None = None
) -> None:
    """Ends a trial's run with the trial's outcome; see the table in docs/architecture.md.

    A trial that finished or was stopped early gets the value by which the leaderboard ranks it.

    Args:
        tested: the study's evaluation on the test images.
    """
    ranked = trial.ending.kind in (Kind.FINISHED, Kind.STOPPED_EARLY)
    own = tested.metrics if tested and tested.trial == trial.number else {}
    metrics = final_metrics_of(study, trial, own) if ranked else {}
    folder, search = study.trial_folder(trial.number), study.experiment.search
    tags = worker_tags(folder, study.experiment.train.workers)
    told = tell_trial(trial, search.metric, study.experiment.train.epochs, search.scheduler)
    tracker.describe_run(run, plain(told))
    model = weights_of(folder, metrics) if trial.ending.kind == Kind.FINISHED else None
    ended_ms = to_ms(trial.ended)
    tracker.end_run(run, trial.ending, folder, metrics=metrics, ended_ms=ended_ms, tags=tags, model=model)


def final_metrics_of(study: Study, trial: TrialRecord, tested: dict[str, float]) -> dict[str, float]:
    """`final_metrics` of a trial."""
    value, epoch = trial.best, trial.best_epoch
    return final_metrics(study.experiment, value, epoch, tested, trial.images, trial.choices)


def delivered(study: Study, trial: TrialRecord) -> Record | None:
    """The record of a trial's run that was delivered in full with the trial's outcome; else None."""
    record = Record.read(study.trial_folder(trial.number))
    return record if record and record.is_delivered(trial.ending) else None


def end_study(
    tracker: Tracker, study: Study, run: Run, outcome: Outcome, best_run: Run | None = None
) -> None:
    """Ends the study's own run, with the values of its best trial.

    Args:
        best_run: the run of that trial, which has ended; None if no trial has finished.
    """
    best, metrics, tested = study.find_best(), {}, study.tested_best()
    if best is not None:
        metrics = final_metrics_of(study, best, tested) | tested
    tracker.end_run(run, outcome, study.folder, EXPERIMENT, BEST, REPORT, metrics=metrics, best=best_run)


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
    is_finished = outcome.kind == Kind.FINISHED
    metrics = final_metrics_of_run(experiment, folder) if is_finished else {}
    tags = worker_tags(folder, experiment.train.workers)
    model = weights_of(folder, metrics) if is_finished else None
    tracker.end_run(run, outcome, folder, metrics=metrics, tags=tags, model=model)


def to_ms(moment: datetime | None) -> int | None:
    """Milliseconds since 1970 of one of Optuna's datetimes, which are in local time."""
    return None if moment is None else int(moment.timestamp() * 1000)
