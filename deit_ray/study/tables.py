"""A study's trials and curves as tables for pandas; docs/results.md describes the columns."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pandas as pd

from deit_ray import storage
from deit_ray.results.folders import JOURNAL, trial_name
from deit_ray.results.journal import iterate_points
from deit_ray.study.records import TrialRecord
from deit_ray.study.story import Story

READERS = 8  # journals that are read at once
CURVE_COLUMNS = ["trial", "metric", "step", "epoch", "value", "time"]
TRIAL_COLUMNS = [
    "trial",
    "state",
    "outcome",
    "metric",
    "epochs",
    "best",
    "best_epoch",
    "low",
    "high",
    "close",
    "last",
    "started",
    "ended",
]
EPOCH = "epoch"  # a point of every evaluation: the epoch that it ends


def trials_frame(story: Story) -> pd.DataFrame:
    """All trials of a study, by number.

    Returns:
        One row per trial with the columns `TRIAL_COLUMNS`, then the searched keys. trial, state, outcome,
        epochs, best, low, high, close and last are the leaderboard's, see `leaderboard.leaderboard`. metric:
        what best, low, high and last are values of. best_epoch: the epoch of the best value. started, ended:
        UTC; empty for a trial that has not.
    """
    table, records = story.board.sort_values("trial", ignore_index=True), story.records
    table["metric"] = story.metric
    table["best_epoch"] = pd.array([trial.best_epoch for trial in records], "Int64")
    table["started"] = _times([trial.started for trial in records])
    table["ended"] = _times([trial.ended for trial in records])
    return table[[*TRIAL_COLUMNS, *story.keys]]


def curves_frame(folder: str, records: list[TrialRecord]) -> pd.DataFrame:
    """Everything that the trials of a study have measured, as their journals have it.

    Args:
        folder: URI of the study's folder.
        records: its trials.

    Returns:
        One row per point with the columns `CURVE_COLUMNS`. trial: its number. metric: a name such as
        val/top1. step: the optimizer step. epoch: the epoch that ended with this step, empty between two
        evaluations. value: float64. time: when it was measured, UTC.
    """
    uris = [storage.join(folder, trial_name(trial.number), JOURNAL) for trial in records]
    with ThreadPoolExecutor(READERS, thread_name_prefix="curves") as pool:
        journals = list(pool.map(lambda uri: list(iterate_points(uri)), uris))
    rows = []
    for trial, points in zip(records, journals, strict=True):
        epochs = {point.step: int(point.value) for point in points if point.name == EPOCH}
        rows += [
            (trial.number, point.name, point.step, epochs.get(point.step), point.value, point.time_ms)
            for point in points
            if point.name != EPOCH
        ]
    table = pd.DataFrame(rows, columns=CURVE_COLUMNS)
    return table.astype({"trial": "int64", "step": "int64", "epoch": "Int64", "value": "float64"}).assign(
        time=pd.to_datetime(table["time"].astype("int64"), unit="ms", utc=True)
    )


def _times(moments: list[datetime | None]) -> pd.Series:
    """Optuna's times, which are local, as UTC."""
    aware = [None if moment is None else moment.astimezone() for moment in moments]
    return pd.to_datetime(pd.Series(aware, dtype=object), utc=True)
