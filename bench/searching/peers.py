"""Methods of other libraries, on their own interfaces."""

import datetime
import logging
import warnings

import numpy as np
import optuna
from optuna.trial import Trial, TrialState

from bench.searching.loop import Method
from bench.searching.methods import METRIC, distributions
from bench.searching.problems import Problem


class OptunaHalving(Method):
    """Optuna's TPE and SuccessiveHalvingPruner, called as by `Study.optimize`.

    Args:
        rungs: the pruner's arguments.
    """

    def __init__(self, problem: Problem, seed: int, **rungs):
        self.study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=seed),
            pruner=optuna.pruners.SuccessiveHalvingPruner(**rungs),
        )
        self.study.enqueue_trial(problem.recipe)
        self.space = distributions(problem)
        self.trials: dict[int, Trial] = {}
        self.last: dict[int, float] = {}

    def suggest(self) -> tuple[int, dict]:
        trial = self.study.ask(self.space)
        self.trials[trial.number] = trial
        return trial.number, trial.params

    def report(self, number: int, epoch: int, value: float) -> bool:
        trial, self.last[number] = self.trials[number], value
        trial.report(value, epoch)
        if not trial.should_prune():
            return False
        self.study.tell(trial, state=TrialState.PRUNED)
        return True

    def end(self, number: int) -> None:
        self.study.tell(self.trials[number], self.last[number])


class SyneTune(Method):
    """A scheduler of Syne Tune, called as its `Tuner` calls it.

    Args:
        name: one of `syne_tune.optimizer.baselines`, such as BOHB.
        rungs: the scheduler's arguments about rungs.
    """

    def __init__(self, problem: Problem, seed: int, name: str = "BOHB", **rungs):
        from syne_tune.optimizer import baselines

        logging.getLogger("syne_tune").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="statsmodels|pandas")
        np.random.seed(seed)  # its schedulers choose a bracket by NumPy's global generator
        self.scheduler = getattr(baselines, name)(
            config_space=syne_space(problem), metric=METRIC, time_attr="epoch", max_t=problem.epochs,
            do_minimize=False, random_seed=seed, points_to_evaluate=[problem.recipe], **rungs,
        )  # fmt: skip
        self.trials, self.last, self.epochs = {}, {}, problem.epochs

    def suggest(self) -> tuple[int, dict] | None:
        from syne_tune.backend.trial_status import Trial

        suggestion = self.scheduler.suggest()
        if suggestion is None:
            return None
        number = len(self.trials)
        self.trials[number] = Trial(number, dict(suggestion.config), datetime.datetime.now())
        self.scheduler.on_trial_add(self.trials[number])
        return number, suggestion.config

    def report(self, number: int, epoch: int, value: float) -> bool:
        from syne_tune.optimizer.scheduler import SchedulerDecision

        result = self.last[number] = {METRIC: value, "epoch": epoch}
        if self.scheduler.on_trial_result(self.trials[number], result) != SchedulerDecision.STOP:
            return False
        self.scheduler.on_trial_remove(self.trials[number])
        return True

    def end(self, number: int) -> None:
        self.scheduler.on_trial_complete(self.trials[number], self.last[number])


def syne_space(problem: Problem) -> dict:
    from syne_tune import config_space

    kinds = {"float": config_space.uniform, "log": config_space.loguniform, "int": config_space.randint}
    return {key: kinds[kind](*bounds) for key, d in problem.space.items() for kind, bounds in d.items()}
