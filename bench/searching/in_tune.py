"""One study of a Ray method in the real Ray Tune, and the same study replayed in virtual time.

Trials take no real training: they report the values of a problem. The replay gets the order of the trials'
events from the real study and nothing else, so every proposal and every stop must come out the same.
"""

import random
import tempfile
import time
from dataclasses import dataclass, field

import ray.tune

from bench.many_trials import Idle, make_driver
from bench.searching.loop import CONCURRENT, Method, RecordedClock, Virtual, run_study
from bench.searching.methods import make_experiment, stock_scheduler, stock_searcher
from bench.searching.problems import Problem
from tests.support.data import write_colours

MOST_EPOCH_S = 0.1  # of waiting in each epoch, so that trials overtake each other


@dataclass
class Real:
    """What Ray Tune did.

    Attributes:
        params: the values of each trial, by number.
        ends: the last epoch of each trial, and whether it was stopped before its own end.
        events: the number of the trial of each event, in order.
    """

    params: dict[int, dict] = field(default_factory=dict)
    ends: dict[int, tuple[int, bool]] = field(default_factory=dict)
    events: list[int] = field(default_factory=list)


def differing(real: Real, method: Method, problem: Problem) -> tuple[int, int]:
    """Replays a real study; returns the decisions that differ, and those that were compared.

    Decisions are the values of each trial, and where and how it ended.
    """
    replayed = run_study(method, problem, float("inf"), RecordedClock(real.events), until_reached=False)
    return count_differing(real, replayed)


def count_differing(real: Real, replayed: Virtual) -> tuple[int, int]:
    """The decisions of two studies that differ or that only one of them has, and the number of all."""
    differing = 0
    numbers = real.params.keys() | replayed.trials.keys()
    for number in numbers:
        trial = replayed.trials.get(number)
        params, end = (trial.params, (trial.epoch, trial.stopped)) if trial else (None, None)
        differing += (real.params.get(number) != params) + (real.ends.get(number) != end)
    return differing, 2 * len(numbers)


def run_ours(problem: Problem, seed: int, trials: int) -> Real:
    """A study of ours by the real driver (database, MLflow, Ray Tune), in a running Ray."""
    from deit_ray.study.observers import Observer
    from deit_ray.study.study import Study
    from deit_ray.terminal.console import Console

    class Recorder(Observer):
        def trial_reported(self, number: int, result: dict) -> None:
            real.events.append(number)

    real = Real()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        experiment = make_experiment(problem, seed, trials=trials).with_overrides(
            {
                "data.uri": folder,
                "results.uri": f"{folder}/results",
                "tracking.uri": f"sqlite:///{folder}/mlflow.db",
            }
        )
        data = write_colours(folder, {"train": 20}, classes=2)  # no trial reads it
        study = Study.create(experiment)
        with study.driving():
            driver = make_driver(study, data, make_trainable(problem), CONCURRENT, Console())
            driver.observers.append(Recorder())
            driver.run()
        for trial in study.trials():
            real.params[trial.number] = trial.params
            real.ends[trial.number] = trial.epoch, trial.state.name == "PRUNED"
    return real


def run_stock(problem: Problem, seed: int, trials: int) -> Real:
    """A study of Ray's OptunaSearch and ASHAScheduler, in a running Ray."""

    class Recorder(ray.tune.Callback):
        def __deepcopy__(self, memo):
            return self

        def on_trial_result(self, iteration, trials, trial, result, **info):
            number = trials.index(trial)
            real.events.append(number)
            real.params[number] = trial.config
            # ASHAScheduler stops trials at their last epoch too
            real.ends[number] = result["training_iteration"], True

    real = Real()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        ray.tune.Tuner(
            ray.tune.with_resources(make_trainable(problem), {"CPU": 0.01}),
            tune_config=ray.tune.TuneConfig(
                search_alg=stock_searcher(problem, seed),
                scheduler=stock_scheduler(problem),
                num_samples=trials,
                max_concurrent_trials=CONCURRENT,
            ),
            run_config=ray.tune.RunConfig(storage_path=folder, verbose=0, callbacks=[Recorder()]),
        ).fit()
    return real


def make_trainable(problem: Problem) -> type:
    """A trial that reports what it would have learnt, and writes what a trial of ours writes."""

    class CurveTrial(Idle):
        epochs = problem.epochs

        def setup(self, config: dict):
            self.values = problem.observed(config)
            super().setup({"folder": self.logdir, **config})

        def top1(self) -> float:
            time.sleep(random.random() * MOST_EPOCH_S)
            return float(self.values[self.epoch - 1])

    return CurveTrial


def compare_all(problem: Problem, seed: int, trials: int, make: dict[str, Method]) -> dict[str, int]:
    """Runs ours and the stock in the real Tune, replays both, and returns the figures.

    Args:
        make: the methods `ours` and `stock`, made for this many trials and not used yet.
    """
    from deit_ray.cluster import connect
    from deit_ray.terminal.console import Console

    counts = {}
    with connect.connected("local", False, Console().warn):
        for name, run in (("ours", run_ours), ("stock", run_stock)):
            counts[name] = differing(run(problem, seed, trials), make[name], problem)
    print(f"decisions in the real Tune and in virtual time (differing, compared): {counts}")
    return {
        "decisions_differing": sum(differing for differing, _ in counts.values()),
        "decisions_compared": sum(compared for _, compared in counts.values()),
    }
