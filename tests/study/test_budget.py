"""The budgets that can end a study before all its trials have run."""

import datetime

import optuna
import pytest
from optuna.trial import TrialState

from deit_ray.study.budget import exceeded
from deit_ray.study.records import Spent, TrialRecord

BEGIN = datetime.datetime(2026, 1, 1)
COMPLETE, PRUNED, FAIL, RUNNING = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING


def trial(number: int, state: TrialState, value: float | None = None, **attrs):
    frozen = optuna.trial.FrozenTrial(
        number=number, trial_id=number, state=state, value=value, values=None, params={}, distributions={},
        user_attrs=attrs, system_attrs={}, intermediate_values={}, datetime_start=BEGIN,
        datetime_complete=BEGIN + datetime.timedelta(minutes=number) if state.is_finished() else None,
    )  # fmt: skip
    return TrialRecord(frozen)


def failed(number: int, signature: str):
    return trial(number, FAIL, outcome=f"failed: ValueError: {number}", signature=signature)


SOME = [
    trial(0, COMPLETE, 0.5),
    trial(1, COMPLETE, 0.8),
    trial(2, PRUNED),
    trial(3, COMPLETE, 0.8),
    trial(4, RUNNING),
]
FAILED = [
    failed(0, "a"),
    trial(1, FAIL, outcome="cancelled"),
    failed(2, "b"),
    failed(3, "a"),
    trial(4, FAIL, outcome="failed: NonFiniteLoss"),
]


@pytest.mark.parametrize(
    ("budget", "trials", "spent", "reason"),
    [
        ({"hours": 2}, [], Spent(wall_s=7199), None),
        ({"hours": 2}, [], Spent(wall_s=7200), "hours: 2 are used up"),
        ({"gpu_hours": 1.5}, [], Spent(gpu_s=5399), None),
        ({"gpu_hours": 1.5}, [], Spent(gpu_s=5400), "gpu_hours: 1.5 are used up"),
        ({"target": 0.8}, SOME, Spent(), "target: trial 1 has reached 0.8"),
        ({"target": 0.81}, SOME, Spent(), None),
        ({"patience": 2}, SOME, Spent(), "patience: 2 trials in a row were no better than trial 1"),
        ({"patience": 3}, SOME, Spent(), None),
        ({"failures": 4}, FAILED, Spent(), "failures: 4 trials failed"),  # the cancelled one is no failure
        ({"failures": 5}, FAILED, Spent(), None),
        (
            {"same_failure": 2},
            FAILED,
            Spent(),
            "same_failure: 2 trials failed in the same way, the last failed: ValueError: 3",
        ),
        ({"same_failure": 3}, FAILED, Spent(), None),
        ({}, FAILED * 10, Spent(1e9, 1e9), "same_failure"),  # five by default; nothing else ends a study
    ],
)
def test_a_study_ends_when_a_budget_is_used_up_and_not_before(experiment, budget, trials, spent, reason):
    keys = {f"search.budget.{key}": value for key, value in budget.items()}
    found = exceeded(experiment("digits_teacher", keys), trials, spent)
    assert (found is None) if reason is None else reason in found
