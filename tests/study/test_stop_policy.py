"""Which trials end, and how: budgets, requests and failures, without Ray."""

import datetime
import subprocess
import sys

import optuna
import pytest
from optuna.trial import TrialState

from deit_ray.errors import Interrupted, UnavailableError
from deit_ray.outcome import Outcome
from deit_ray.study.records import Spent, TrialRecord
from deit_ray.study.stop_policy import (
    BY_A_PERSON,
    Continue,
    End,
    Halt,
    LeaveOpen,
    OpenTrials,
    Orders,
    StopPolicy,
)
from deit_ray.trial.failure import Failure

EPOCHS = 4
CANCELLED = End(Outcome.cancelled())
OPEN = OpenTrials(waiting=(3,), started=(1, 2))
FULL_DISK = Failure("unavailable", "results.uri: No space left on device", "", "s")
DIED = "its process died"
BUG = Failure("failed", "ValueError: no", "", "s")


@pytest.fixture
def policy(experiment) -> StopPolicy:
    keys = {"train.epochs": EPOCHS, "train.max_failures": 2, "search.budget.hours": 1}
    return StopPolicy(experiment("digits_teacher", keys))


def test_the_outcome_of_a_completed_trial_follows_from_its_last_epoch(policy):
    assert policy.after_completion(0, EPOCHS) == End(Outcome.finished())
    assert policy.after_completion(1, 3) == End(Outcome.stopped_early(3))
    assert policy.after_completion(2, 0) == End(Outcome.failed("it reported nothing"))
    assert policy.after_failure(3, BUG) == End(Outcome.failed("ValueError: no"))


def test_a_budget_cancels_open_trials_once(policy):
    assert policy.check_budgets([], Spent(wall_s=3599), OPEN) == Orders()
    assert not policy.is_closed
    assert policy.check_budgets([], Spent(wall_s=3600), OPEN) == Orders(end=(3,), ask=(1, 2))
    assert policy.ending == "search.budget.hours: 1 are used up"
    assert policy.is_closed
    assert policy.check_budgets([], Spent(wall_s=9999), OPEN) == Orders()
    assert policy.after_completion(1, 2) == CANCELLED
    assert policy.after_completion(2, EPOCHS) == End(Outcome.finished())  # it finished before it was asked


def test_a_target_is_judged_by_the_trials(experiment):
    policy = StopPolicy(experiment("digits_teacher", {"search.budget.target": 0.9}))
    moment = datetime.datetime(2026, 1, 1)
    ended = optuna.trial.create_trial(value=0.95, state=TrialState.COMPLETE)
    ended.datetime_complete = moment
    assert policy.check_budgets([TrialRecord(ended)], Spent(), OPEN).ask == (1, 2)
    assert policy.ending.startswith("search.budget.target: trial")


def test_a_person_cancels_one_trial_or_ends_the_study(policy):
    assert policy.stop(1, OPEN) == Orders(ask=(1,))
    assert policy.stop(1, OPEN) == Orders()  # trial 1 has been asked to end already
    assert policy.stop(3, OPEN) == Orders(end=(3,))
    assert policy.stop(7, OPEN) == Orders()
    assert not policy.is_closed
    assert policy.after_completion(1, 2) == CANCELLED
    assert policy.stop(None, OPEN) == Orders(end=(3,), ask=(2,))
    assert policy.ending == BY_A_PERSON


def test_a_persons_request_is_the_reason_even_where_a_budget_came_first(policy):
    policy.check_budgets([], Spent(wall_s=3600), OPEN)
    assert policy.stop(None, OpenTrials(started=(1, 2))) == Orders()
    assert policy.ending == BY_A_PERSON


def test_the_surroundings_halt_a_study_and_leave_its_trials_open(policy):
    decision = policy.after_failure(1, FULL_DISK)
    assert isinstance(decision, Halt)
    assert isinstance(decision.error, UnavailableError)
    assert str(decision.error) == "trial 1: results.uri: No space left on device"
    assert policy.halt(decision.error, OPEN) == Orders(ask=(1, 2))  # the waiting trial stays open anyway
    policy.halt(ValueError("later"), OPEN)
    assert policy.halted is decision.error
    assert policy.is_closed
    assert policy.after_completion(2, 2) == LeaveOpen()
    assert policy.after_failure(1, BUG) == LeaveOpen()
    assert policy.after_death(4, DIED, 20, ray_is_alive=True) == LeaveOpen()


def test_the_first_request_for_a_trial_holds(policy):
    policy.stop(1, OPEN)
    policy.halt(ValueError("no"), OPEN)
    assert policy.after_completion(1, 2) == CANCELLED
    assert policy.after_completion(2, 2) == LeaveOpen()


def test_a_trial_whose_process_dies_continues_while_it_makes_progress(policy):
    # train.max_failures is 2: the third death in a row at the same step ends it
    assert policy.after_death(0, DIED, 20, ray_is_alive=True) == Continue(DIED, 20)
    assert policy.after_death(0, DIED, 20, ray_is_alive=True) == Continue(DIED, 20)
    assert policy.after_death(0, DIED, 40, ray_is_alive=True) == Continue(
        DIED, 40
    )  # progress: the count restarts
    assert policy.after_death(0, DIED, 40, ray_is_alive=True) == Continue(DIED, 40)
    failed = Outcome.failed("its process died 3 times in a row at step 40")
    assert policy.after_death(0, DIED, 40, ray_is_alive=True) == End(failed)
    assert policy.after_death(1, DIED, 0, ray_is_alive=True) == Continue(
        DIED, 0
    )  # another trial has its own count


def test_a_trial_that_dies_is_not_continued_in_a_study_that_ends(policy):
    policy.stop(None, OPEN)
    assert policy.after_death(4, DIED, 20, ray_is_alive=True) == CANCELLED
    assert policy.after_death(1, DIED, 20, ray_is_alive=True) == CANCELLED


def test_a_trial_that_dies_with_ray_halts_the_study(policy):
    decision = policy.after_death(0, DIED, 20, ray_is_alive=False)
    assert isinstance(decision, Halt)
    assert isinstance(decision.error, Interrupted)


def test_a_study_ends_as_its_trials_did_unless_a_person_ended_it(policy):
    assert policy.study_outcome("all trials have ended", has_best=True) == Outcome.finished()
    assert policy.study_outcome("all trials have ended", has_best=False) == Outcome.failed(
        "no trial finished"
    )
    assert policy.study_outcome(BY_A_PERSON, has_best=True) == Outcome.cancelled()


def test_the_stop_policy_loads_no_ray_and_no_mlflow():
    loaded = "sorted({'ray', 'mlflow', 'torch'} & sys.modules.keys())"
    code = f"import sys, deit_ray.study.stop_policy; print({loaded})"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"[]\n"
