"""What people look at: the leaderboard of a study."""

import math
from typing import TYPE_CHECKING

from deit_ray.terminal.format import standard_error

if TYPE_CHECKING:
    import optuna
    import pandas as pd

STATES = {
    "COMPLETE": "finished",
    "PRUNED": "stopped early",
    "FAIL": "failed",
    "RUNNING": "running",
    "WAITING": "waiting",
}


def leaderboard(study: "optuna.Study", keys: list[str]) -> "pd.DataFrame":
    """All trials of a study, best first, those of full length before the others.

    Returns:
        One row a trial: trial, state, epochs, best and last value of the metric, its standard error, whether it is `close` to the
        best one (within their standard errors), and the searched values by dotted key.
    """
    import pandas as pd

    rows = []
    for trial in study.get_trials(deepcopy=False):
        values = [trial.intermediate_values[e] for e in sorted(trial.intermediate_values)]
        finite = [value for value in values if math.isfinite(value)]
        best = max(finite, default=math.nan)
        images, outcome = (
            trial.user_attrs.get("images"),
            trial.user_attrs.get("outcome", "") if trial.state.is_finished() else "",
        )
        rows.append(
            {
                "trial": trial.number,
                "state": "cancelled" if outcome == "cancelled" else STATES[trial.state.name],
                "outcome": outcome,
                "epochs": max(trial.intermediate_values, default=0),
                "best": best,
                "last": values[-1] if values else math.nan,
                "error": standard_error(best, images) if images else math.nan,
                **{key: trial.params.get(key) for key in keys},
            }
        )
    table = pd.DataFrame(
        rows, columns=["trial", "state", "outcome", "epochs", "best", "last", "error", *keys]
    )
    table["full"] = table["state"] == "finished"
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
