"""Studies whose trials have ended, made without training."""

import json
from datetime import datetime, timedelta

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from deit_ray import storage
from deit_ray.outcome import Outcome
from deit_ray.results.folders import EMA, MODEL, SNAPSHOT, STATE
from deit_ray.results.journal import JournalWriter, checkpoint_name
from deit_ray.study.searcher import StudySearcher
from deit_ray.study.stop_policy import ALL_ENDED
from deit_ray.study.study import Study

STEPS = 20  # of an epoch
FINISHED = Outcome.finished()


def end_trial(study: Study, outcome: Outcome, value: float) -> None:
    """Ends a new trial, whose second epoch was its best, and which has the checkpoints of two epochs."""
    trial = StudySearcher(study.optuna, study.experiment, study.trial_folder).ask()
    folder = study.trial_folder(trial.number)
    journal = JournalWriter(f"{folder}/journal")
    for epoch, measured in enumerate((value, value - 0.1), 2):
        journal.add({"val/top1_ema": measured}, epoch * STEPS)
        for file in (MODEL, EMA, STATE):
            saved = f"{file} of {trial.number}, epoch {epoch}".encode()
            storage.write_bytes(storage.join(folder, checkpoint_name(epoch * STEPS), file), saved)
        study.report(trial.number, epoch, measured)
    journal.flush()
    best, latest = ({"checkpoint_dir_name": checkpoint_name(epoch * STEPS)} for epoch in (2, 3))
    snapshot = {"checkpoint_results": [best, latest], "latest_checkpoint_result": latest}
    storage.write_bytes(storage.join(folder, SNAPSHOT), json.dumps(snapshot).encode())
    if outcome == Outcome.finished():
        storage.write_bytes(storage.join(folder, MODEL), f"{EMA} of {trial.number}, epoch 2".encode())
    study.end_trial(trial.number, outcome, value if outcome == Outcome.finished() else None)


def told_trial(
    number: int,
    values: list[float],
    outcome: Outcome | None = FINISHED,
    distributions: dict[str, BaseDistribution] | None = None,
    params: dict | None = None,
    images: int | None = 144,
) -> FrozenTrial:
    """A trial as a study's database has it, for `Study.optuna.add_trial`.

    Args:
        values: of the metric, from epoch 1 on.
        outcome: None for a trial that runs.
    """
    state = TrialState.RUNNING if outcome is None else TrialState[outcome.optuna_state]
    begin = datetime(2026, 1, 1) + timedelta(minutes=10 * number)
    attributes = {} if outcome is None else {"outcome": outcome.text}
    trial = optuna.trial.create_trial(
        state=state,
        value=max(values) if state == TrialState.COMPLETE else None,
        params=params or {"optim.lr": 10 ** -(2 + number % 7 / 3)},
        distributions=distributions or {"optim.lr": FloatDistribution(1e-5, 1e-1, log=True)},
        intermediate_values=dict(enumerate(values, 1)),
        user_attrs=attributes | ({"images": images} if images else {}),
    )
    trial.datetime_start = begin
    trial.datetime_complete = None if outcome is None else begin + timedelta(minutes=5 + len(values))
    return trial


def told_study(study: Study, trials: list[FrozenTrial], ended: str | None = ALL_ENDED) -> Study:
    """The study with these trials, in a database in memory. It has ended, unless `ended` is None."""
    study.optuna = optuna.create_study(study_name=study.name, direction="maximize")
    study.optuna.add_trials(trials)
    study.ended = ended
    return study
