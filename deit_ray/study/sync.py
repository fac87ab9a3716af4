"""What MLflow shall know of a study or a run, from what its folder says: a driver tells it as it goes, `sync` afterwards."""

import json
import posixpath
from collections.abc import Iterator

import optuna
from optuna.trial import TrialState

from deit_ray import storage
from deit_ray.data.damage import BAD_IMAGES
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment
from deit_ray.experiment.load import dump_experiment, load_experiment
from deit_ray.results.folders import BEST, EXPERIMENT, MODEL, RUN, find_run
from deit_ray.results.lock import driving
from deit_ray.study.study import DATABASE, Study
from deit_ray.terminal.console import Console
from deit_ray.terminal.format import short
from deit_ray.tracking.tracked import RECORD, Run
from deit_ray.tracking.tracker import Tracker
from deit_ray.trial.failure import read_failure
from deit_ray.trial.run import start_single

PATIENCE_S = 30.0  # how long to try while MLflow takes nothing
LIMIT_S = 24 * 3600.0


def sync(name: str, results: str = "results", console: Console | None = None) -> int:
    """Delivers to MLflow what it does not have of a study, or of a run made by `deit_ray.train`.

    Args:
        name: such as digits_search-1, or digits_search for the newest.
        results: the folder of the results.
        console: what a person sees; by default nothing.

    Returns:
        The number of runs that MLflow now has: the study's own and its trials'.

    Raises:
        UserError: there is no such study or run, it is running and delivers by itself, or MLflow does not answer.
    """
    console = console or Console(quiet=True)
    folder = find_run(name, results)
    study = (
        Study.open(posixpath.basename(folder), results)
        if storage.exists(storage.join(folder, DATABASE))
        else None
    )
    experiment = study.experiment if study else load_experiment(storage.join(folder, EXPERIMENT))
    with driving(folder, posixpath.basename(folder)), Tracker.of(experiment, console) as tracker:
        runs = list(tell_study(tracker, study) if study else tell_run(tracker, experiment, folder))
        left = tracker.finish(
            PATIENCE_S, LIMIT_S, lambda done, total: console.say(f"  {done} of {total} runs delivered")
        )
    if left:
        raise UserError(f"{posixpath.basename(folder)}: MLflow at {tracker.uri} does not take deliveries: "
                        f"{tracker.describe_left(left)}; {tracker.last_error or 'it does not answer'}")  # fmt: skip
    refused = [run.name for run in runs if run.refused]
    if refused:
        raise UserError(
            f"{posixpath.basename(folder)}: MLflow does not take all of {', '.join(refused)}; see the warnings above"
        )
    return len(runs)


def tell_study(tracker: Tracker, study: Study) -> Iterator[Run]:
    """Tells a tracker all of a study: its own run, and each trial's."""
    parent = start_study(tracker, study)
    yield parent
    for trial in study.optuna.get_trials(deepcopy=False):
        if trial.state != TrialState.WAITING:
            run = start_trial(tracker, study, trial, parent)
            if trial.state.is_finished():
                end_trial(tracker, study, trial, run)
            yield run
    outcome = study.optuna.user_attrs.get("outcome")  # None while it can go on
    if outcome:
        end_study(tracker, study, parent, outcome)


def start_study(tracker: Tracker, study: Study) -> Run:
    """The study's own run, under which its trials' are."""
    fixed = {
        key: str(study.experiment.get(key))
        for key in ("seed", "train.epochs", "student.model", "search.trials")
    }
    started = [
        trial.datetime_start for trial in study.optuna.get_trials(deepcopy=False) if trial.datetime_start
    ]
    tags = {"study": study.name, "kind": "study"}
    return tracker.start_run(
        study.name, tags, fixed, study.folder, journal=False, started_ms=to_ms(min(started, default=None))
    )


def start_trial(tracker: Tracker, study: Study, trial: optuna.trial.FrozenTrial, parent: Run) -> Run:
    """A trial's run; its folder gets the experiment it stands for, if it has not got it yet."""
    folder, number, params = study.trial_folder(trial.number), trial.number, trial.params
    if not storage.exists(storage.join(folder, EXPERIMENT)):
        storage.write_bytes(
            storage.join(folder, EXPERIMENT), dump_experiment(study.trial_experiment(params)).encode()
        )
    name = f"trial {number:03d} " + " ".join(
        f"{key.rpartition('.')[2]}={short(value)}" for key, value in params.items()
    )
    tags = {"study": study.name, "kind": "trial", "trial": str(number)}
    return tracker.start_run(name, tags, params, folder, parent, started_ms=to_ms(trial.datetime_start))


def end_trial(tracker: Tracker, study: Study, trial: optuna.trial.FrozenTrial, run: Run) -> None:
    """Ends a trial's run as Optuna says that the trial ended; the table in docs/architecture.md."""
    outcome = trial_outcome(trial)
    files = (MODEL, BAD_IMAGES) if outcome == "finished" else (BAD_IMAGES,)
    tracker.end_run(
        run, outcome, study.trial_folder(trial.number), *files, ended_ms=to_ms(trial.datetime_complete)
    )


def is_told(study: Study, number: int) -> bool:
    """Whether MLflow has all of an ended trial, as far as the record in its folder says."""
    try:
        record = json.loads(storage.read_bytes(storage.join(study.trial_folder(number), RECORD)))
    except FileNotFoundError:
        return False
    return record["outcome"] is not None


def end_study(tracker: Tracker, study: Study, run: Run, outcome: str) -> None:
    """Ends the study's own run, with its best trial."""
    if outcome != "finished":
        tracker.end_run(run, outcome, study.folder)
        return
    tested = {
        name: value for name, value in study.optuna.user_attrs.get("test", {}).items() if name != "trial"
    }
    metrics = {f"best/{study.experiment.search.metric}": study.best().value, **tested}
    tracker.end_run(run, outcome, study.folder, BEST, MODEL, metrics=metrics)


def trial_outcome(trial: optuna.trial.FrozenTrial) -> str:
    """How an ended trial ended: what the driver noted, or what its state says where the driver came to note nothing."""
    known = {
        TrialState.COMPLETE: "finished",
        TrialState.PRUNED: f"stopped early at epoch {max(trial.intermediate_values, default=0)}",
        TrialState.FAIL: "failed: it never began",
    }
    return trial.user_attrs.get("outcome") or known[trial.state]


def tell_run(tracker: Tracker, experiment: Experiment, folder: str) -> Iterator[Run]:
    """Tells a tracker all of a training run on its own."""
    run = start_single(tracker, experiment, folder)
    yield run
    if storage.exists(storage.join(folder, RUN)):
        outcome = json.loads(storage.read_bytes(storage.join(folder, RUN)))["outcome"]
    elif (failure := read_failure(folder)) is not None and failure.kind == "failed":
        outcome = f"failed: {failure.reason}"
    else:
        return  # it runs, or was interrupted and can go on
    tracker.end_run(run, outcome, folder, BAD_IMAGES, *([MODEL] if outcome == "finished" else []))


def to_ms(moment) -> int | None:
    """Of one of Optuna's datetimes, which are local."""
    return None if moment is None else int(moment.timestamp() * 1000)
