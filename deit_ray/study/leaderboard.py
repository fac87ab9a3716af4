"""The leaderboard of a study: its trials as one table, best first."""

import math
from typing import TYPE_CHECKING

from deit_ray.outcome import Kind
from deit_ray.terminal.format import standard_error

if TYPE_CHECKING:
    import pandas as pd

    from deit_ray.study.records import TrialRecord

STATES = {"RUNNING": "running", "WAITING": "waiting"}  # by Optuna's state, for trials that have not ended


def leaderboard(trials: "list[TrialRecord]", keys: list[str]) -> "pd.DataFrame":
    """All trials of a study, best first; finished trials come before the others.

    Returns:
        One row per trial: trial (its number), state, outcome, epochs, best and last value of the metric, the
        standard error of the best value, whether it is `close` to the best trial (within their standard
        errors), and the searched values by dotted key.
    """
    import pandas as pd

    rows = [_row(trial, keys) for trial in trials]
    table = pd.DataFrame(
        rows, columns=["trial", "state", "outcome", "epochs", "best", "last", "error", *keys]
    )
    table["full"] = table["state"] == str(Kind.FINISHED)
    table = table.sort_values(
        ["full", "best", "trial"], ascending=[False, False, True], kind="stable", ignore_index=True
    )
    full = table[table["full"]]
    if len(full):
        first = full.iloc[0]
        both = (table["error"] ** 2 + first["error"] ** 2) ** 0.5
        table["close"] = table["full"] & (table.index > 0) & (first["best"] - table["best"] <= both)
    else:
        table["close"] = False
    return table.drop(columns="full")


def _row(trial: "TrialRecord", keys: list[str]) -> dict:
    ended = trial.state.is_finished()
    best = math.nan if trial.best is None else trial.best
    return {
        "trial": trial.number,
        "state": str(trial.ending.kind) if ended else STATES[trial.state.name],
        "outcome": trial.outcome.text if ended and trial.outcome else "",
        "epochs": trial.epoch,
        "best": best,
        "last": math.nan if trial.last is None else trial.last,
        "error": standard_error(best, trial.images) if trial.images else math.nan,
        **{key: trial.params.get(key) for key in keys},
    }
