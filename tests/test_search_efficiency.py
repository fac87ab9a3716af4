"""What bench/search_efficiency.py measures with: its functions, its loop, its methods and its intervals."""

import numpy as np
import pytest

from bench.search_efficiency import METHODS, MOST_EPOCHS, figures_of, table_of
from bench.searching.in_tune import Real, count_differing
from bench.searching.intervals import ratio_of_means
from bench.searching.loop import CONCURRENT, Method, RecordedClock, VirtualClock, run_study
from bench.searching.problems import PROBLEMS, LearningCurves, MFHartmann


def draws(problem, count: int) -> list[dict]:
    return [problem.at(places) for places in np.random.default_rng(0).random((count, len(problem.space)))]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_best_value_is_reached_at_the_optimum_and_exceeded_nowhere(name, seed):
    problem = PROBLEMS[name](seed)
    optimum = problem.at(np.array(problem.optimum))
    assert problem.true(optimum)[-1] == pytest.approx(problem.best, rel=1e-4)
    assert problem.is_reached(problem.true(optimum)[-1])
    assert all(problem.true(params).max() <= problem.best for params in draws(problem, 300))
    assert not problem.is_reached(problem.true(problem.recipe).max())


def test_noise_follows_from_the_values_and_vanishes_at_the_highest_fidelity_of_mfhartmann():
    curves, hartmann = LearningCurves(0), MFHartmann(0)
    params = draws(curves, 400)
    errors = np.array([curves.observed(one) - curves.true(one) for one in params])
    assert np.array_equal(curves.observed(params[0]), curves.observed(dict(reversed(params[0].items()))))
    # of one evaluation, and of the mean of a training's 30: 0.003^2 + 0.004^2 / 30
    assert errors.std() == pytest.approx(0.005, rel=0.05)
    assert errors.mean(axis=1).std() == pytest.approx((0.003**2 + 0.004**2 / 30) ** 0.5, rel=0.1)
    for one in draws(hartmann, 5):
        assert hartmann.observed(one)[-1] == hartmann.true(one)[-1]
        assert (hartmann.observed(one)[:-1] < hartmann.true(one)[:-1]).all()


def test_mfhartmann_is_the_formula_of_its_source():
    # mf-prior-bench 1.10.0: MFHartmann3(n_fidelities=30, fidelity_bias=2.5, fidelity_noise=0) at
    # (0.2, 0.4, 0.6), fidelities 1, 5 and 30
    values = MFHartmann(0).true(MFHartmann(0).at(np.array([0.2, 0.4, 0.6])))
    assert values[[0, 4, 29]] == pytest.approx([-0.5388852264610233, 0.1904037747853221, 1.0023086415041336])


class Scripted(Method):
    """Proposes trials without values; stops a trial as told, and proposes paused ones again."""

    def __init__(self, stops: dict[int, int], again: tuple[int, ...] = (), trials: int = 6):
        self.stops, self.proposals = stops, [*range(trials), *again]
        self.running, self.most, self.seen, self.ended = set(), 0, [], []

    def suggest(self):
        if not self.proposals:
            return None
        number = self.proposals.pop(0)
        self.running.add(number)
        self.most = max(self.most, len(self.running))
        return number, LearningCurves(0).recipe

    def report(self, number, epoch, value):
        self.seen.append((number, epoch))
        stops = self.stops.pop(number, None) if self.stops.get(number) == epoch else None
        self.running -= {number} if stops else set()
        return stops is not None

    def end(self, number):
        self.ended.append(number)
        self.running.remove(number)


def test_four_trials_run_at_once_and_a_paused_one_continues_after_its_last_epoch():
    method = Scripted(stops={1: 5, 2: 7}, again=(1,))
    study = run_study(method, LearningCurves(0), float("inf"), until_reached=False)
    assert method.most == CONCURRENT
    assert study.epochs == len(method.seen) == len(set(method.seen)) == 5 * 30 + 7
    assert sorted(method.ended) == [0, 1, 3, 4, 5]
    assert [epoch for number, epoch in method.seen if number == 1] == list(range(1, 31))
    assert (study.trials[2].epoch, study.trials[2].stopped) == (7, True)


class Recording(VirtualClock):
    def __init__(self):
        super().__init__()
        self.numbers = []

    def next(self):
        number = super().next()
        self.numbers.append(number)
        return number


def replayed(name: str, most_epochs: int):
    """A virtual study, as if it were Tune's, and its replay."""
    problem, clock = LearningCurves(3), Recording()
    first = run_study(METHODS[name](problem, 3), problem, most_epochs, clock, until_reached=False)
    real = Real(
        {number: trial.params for number, trial in first.trials.items()},
        {number: (trial.epoch, trial.stopped) for number, trial in first.trials.items()},
    )
    method, clock = METHODS[name](problem, 3), RecordedClock(clock.numbers)
    return real, run_study(method, problem, most_epochs, clock, until_reached=False), method


@pytest.mark.parametrize("name", ["ours", "stock", "halving"])
def test_replay_of_a_study_decides_the_same_and_every_other_decision_is_counted(name):
    real, study, _ = replayed(name, 300)
    count = 2 * len(study.trials)
    assert any(trial.stopped for trial in study.trials.values())
    assert any(trial.epoch == 30 for trial in study.trials.values())
    assert count_differing(real, study) == (0, count)
    real.params[1] = real.params[2]
    real.ends[2] = (29, True)
    del real.ends[3], real.params[3]
    assert count_differing(real, study) == (4, count)


@pytest.mark.parametrize(
    ("name", "state"),
    [("ours", "PRUNED"), ("stopped_unseen", "FAIL"), ("stopped_as_finished", "COMPLETE")],
)
def test_trials_of_ours_end_in_optuna_as_the_driver_ends_them(name, state):
    _, study, method = replayed(name, 300)
    for number, trial in study.trials.items():
        stored = method.record.optuna.trials[number]
        assert list(stored.intermediate_values.values()) == list(trial.observed[: trial.epoch])
        if trial.stopped:
            assert stored.state.name == state
            assert state != "COMPLETE" or stored.value == trial.observed[trial.epoch - 1]
        elif stored.state.is_finished():
            assert (stored.state.name, stored.value) == ("COMPLETE", trial.observed.max())


def test_interval_is_of_paired_seeds_and_a_bound_is_met_by_its_upper_end():
    below = np.random.default_rng(1).exponential(1000, 200)
    paired = ratio_of_means(0.5 * below, below)
    assert (paired.value, paired.low, paired.high) == pytest.approx((0.5, 0.5, 0.5))
    other = ratio_of_means(np.random.default_rng(2).exponential(500, 200), below)
    # two independent exponential means of 200: a relative error of sqrt(2 / 200) = 0.1
    assert other.high - other.low == pytest.approx(2 * 1.96 * 0.1 * other.value, rel=0.25)
    assert other.low < other.value < other.high
    assert other.meets(other.high)
    assert not other.meets((other.value + other.high) / 2)


def test_best_peer_is_the_one_closest_to_ours_on_the_seeds_that_both_have():
    found = {
        "ours": [300, 300, 3000],
        "stock": [400, 600, 5000],
        "random": [600, 600, 6000],
        "halving": [400, 200, MOST_EPOCHS],
        "syne_tune": [400, 400],  # 0.75 on the first two seeds
    }
    figures = figures_of(found, "")
    assert figures["epochs_vs_random"] == figures["epochs_vs_random_high"] == 0.5
    assert figures["epochs_vs_stock"] == 0.6
    assert figures["vs_best_peer"] == pytest.approx(3600 / (600 + MOST_EPOCHS))
    assert table_of({"ours": [100, 200], "syne_tune": [MOST_EPOCHS]})[-1].startswith(
        "| Syne Tune's ASHABORE, 1 seeds | 3600 | 100% | 36.00"
    )
