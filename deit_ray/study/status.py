"""Answers people in another terminal: shows the state of studies and trials, and stops them.

Every function returns plain values without a database, so that it can also run on the head of a cluster.
"""

import json
import posixpath
import time
from dataclasses import dataclass, replace

from deit_ray import hints, storage
from deit_ray.errors import UserError, explain_os_error
from deit_ray.outcome import Outcome
from deit_ray.results.folders import EXPERIMENT, JOURNAL, REMOVING, RUN, find_run, saved_steps
from deit_ray.results.journal import checkpoint_name, iterate_points
from deit_ray.results.lock import driver_of
from deit_ray.results.removal import are_checkpoints_removed
from deit_ray.study.database import is_study
from deit_ray.study.leaderboard import STATES, leaderboard
from deit_ray.study.records import TrialRecord
from deit_ray.study.story import INTERRUPTED, RUNNING, Story, tell
from deit_ray.study.study import Study, names_of_studies
from deit_ray.trial.failure import Failure, read_failure, read_worker, tail_files

STOPPED_WITHIN_S = 60.0


@dataclass(frozen=True)
class TrialStatus:
    """The state of a trial.

    Attributes:
        state: running, interrupted, waiting, or the kind of its outcome.
        outcome: how it ended; None before its end.
        value, last: the best and the last value of the metric; None if there is none.
        images: the number of images on which the metric is measured; None if it is not known.
        choices: the number of evaluations from which the best value was chosen.
        step: the last step in its journal, and `metrics` the last value of each metric there.
        workers: rank, host, process and log files of each of its workers.
        checkpoint: URI of the last whole checkpoint.
        removed: whether its checkpoints were removed when the study ended.
        failure: why and where it failed.
        log: the last lines of rank 0's output, if this machine can read them.
    """

    study: str
    number: int
    folder: str
    params: dict
    state: str
    outcome: Outcome | None
    metric: str
    value: float | None
    images: float | None
    choices: int
    last: float | None
    epoch: int
    epochs: int
    step: int | None
    metrics: dict[str, float]
    workers: list[dict]
    checkpoint: str | None
    removed: bool
    failure: Failure | None
    log: list[str]


@dataclass(frozen=True)
class RunStatus:
    """The state of a run of `train`.

    Attributes:
        state: running, interrupted, finished, or failed with the reason; or why it cannot be read.
        metrics: of its last evaluation, by name, if it has finished.
    """

    name: str
    state: str
    metrics: dict[str, float]


def list_status(results: str) -> list[Story]:
    """The states of all studies in a results folder. A study that cannot be read says why in its state.

    Raises:
        UserError: there is no such folder on this machine, or no such bucket.
    """
    if storage.is_local(results):
        if results != hints.DEFAULT_RESULTS and not storage.exists(results):
            raise UserError(f"--results {results}: there is no such folder")
    elif not storage.exists(storage.bucket_of(results)):
        raise UserError(f"--results {results}: there is no such bucket")
    found = []
    half_deleted = [
        n for n in storage.list_names(results) if storage.exists(storage.join(results, n, REMOVING))
    ]
    for name in sorted({*names_of_studies(results), *half_deleted}):
        try:
            if name in half_deleted:
                again = hints.command("rm", name, results=results)
                raise UserError(f"its deletion was interrupted; finish it with: {again}")
            found.append(study_status(name, results))
        except Exception as error:  # whatever is wrong with one of them, the others are shown
            found.append(_unreadable(name, results, error))
    return found


def list_runs(results: str) -> list[RunStatus]:
    """The states of all runs of `train` in a results folder."""
    found = []
    for name in storage.list_names(results):
        folder = storage.join(storage.absolute(results), name)
        if storage.exists(storage.join(folder, EXPERIMENT)) and not is_study(folder):
            try:
                found.append(_run_status(name, folder))
            except Exception as error:  # as in `list_status`
                found.append(RunStatus(name, f"cannot be read: {_reason(error)}", {}))
    return found


def run_status(name: str, results: str) -> RunStatus | None:
    """The state of a run of `train`; None where the name is a study's.

    Args:
        name: with or without its number.

    Raises:
        UserError: there is no such run or study.
    """
    folder = find_run(name, results)
    return None if is_study(folder) else _run_status(posixpath.basename(folder), folder)


def _run_status(name: str, folder: str) -> RunStatus:
    if storage.exists(storage.join(folder, RUN)):
        ended = json.loads(storage.read_bytes(storage.join(folder, RUN)))
        return RunStatus(name, ended["outcome"], ended["metrics"])
    if driver_of(folder) is not None:
        return RunStatus(name, "running", {})
    failure = read_failure(folder)
    failed = failure is not None and failure.kind == "failed"
    return RunStatus(name, f"failed: {failure.reason}" if failed else "interrupted", {})


def _unreadable(name: str, results: str, error: Exception) -> Story:
    return Story(
        name=name,
        folder=storage.join(storage.absolute(results), name),
        metric="",
        keys=[],
        epochs=0,
        state=f"cannot be read: {_reason(error)}",
        driver=None,
        counts={},
        missing=0,
        spent_s=0.0,
        gpu_s=0.0,
        board=leaderboard([], []),
        images=None,
        tested={},
        largest={},
    )


def _reason(error: Exception) -> str:
    """Why a study or run cannot be read, in one line."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        return explain_os_error(error)
    return "a file in it is damaged; put back a copy of it, or move the folder away"


def study_status(name: str, results: str) -> Story:
    """The story of a study, without the curves of its trials. Raises UserError if there is no such study."""
    return replace(tell(Study.open(name, results)), records=[])


def trial_status(name: str, number: int, results: str) -> TrialStatus:
    """The state of a trial. Raises UserError if there is no such study or trial."""
    study = Study.open(name, results)
    trial = _find_trial(study, number)
    folder, metric = study.trial_folder(number), study.experiment.search.metric
    points = list(iterate_points(storage.join(folder, JOURNAL)))
    steps, workers = saved_steps(folder), []
    while (worker := read_worker(folder, len(workers))) is not None:
        workers.append(worker)
    ended = trial.state.is_finished()
    state = str(trial.ending.kind) if ended else STATES[trial.state.name]
    if state == RUNNING and study.driver() is None:
        state = INTERRUPTED
    return TrialStatus(
        study=study.name,
        number=number,
        folder=folder,
        params=trial.params,
        state=state,
        outcome=trial.ending if ended else None,
        metric=metric,
        value=trial.best,
        images=trial.images,
        choices=trial.choices,
        last=trial.last,
        epoch=trial.epoch,
        epochs=study.experiment.train.epochs,
        step=max((point.step for point in points), default=None),
        metrics={point.name: point.value for point in sorted(points, key=lambda point: point.step)},
        workers=workers,
        checkpoint=storage.join(folder, checkpoint_name(steps[-1])) if steps else None,
        removed=are_checkpoints_removed(folder),
        failure=read_failure(folder),
        log=tail_files(workers[0]["logs"]) if workers else [],
    )


def _find_trial(study: Study, number: int) -> TrialRecord:
    trials = study.records()
    if not 0 <= number < len(trials):
        known = f"0 to {len(trials) - 1}" if trials else "none yet"
        raise UserError(f"{study.name}: no trial {number}; the study has {known}")
    return trials[number]


def stop(name: str, number: int | None, results: str) -> str:
    """Asks the driver of a study to cancel a trial, or to end the study, and waits until that is done.

    Returns:
        The result in words.

    Raises:
        UserError: there is no such study or trial, the study is not running, or the trial has ended.
    """
    study = Study.open(name, results)
    driver = study.driver()
    if driver is None:
        raise UserError(
            f"{study.name}: is not running ({study.ended or 'interrupted'}), so there is nothing to stop"
        )
    if number is not None:
        trial = _find_trial(study, number)
        if trial.state.is_finished():
            raise UserError(f"{study.name}: trial {number} has ended already: {trial.ending.text}")
    study.request_stop(number)
    deadline = time.monotonic() + STOPPED_WITHIN_S
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if number is None:
            if study.driver() is None:
                return f"{study.name}: {study.ended}"
        elif study.trial(number).state.is_finished():
            return f"{study.name}: trial {number}: {study.trial(number).ending.text}"
    return (
        f"{study.name}: asked process {driver.get('pid')} on {driver.get('host')}, "
        f"which has not stopped it within {STOPPED_WITHIN_S:.0f} s"
    )
