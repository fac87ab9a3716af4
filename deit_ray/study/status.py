"""What people ask from another terminal: how studies and trials stand, and to stop them.

Every function gives plain values, so that it can be called on the head of a cluster too.
"""

import time
from dataclasses import dataclass

import pandas as pd
from optuna.trial import TrialState

from deit_ray import storage
from deit_ray.errors import UserError
from deit_ray.results.folders import JOURNAL, saved_steps
from deit_ray.results.journal import checkpoint_name, iterate_points
from deit_ray.study.study import Study, list_studies
from deit_ray.trial.failure import Failure, read_failure, read_worker, tail_files

STOPPED_WITHIN_S = 60.0


@dataclass(frozen=True)
class StudyStatus:
    """A study as it stands.

    Attributes:
        state: running, interrupted, or why it has ended.
        driver: host, pid and start of the process that runs it.
        counts: trials by state.
        missing: trials not drawn yet.
        spent_s, gpu_s: wall time and GPU time so far.
        board: see `Study.leaderboard`.
    """

    name: str
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


@dataclass(frozen=True)
class TrialStatus:
    """A trial as it stands.

    Attributes:
        outcome: how it ended; running or interrupted before.
        value, last: the best and the last value of the metric.
        step: the last one in its journal, with the metrics there; `total` is the last of the whole trial.
        workers: rank, host, process and log files of each of its workers.
        checkpoint: URI of the last whole one.
        failure: where it failed.
        log: the last lines of rank 0's output, where they can be read here.
    """

    study: str
    number: int
    folder: str
    params: dict
    outcome: str
    metric: str
    value: float | None
    last: float | None
    epoch: int
    epochs: int
    step: int | None
    metrics: dict[str, float]
    workers: list[dict]
    checkpoint: str | None
    failure: Failure | None
    log: list[str]


def list_status(results: str) -> list[StudyStatus]:
    return [_status(study) for study in list_studies(results)]


def study_status(name: str, results: str) -> StudyStatus:
    """How a study stands. Raises UserError where there is none."""
    return _status(Study.open(name, results))


def _status(study: Study) -> StudyStatus:
    driver, board, spent = study.driver(), study.leaderboard(), study.spent
    if driver is None:
        board["state"] = board["state"].replace("running", "interrupted")
    return StudyStatus(
        name=study.name,
        metric=study.experiment.search.metric,
        keys=list(study.experiment.search.space),
        epochs=study.experiment.train.epochs,
        state=study.ended or "interrupted" if driver is None else "running",
        driver=driver,
        counts=dict(board["state"].value_counts()),
        missing=max(0, study.experiment.search.trials - len(board)),
        spent_s=spent.wall_s,
        gpu_s=spent.gpu_s,
        board=board,
    )


def trial_status(name: str, number: int, results: str) -> TrialStatus:
    """How a trial stands. Raises UserError where there is none."""
    study = Study.open(name, results)
    trials = study.optuna.get_trials(deepcopy=False)
    if not 0 <= number < len(trials):
        raise UserError(
            f"{study.name}: no trial {number}; it has {f'0 to {len(trials) - 1}' if trials else 'none yet'}"
        )
    trial, folder, metric = trials[number], study.trial_folder(number), study.experiment.search.metric
    points = list(iterate_points(storage.join(folder, JOURNAL)))
    values = [trial.intermediate_values[epoch] for epoch in sorted(trial.intermediate_values)]
    steps, workers = saved_steps(folder), []
    while (worker := read_worker(folder, len(workers))) is not None:
        workers.append(worker)
    running = "interrupted" if study.driver() is None else "running"
    return TrialStatus(
        study=study.name,
        number=number,
        folder=folder,
        params=trial.params,
        outcome=trial.user_attrs["outcome"]
        if trial.state.is_finished()
        else running
        if trial.state == TrialState.RUNNING
        else "waiting",
        metric=metric,
        value=max((value for value in values if value == value), default=None),
        last=values[-1] if values else None,
        epoch=max(trial.intermediate_values, default=0),
        epochs=study.experiment.train.epochs,
        step=max((point.step for point in points), default=None),
        metrics={point.name: point.value for point in sorted(points, key=lambda point: point.step)},
        workers=workers,
        checkpoint=storage.join(folder, checkpoint_name(steps[-1])) if steps else None,
        failure=read_failure(folder),
        log=tail_files(workers[0]["logs"]) if workers else [],
    )


def stop(name: str, number: int | None, results: str) -> str:
    """Asks the driver of a study to cancel a trial, or to end the study, and waits until it has; returns what came of it.

    Raises:
        UserError: there is no such study or trial, or it does not run.
    """
    study = Study.open(name, results)
    driver = study.driver()
    if driver is None:
        raise UserError(
            f"{study.name}: is not running ({study.ended or 'interrupted'}), so there is nothing to stop"
        )
    if number is not None:
        states = [trial.state for trial in study.optuna.get_trials(deepcopy=False)]
        if not 0 <= number < len(states):
            raise UserError(f"{study.name}: no trial {number}; it has 0 to {len(states) - 1}")
        if states[number].is_finished():
            raise UserError(
                f"{study.name}: trial {number} has ended already: {study.trial(number).user_attrs['outcome']}"
            )
    study.request_stop(number)
    deadline = time.monotonic() + STOPPED_WITHIN_S
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if number is not None and study.trial(number).state.is_finished():
            return f"{study.name}: trial {number}: {study.trial(number).user_attrs['outcome']}"
        if number is None and study.driver() is None:
            return f"{study.name}: {study.ended}"
    return f"{study.name}: asked process {driver.get('pid')} on {driver.get('host')}, which has not done it within {STOPPED_WITHIN_S:.0f} s"
