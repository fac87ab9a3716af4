"""The records in a study's database. Only this file knows the names of Optuna's user attributes."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime

import optuna
from optuna.trial import FrozenTrial, TrialState

from deit_ray.outcome import Outcome
from deit_ray.study.optuna_private import open_trial, read_trial

# of a study
EXPERIMENT, ENDED, SPENT, TESTED, TUNE = "experiment", "ended", "spent", "test", "tune"
LARGEST = "largest_class"
# of a trial
IMAGES, SIGNATURE = "images", "signature"
TIME = "time/"  # before an epoch
TIMES = "times"  # of all epochs: earlier versions wrote them again at each value
# of both
OUTCOME = "outcome"

TESTED_TRIAL = "trial"  # the key beside the test metrics that names the trial

AsOne = Callable[[], contextlib.AbstractContextManager[None]]  # see `StudyDatabase.as_one`


@dataclass
class Spent:
    """Time that a study has taken, over all its resumes.

    Attributes:
        wall_s: wall time in which a driver ran it.
        gpu_s: GPU time of all its trials together.
    """

    wall_s: float = 0.0
    gpu_s: float = 0.0


@dataclass(frozen=True)
class Evaluated:
    """The metrics of the best trial's model on the test images, by name, and that trial's number."""

    trial: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class TrialRecord:
    """A trial as the database had it when it was read.

    Attributes:
        frozen: Optuna's own record.
    """

    frozen: FrozenTrial

    @property
    def number(self) -> int:
        return self.frozen.number

    @property
    def params(self) -> dict:
        """The searched values by dotted key."""
        return self.frozen.params

    @property
    def state(self) -> TrialState:
        return self.frozen.state

    @property
    def value(self) -> float | None:
        """The value of an ended trial: its best one if it finished, its last one if it was stopped early."""
        return self.frozen.value

    @property
    def values(self) -> dict[int, float]:
        """The searched metric by epoch."""
        return self.frozen.intermediate_values

    @property
    def epoch(self) -> int:
        """The last epoch that has a value; 0 if none has."""
        return max(self.values, default=0)

    @property
    def best(self) -> float | None:
        """The value by which a trial is ranked: Optuna's own of a finished trial, else the largest so far."""
        if self.state == TrialState.COMPLETE:
            return self.value
        return max(self._finite, default=None)

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the value by which a trial is ranked; of equal ones, the latest."""
        return max((epoch for epoch, value in self.values.items() if value == self.best), default=None)

    @property
    def choices(self) -> int:
        """The number of evaluations from which the best one was chosen."""
        return max(1, len(self._finite))

    @property
    def _finite(self) -> list[float]:
        return [value for value in self.values.values() if math.isfinite(value)]

    @property
    def last(self) -> float | None:
        """The value of the last epoch."""
        return self.values.get(self.epoch)

    @property
    def outcome(self) -> Outcome | None:
        """The outcome that the driver noted; the driver notes it before it ends the trial."""
        text = self.frozen.user_attrs.get(OUTCOME)
        return Outcome.parse(text) if text else None

    @property
    def ending(self) -> Outcome:
        """How an ended trial ended: by its outcome, or by its state if no outcome was noted."""
        known = {
            TrialState.COMPLETE: Outcome.finished(),
            TrialState.PRUNED: Outcome.stopped_early(self.epoch),
            TrialState.FAIL: Outcome.failed("it never began"),
        }
        return self.outcome or known[self.state]

    @property
    def images(self) -> float | None:
        """The number of images on which its metric is measured."""
        return self.frozen.user_attrs.get(IMAGES)

    @property
    def times(self) -> dict[int, float]:
        """When Optuna got each value, by epoch: seconds since 1970."""
        attributes = self.frozen.user_attrs
        noted = {key[len(TIME) :]: value for key, value in attributes.items() if key.startswith(TIME)}
        return {int(epoch): seconds for epoch, seconds in (attributes.get(TIMES, {}) | noted).items()}

    @property
    def signature(self) -> str | None:
        """The signature of its failure, equal for failures at the same place in the code; see `Failure`."""
        return self.frozen.user_attrs.get(SIGNATURE)

    @property
    def started(self) -> datetime | None:
        return self.frozen.datetime_start

    @property
    def ended(self) -> datetime | None:
        return self.frozen.datetime_complete


class StudyRecord:
    """The database of a study, by typed properties. Only the study's driver may set them.

    A driver can be killed between any two writes. So the time of a value is written before the value, and the
    outcome of a trial before its state: a trial whose state has changed is complete.

    Attributes:
        optuna: the Optuna study.
        as_one: see `StudyDatabase.as_one`.
    """

    def __init__(self, study: optuna.Study, as_one: AsOne = contextlib.nullcontext):
        self.optuna, self.as_one = study, as_one

    @property
    def made_with(self) -> dict | None:
        """The experiment that the study was last driven with, as `Experiment.as_dict` gives it."""
        return self.optuna.user_attrs.get(EXPERIMENT)

    @made_with.setter
    def made_with(self, experiment: dict) -> None:
        self.optuna.set_user_attr(EXPERIMENT, experiment)

    @property
    def outcome(self) -> Outcome | None:
        """How the study ended; None before its end."""
        text = self.optuna.user_attrs.get(OUTCOME)
        return Outcome.parse(text) if text else None

    @outcome.setter
    def outcome(self, outcome: Outcome | None) -> None:
        self.optuna.set_user_attr(OUTCOME, outcome.text if outcome else None)

    @property
    def ended(self) -> str | None:
        """Why the study has ended, in words; None before its end."""
        return self.optuna.user_attrs.get(ENDED)

    @ended.setter
    def ended(self, reason: str | None) -> None:
        self.optuna.set_user_attr(ENDED, reason)

    @property
    def spent(self) -> Spent:
        return Spent(**self.optuna.user_attrs.get(SPENT, {}))

    @spent.setter
    def spent(self, spent: Spent) -> None:
        self.optuna.set_user_attr(SPENT, asdict(spent))

    @property
    def tested(self) -> Evaluated | None:
        """The best trial's metrics on the test images; None if they were not measured."""
        stored = dict(self.optuna.user_attrs.get(TESTED, {}))
        return Evaluated(stored.pop(TESTED_TRIAL), stored) if stored else None

    @tested.setter
    def tested(self, tested: Evaluated) -> None:
        self.optuna.set_user_attr(TESTED, {TESTED_TRIAL: tested.trial, **tested.metrics})

    @property
    def largest(self) -> dict[str, float]:
        """The accuracy of always answering the largest class, by split; empty if it is not known."""
        return self.optuna.user_attrs.get(LARGEST, {})

    @largest.setter
    def largest(self, shares: dict[str, float]) -> None:
        self.optuna.set_user_attr(LARGEST, shares)

    @property
    def tune_states(self) -> dict[int, str]:
        """Ray Tune's state of each trial when its driver ended, by number."""
        return {int(number): state for number, state in self.optuna.user_attrs.get(TUNE, {}).items()}

    def add_tune_states(self, states: dict[int, str]) -> None:
        known = self.tune_states | states
        self.optuna.set_user_attr(TUNE, {str(number): state for number, state in known.items()})

    def trial(self, number: int) -> TrialRecord:
        """One trial as the database has it now; it reads no other trial."""
        return TrialRecord(read_trial(self.optuna, number))

    def records(self, *states: TrialState) -> list[TrialRecord]:
        """All trials by number, or those in some states."""
        return [TrialRecord(trial) for trial in self.optuna.get_trials(deepcopy=False, states=states or None)]

    def report(self, number: int, epoch: int, value: float) -> None:
        """Notes a value of a running trial, and its time, by which a resume sorts all values.

        A second value for an epoch is ignored.
        """
        trial = self.trial(number)
        if epoch in trial.values:
            return
        live = open_trial(self.optuna, number)
        with self.as_one():
            live.set_user_attr(f"{TIME}{epoch}", time.time())
            live.report(value, epoch)

    def note_images(self, number: int, images: float) -> None:
        """Notes the number of images on which a running trial's metric is measured."""
        open_trial(self.optuna, number).set_user_attr(IMAGES, images)

    def reopen(self, number: int) -> None:
        """Forgets the outcome of a running trial, whose driver was killed before it ended the trial."""
        open_trial(self.optuna, number).set_user_attr(OUTCOME, None)

    def end_trial(
        self, number: int, outcome: Outcome, value: float | None = None, signature: str | None = None
    ) -> None:
        """Ends a running trial.

        Args:
            value: the value that Optuna ranks, if the trial finished.
            signature: signature of its failure, if `budget.same_failure` counts the failure.
        """
        live = open_trial(self.optuna, number)
        with self.as_one():
            live.set_user_attr(OUTCOME, outcome.text)
            if signature is not None:
                live.set_user_attr(SIGNATURE, signature)
            self.optuna.tell(number, value, state=TrialState[outcome.optuna_state])
