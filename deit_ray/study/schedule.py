"""Which trials to stop early: Ray Tune's schedulers, knowing a trial by its number and all that the study knows."""

import math
from dataclasses import dataclass

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

from deit_ray.experiment.config import Experiment


@dataclass(frozen=True)
class Stub:
    """All that a rule knows of a trial."""

    trial_id: str


class StudyScheduler(FIFOScheduler):
    """Decides by a rule of Ray Tune's, which sees each result of a trial once, whoever runs it and however often it is resumed.

    Attributes:
        controller: Tune's, once it has started.
        trials: Tune's, by number.
    """

    def __init__(self, experiment: Experiment):
        super().__init__()
        self.rule, self._metric = make_rule(experiment), experiment.search.metric
        self.controller, self.trials = None, {}
        self.stubs: dict[int, Stub] = {}
        self.decisions: dict[int, dict[int, str]] = {}  # by number and epoch

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return object, ()

    def judge(self, number: int, epoch: int, value: float) -> str:
        """Whether a trial goes on after an epoch's result."""
        decided = self.decisions.setdefault(number, {})
        if self.rule is None or not math.isfinite(value):
            return self.CONTINUE
        if number not in self.stubs:
            self.stubs[number] = Stub(trial_id=f"trial-{number:04d}")
            self.rule.on_trial_add(None, self.stubs[number])
        if epoch not in decided:
            decided[epoch] = self.rule.on_trial_result(
                None, self.stubs[number], {"epoch": epoch, self._metric: value}
            )
        return decided[epoch]

    def stopped_at(self, number: int) -> int | None:
        """The epoch after which the rule has stopped a trial; None where it goes on."""
        return min(
            (epoch for epoch, decision in self.decisions.get(number, {}).items() if decision == self.STOP),
            default=None,
        )

    def on_trial_add(self, tune_controller, trial) -> None:
        self.controller = tune_controller
        self.trials[trial.config["number"]] = trial

    def on_trial_result(self, tune_controller, trial, result: dict) -> str:
        if self._metric not in result:
            return self.CONTINUE
        return self.judge(trial.config["number"], result["epoch"], result[self._metric])


def make_rule(experiment: Experiment):
    """The rule by name. A new scheduler goes here, and its name into `config.Search.scheduler`; it must decide from results alone."""
    search = experiment.search
    if search.scheduler == "asha":
        return ASHAScheduler(
            metric=search.metric, mode="max", time_attr="epoch", max_t=experiment.train.epochs + 1,
            grace_period=search.grace_epochs, reduction_factor=search.reduction_factor,
        )  # fmt: skip
    if search.scheduler == "median":
        return MedianStoppingRule(
            metric=search.metric, mode="max", time_attr="epoch", grace_period=search.grace_epochs,
            min_time_slice=math.inf,  # else it would pause trials, of which no checkpoint of Tune's exists
        )  # fmt: skip
    return None
