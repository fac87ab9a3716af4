"""The values in a study's database: names and forms are those that every version has stored."""

import math

import optuna
import pytest
from optuna.trial import TrialState

from deit_ray.outcome import Outcome
from deit_ray.study.records import Evaluated, Spent, StudyRecord, TrialRecord


@pytest.fixture
def record(tmp_path) -> StudyRecord:
    return StudyRecord(optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db", direction="maximize"))


def test_a_new_study_has_nothing_noted(record):
    assert (record.made_with, record.outcome, record.ended, record.tested) == (None, None, None, None)
    assert record.spent == Spent(0.0, 0.0)
    assert record.tune_states == {}
    assert record.records() == []


def test_a_studys_values_are_stored_under_the_names_of_version_0_1(record):
    record.made_with = {"name": "x"}
    record.outcome = Outcome.failed("no trial finished")
    record.ended = "all trials have ended"
    record.spent = Spent(wall_s=1.5, gpu_s=3.0)
    record.tested = Evaluated(7, {"test/top1": 0.25})
    record.add_tune_states({0: "TERMINATED"})
    record.add_tune_states({1: "ERROR"})
    assert record.optuna.user_attrs == {
        "experiment": {"name": "x"},
        "outcome": "failed: no trial finished",
        "ended": "all trials have ended",
        "spent": {"wall_s": 1.5, "gpu_s": 3.0},
        "test": {"trial": 7, "test/top1": 0.25},
        "tune": {"0": "TERMINATED", "1": "ERROR"},
    }
    assert record.outcome == Outcome.failed("no trial finished")
    assert record.tested == Evaluated(7, {"test/top1": 0.25})
    assert record.tune_states == {0: "TERMINATED", 1: "ERROR"}
    record.outcome = None
    assert record.optuna.user_attrs["outcome"] is None
    assert record.outcome is None


def test_a_trials_values_are_stored_under_names_that_stay(record):
    """Each value costs equally many bytes: earlier versions wrote all times again, which are still read."""
    record.optuna.ask().set_user_attr("times", {"3": 1.5})
    record.report(0, 1, 0.5)
    record.report(0, 1, 0.9)  # it comes again, and is no second one
    record.report(0, 2, math.nan)
    record.note_images(0, 144)
    record.end_trial(0, Outcome.failed("OSError: x"), signature="abc")
    (frozen,) = record.optuna.trials
    times = {epoch: frozen.user_attrs[f"time/{epoch}"] for epoch in (1, 2)}
    assert frozen.user_attrs == {
        "times": {"3": 1.5},
        "time/1": times[1],
        "time/2": times[2],
        "images": 144,
        "outcome": "failed: OSError: x",
        "signature": "abc",
    }
    assert times[1] <= times[2]
    trial = record.trial(0)
    assert (trial.state, trial.outcome, trial.signature) == (
        TrialState.FAIL,
        Outcome.failed("OSError: x"),
        "abc",
    )
    assert (trial.epoch, trial.best, trial.values[1], trial.images) == (2, 0.5, 0.5, 144)
    assert math.isnan(trial.last)
    assert trial.times == {3: 1.5, **times}


@pytest.mark.parametrize(
    ("outcome", "value", "state"),
    [
        (Outcome.finished(), 0.5, TrialState.COMPLETE),
        (Outcome.stopped_early(1), None, TrialState.PRUNED),
        (Outcome.cancelled(), None, TrialState.FAIL),
    ],
)
def test_a_trial_ends_in_optuna_as_its_outcome_says(record, outcome, value, state):
    record.optuna.ask()
    record.report(0, 1, 0.5)
    record.end_trial(0, outcome, value)
    trial = record.trial(0)
    assert (trial.state, trial.outcome, trial.ending) == (state, outcome, outcome)
    assert trial.signature is None


def test_a_trial_whose_driver_died_before_it_ended_it_is_reopened(record):
    live = record.optuna.ask()
    live.set_user_attr("outcome", "cancelled")
    assert record.trial(0).outcome == Outcome.cancelled()
    record.reopen(0)
    assert (record.trial(0).outcome, record.trial(0).state) == (None, TrialState.RUNNING)


def test_an_ended_trial_without_an_outcome_ended_as_its_state_says():
    def ended(state, values=None, **options) -> str:
        trial = optuna.trial.create_trial(state=state, intermediate_values=values, **options)
        return TrialRecord(trial).ending.text

    assert ended(TrialState.COMPLETE, value=0.5) == "finished"
    assert ended(TrialState.PRUNED, {1: 0.5, 3: 0.4}) == "stopped early at epoch 3"
    assert ended(TrialState.FAIL) == "failed: it never began"
