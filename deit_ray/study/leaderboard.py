"""The leaderboard of a study: its trials as one table, best first."""

import math
from typing import TYPE_CHECKING

from deit_ray.accuracy import interval, is_clearly_better
from deit_ray.outcome import Kind

if TYPE_CHECKING:
    import pandas as pd

    from deit_ray.study.records import TrialRecord

STATES = {"RUNNING": "running", "WAITING": "waiting"}  # by Optuna's state, for trials that have not ended


def leaderboard(trials: "list[TrialRecord]", keys: list[str]) -> "pd.DataFrame":
    """All trials of a study, best first; finished trials come before the others.

    Returns:
        One row per trial: trial (its number), state, outcome, epochs, best and last value of the metric, the
        ends `low` and `high` of the best value's interval (see `accuracy.interval`; it covers the choice
        among the trial's evaluations) and half its width, `error`, whether it is `close` to the best trial
        (their values cannot be told apart), and the searched values by dotted key. A trial is ranked by its
        best value.
    """
    import pandas as pd

    rows = [_row(trial, keys) for trial in trials]
    table = pd.DataFrame(
        rows,
        columns=["trial", "state", "outcome", "epochs", "best", "last", "low", "high", "error", *keys],
    )
    table["full"] = table["state"] == str(Kind.FINISHED)
    table = table.sort_values(
        ["full", "best", "trial"], ascending=[False, False, True], kind="stable", ignore_index=True
    )
    full = table[table["full"]]
    if len(full):
        first, *others = zip(full["best"], full["low"], full["high"], strict=True)
        close = [_is_close(other, first) for other in others]
        table["close"] = [False, *close, *[False] * (len(table) - len(full))]
    else:
        table["close"] = False
    return table.drop(columns="full")


def _is_close(other: tuple[float, float, float], first: tuple[float, float, float]) -> bool:
    """Whether a trial cannot be told apart from the best one; without intervals, whether they are equal.

    Args:
        other, first: (value, lowest, highest) of a trial and of the best one.
    """
    if math.isnan(other[1]) or math.isnan(first[1]):
        return bool(other[0] == first[0])
    return not is_clearly_better(first[0], first[1:], other[0], other[1:])


def _row(trial: "TrialRecord", keys: list[str]) -> dict:
    ended = trial.state.is_finished()
    best = math.nan if trial.best is None else trial.best
    low = high = math.nan
    if trial.images and math.isfinite(best):
        low, high = interval(best, trial.images, trial.choices)
    return {
        "trial": trial.number,
        "state": str(trial.ending.kind) if ended else STATES[trial.state.name],
        "outcome": trial.outcome.text if ended and trial.outcome else "",
        "epochs": trial.epoch,
        "best": best,
        "last": math.nan if trial.last is None else trial.last,
        "low": low,
        "high": high,
        "error": (high - low) / 2,
        **{key: trial.params.get(key) for key in keys},
    }
