"""Stops trials early, by Ray Tune's schedulers, which identify a trial by its number over all resumes."""

import math
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

from deit_ray.experiment.config import Experiment


@dataclass(frozen=True)
class Stub:
    """All that a rule knows about a trial."""

    trial_id: str


class StudyScheduler(FIFOScheduler):
    """Decides by a rule of Ray Tune. However often the study is resumed, the rule sees each result once."""

    def __init__(self, experiment: Experiment):
        super().__init__()
        self.rule, self._metric = make_rule(experiment), experiment.search.metric
        self._controller = None  # Tune's, once it has started
        self._trials: dict[int, Any] = {}  # Tune's, by number
        self._stubs: dict[int, Stub] = {}
        self._decisions: dict[int, dict[int, str]] = {}  # by number and epoch

    def __deepcopy__(self, memo):
        return self  # Tune copies its configuration, but the study has one scheduler

    def __reduce__(self):
        return object, ()  # Tune saves its configuration for `Tuner.restore`, which is never called

    def judge(self, number: int, epoch: int, value: float) -> str:
        """Whether a trial continues after the result of an epoch: CONTINUE or STOP."""
        decided = self._decisions.setdefault(number, {})
        if self.rule is None or not math.isfinite(value):
            return self.CONTINUE
        if number not in self._stubs:
            self._stubs[number] = Stub(trial_id=f"trial-{number:04d}")
            self.rule.on_trial_add(None, self._stubs[number])
        if epoch not in decided:
            decided[epoch] = self.rule.on_trial_result(
                None, self._stubs[number], {"epoch": epoch, self._metric: value}
            )
        return decided[epoch]

    def stopped_at(self, number: int) -> int | None:
        """The epoch after which the rule has stopped a trial; None if it has not."""
        decided = self._decisions.get(number, {})
        return min((epoch for epoch, decision in decided.items() if decision == self.STOP), default=None)

    def states(self) -> dict[int, str]:
        """Tune's state of each trial that this driver has started, by number."""
        return {number: trial.status for number, trial in self._trials.items()}

    def started(self) -> tuple[int, ...]:
        """The numbers of Tune's trials that have not ended: pending or running."""
        return tuple(number for number, trial in self._trials.items() if not trial.is_finished())

    def is_running(self, number: int) -> bool:
        """Whether one of Tune's trials has a process, which can end the trial."""
        trial = self._trials[number]
        return trial.status == trial.RUNNING

    def stop(self, number: int) -> None:
        """Makes Tune stop a trial without a process; Tune calls its callbacks before this method returns."""
        trial = self._trials[number]
        if not trial.is_finished():
            self._controller.stop_trial(trial)

    def on_trial_add(self, tune_controller, trial) -> None:
        self._controller = tune_controller
        self._trials[trial.config["number"]] = trial

    def on_trial_result(self, tune_controller, trial, result: dict) -> str:
        if self._metric not in result:
            return self.CONTINUE
        return self.judge(trial.config["number"], result["epoch"], result[self._metric])


def make_rule(experiment: Experiment):
    """The rule that `search.scheduler` names; None for none.

    To add a scheduler, add it here and its name to `config.Search.scheduler`. It must decide from results
    alone.
    """
    search = experiment.search
    if search.scheduler == "asha":
        return ASHAScheduler(
            metric=search.metric, mode="max", time_attr="epoch", max_t=experiment.train.epochs + 1,
            grace_period=search.grace_epochs, reduction_factor=search.reduction_factor,
        )  # fmt: skip
    if search.scheduler == "median":
        return MedianStoppingRule(
            metric=search.metric, mode="max", time_attr="epoch", grace_period=search.grace_epochs,
            min_time_slice=math.inf,  # else it would pause trials, which Tune has no checkpoints of
        )  # fmt: skip
    return None
