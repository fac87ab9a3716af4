"""The methods on Ray Tune's interfaces: ours with its variants, and Ray's stock."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import optuna
from optuna.trial import TrialState
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.optuna import OptunaSearch

from bench.searching.loop import CONCURRENT, Method
from bench.searching.problems import Problem
from deit_ray.experiment.config import Experiment
from deit_ray.experiment.load import load_experiment
from deit_ray.experiment.space import Distribution
from deit_ray.outcome import Kind, Outcome
from deit_ray.study.records import StudyRecord
from deit_ray.study.schedule import StudyScheduler
from deit_ray.study.searcher import StudySearcher, make_distribution
from deit_ray.study.stop_policy import StopPolicy

ROOT = Path(__file__).resolve().parents[2]
METRIC = "val/top1"
MANY = 100_000  # trials: the epochs end a study, not the number of its trials


@dataclass
class TuneTrial:
    """What a searcher and a scheduler read of Ray Tune's trial."""

    trial_id: str
    config: dict
    last_result: dict


class RayMethod(Method):
    """A searcher and a scheduler of Ray Tune, called as `TuneController` calls them.

    Args:
        numbers: whether proposed values contain the trial's own `number`, as those of `StudySearcher` do.
        most_trials: Tune's `num_samples`.
    """

    def __init__(
        self, searcher: Searcher, scheduler: FIFOScheduler, numbers: bool, most_trials: float = math.inf
    ):
        self.searcher, self.scheduler = ConcurrencyLimiter(searcher, CONCURRENT), scheduler
        self.numbers, self.most_trials = numbers, most_trials
        self.trials: dict[int, TuneTrial] = {}
        self.asked = 0

    def suggest(self) -> tuple[int, dict] | None:
        if self.asked >= self.most_trials:
            return None
        trial_id = f"tune-{self.asked}"
        config = self.searcher.suggest(trial_id)
        if config is None or config == Searcher.FINISHED:
            return None
        number = config["number"] if self.numbers else self.asked
        self.asked += 1
        self.trials[number] = trial = TuneTrial(trial_id, config, {})
        self.scheduler.on_trial_add(None, trial)
        return number, {key: value for key, value in config.items() if key not in ("number", "folder")}

    def report(self, number: int, epoch: int, value: float) -> bool:
        """As `TuneController._process_trial_result`: the searcher never gets a result that stops."""
        trial = self.trials[number]
        trial.last_result = {METRIC: value, "epoch": epoch, "training_iteration": epoch}
        decision = self.scheduler.on_trial_result(None, trial, trial.last_result)
        if decision != TrialScheduler.STOP:
            self.searcher.on_trial_result(trial.trial_id, trial.last_result)
        self.reported(number, epoch, value)
        if decision == TrialScheduler.STOP:
            self.end(number)
        return decision == TrialScheduler.STOP

    def end(self, number: int) -> None:
        """As `TuneController.stop_trial`."""
        trial = self.trials[number]
        self.scheduler.on_trial_complete(None, trial, trial.last_result)
        self.searcher.on_trial_complete(trial.trial_id, result=trial.last_result)
        self.completed(number)

    def reported(self, number: int, epoch: int, value: float) -> None:
        """Tune's callback `on_trial_result`."""

    def completed(self, number: int) -> None:
        """Tune's callback `on_trial_complete`."""


class Ours(RayMethod):
    """StudySearcher and StudyScheduler on an Optuna study in memory, with the records that the driver writes.

    Attributes:
        record: the study, written as by `observers.Database`, at the events of `Listener`.
    """

    def __init__(self, experiment: Experiment):
        self.record = StudyRecord(optuna.create_study(direction="maximize"))
        self.policy = StopPolicy(experiment)
        searcher = StudySearcher(self.record.optuna, experiment, "trial-{}".format)
        super().__init__(searcher, StudyScheduler(experiment), numbers=True)

    def reported(self, number: int, epoch: int, value: float) -> None:
        self.record.report(number, epoch, value)

    def completed(self, number: int) -> None:
        """As `Trials.completed`; a finished trial has the value of its best checkpoint."""
        trial = self.record.trial(number)
        outcome = self.policy.after_completion(number, trial.epoch).outcome
        if outcome.kind == Kind.STOPPED_EARLY:
            self.stopped_early(number, outcome)
        else:
            self.record.end_trial(number, outcome, trial.best)

    def stopped_early(self, number: int, outcome: Outcome) -> None:
        self.record.end_trial(number, outcome)


class StoppedUnseen(Ours):
    """The sampler does not learn from trials that were stopped early."""

    def stopped_early(self, number: int, outcome: Outcome) -> None:
        self.record.end_trial(number, Outcome.cancelled())


class StoppedAsFinished(Ours):
    """The sampler learns a stopped trial's last value like a finished one's, as with OptunaSearch."""

    def stopped_early(self, number: int, outcome: Outcome) -> None:
        self.record.optuna.tell(number, self.record.trial(number).last, state=TrialState.COMPLETE)


def make_stock(problem: Problem, seed: int, most_trials: float = math.inf, **scheduler) -> RayMethod:
    """Ray's OptunaSearch and ASHAScheduler, with their defaults; only the number of epochs is given."""
    search, rule = stock_searcher(problem, seed), stock_scheduler(problem, **scheduler)
    return RayMethod(search, rule, numbers=False, most_trials=most_trials)


def stock_searcher(problem: Problem, seed: int) -> OptunaSearch:
    recipes = [problem.recipe]
    return OptunaSearch(distributions(problem), METRIC, "max", points_to_evaluate=recipes, seed=seed)


def stock_scheduler(problem: Problem, **options) -> ASHAScheduler:
    return ASHAScheduler(metric=METRIC, mode="max", max_t=problem.epochs, **options)


def distributions(problem: Problem) -> dict[str, optuna.distributions.BaseDistribution]:
    return {key: make_distribution(Distribution.model_validate(d)) for key, d in problem.space.items()}


def make_experiment(problem: Problem, seed: int, **search) -> Experiment:
    """The experiment of a study of ours: its own values are the recipe, with which its first trial begins."""
    keys = {
        **problem.recipe,
        "seed": seed,
        "train.epochs": problem.epochs,
        "search": {"trials": MANY, "max_concurrent": CONCURRENT, "space": problem.space, **search},
    }
    return _base().with_overrides(keys)


@cache
def _base() -> Experiment:
    fixed = {"data.uri": "digits", "distillation.kind": "none"}
    return load_experiment(ROOT / "experiments/digits_student.yaml", fixed)


def ours(method: type[Ours] = Ours, **search) -> Callable[[Problem, int], Method]:
    """Makes a method of ours from keys of the experiment's `search`."""
    return lambda problem, seed: method(make_experiment(problem, seed, **search))
