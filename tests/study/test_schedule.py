"""Early stopping: a resumed study decides as Ray Tune's own scheduler does in an undisturbed study."""

import random

import pytest
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

from deit_ray.study.schedule import Stub, StudyScheduler

TRIALS, EPOCHS = 12, 8


@pytest.fixture
def scheduler_of(experiment):
    def make(name: str) -> StudyScheduler:
        keys = {
            "distillation.kind": "none",
            "train.epochs": EPOCHS,
            "search.scheduler": name,
            "search.grace_epochs": 2,
            "search.space": {"optim.lr": {"log": [3e-4, 1e-2]}},
        }
        return StudyScheduler(experiment("digits_student", keys))

    return make


def rays_own(name: str):
    if name == "asha":
        return ASHAScheduler(
            metric="val/top1",
            mode="max",
            time_attr="epoch",
            max_t=EPOCHS + 1,
            grace_period=2,
            reduction_factor=2,
        )
    return MedianStoppingRule(
        metric="val/top1", mode="max", time_attr="epoch", grace_period=2, min_time_slice=float("inf")
    )


def results(seed: int) -> list[tuple[int, int, float]]:
    """Results (number, epoch, value) as they arrive: epochs of a trial rise, trials interleave at random."""
    generator = random.Random(seed)
    left = [number for number in range(TRIALS) for _ in range(EPOCHS)]
    generator.shuffle(left)
    epochs = dict.fromkeys(range(TRIALS), 0)
    found = []
    for number in left:
        epochs[number] += 1
        found.append((number, epochs[number], generator.random()))
    return found


@pytest.mark.parametrize("name", ["asha", "median"])
@pytest.mark.parametrize("seed", range(5))
def test_decisions_equal_an_undisturbed_schedulers_wherever_a_study_is_interrupted(scheduler_of, name, seed):
    own, stubs = rays_own(name), [Stub(str(number)) for number in range(TRIALS)]
    for stub in stubs:
        own.on_trial_add(None, stub)
    told, decided, stopped = [], [], set()
    for number, epoch, value in results(seed):
        if number not in stopped:
            told.append((number, epoch, value))
            decided.append(own.on_trial_result(None, stubs[number], {"epoch": epoch, "val/top1": value}))
            if decided[-1] == own.STOP:
                stopped.add(number)
    assert 0 < len(stopped) < TRIALS
    for cut in range(0, len(told), 7):
        resumed = scheduler_of(name)
        for result in told[:cut]:
            resumed.judge(*result)
        assert [resumed.judge(*result) for result in told[cut:]] == decided[cut:]
        assert {number for number in range(TRIALS) if resumed.stopped_at(number)} == stopped


def test_a_result_that_comes_again_is_no_second_one(scheduler_of):
    scheduler = scheduler_of("asha")
    first = [scheduler.judge(number, 2, number / 10) for number in range(6)]
    again = [scheduler.judge(number, 2, number / 10) for number in range(6)]
    assert again == first
    assert [len(recorded) for _, recorded in scheduler.rule._brackets[0]._rungs if recorded] == [6]


def test_nan_is_no_result_and_none_stops_nothing(scheduler_of):
    scheduler = scheduler_of("asha")
    assert scheduler.judge(0, 2, float("nan")) == scheduler.CONTINUE
    assert scheduler.judge(1, 2, 0.5) == scheduler.CONTINUE
    never = scheduler_of("none")
    assert {never.judge(number, 2, -number) for number in range(9)} == {never.CONTINUE}
