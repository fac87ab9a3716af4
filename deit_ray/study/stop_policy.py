"""Decides which trials of a study end, and how: a policy that starts, reads and writes nothing.

The `Driver` and its `Trials` carry out the decisions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deit_ray.errors import Interrupted, UnavailableError
from deit_ray.experiment.config import Experiment
from deit_ray.outcome import Outcome
from deit_ray.study.budget import exceeded
from deit_ray.study.records import Spent, TrialRecord

if TYPE_CHECKING:
    from deit_ray.trial.failure import Failure

BY_A_PERSON = "stopped by a person"
ALL_ENDED = "all trials have ended"


@dataclass(frozen=True)
class OpenTrials:
    """Trials that have not ended.

    Attributes:
        waiting: numbers of trials that wait to be continued.
        started: numbers of Ray Tune's trials, pending or running.
    """

    waiting: tuple[int, ...] = ()
    started: tuple[int, ...] = ()


@dataclass(frozen=True)
class Orders:
    """Orders to the driver about trials that have not ended.

    Attributes:
        end: numbers of waiting trials to end now, as cancelled.
        ask: numbers of started trials to ask to end. `StopPolicy.after_completion` then decides how they end.
    """

    end: tuple[int, ...] = ()
    ask: tuple[int, ...] = ()


@dataclass(frozen=True)
class End:
    """The trial ends."""

    outcome: Outcome


@dataclass(frozen=True)
class Continue:
    """The trial, whose process died as `death` says, resumes from `step`, 0 without a checkpoint."""

    death: str
    step: int


@dataclass(frozen=True)
class LeaveOpen:
    """The trial stays as it is, for a resume."""


@dataclass(frozen=True)
class Halt:
    """The whole study stops because of `error`, and can be resumed."""

    error: Exception


Decision = End | Continue | LeaveOpen | Halt


class StopPolicy:
    """Decides which trials end, and how, from budgets, requests and failures.

    Attributes:
        ending: why the study ends before all its trials have run; None while it does not end.
        halted: the error that stops the study until a resume; None without such an error.
        asked: by number, the outcome of a trial that was asked to end; None leaves it open for a resume.
        deaths: by number, how often a trial's process died in a row without a new checkpoint, and the step of
            its last checkpoint.
    """

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.ending: str | None = None
        self.halted: Exception | None = None
        self.asked: dict[int, Outcome | None] = {}
        self.deaths: dict[int, tuple[int, int]] = {}

    @property
    def is_closed(self) -> bool:
        """Whether no more trials may start."""
        return self.ending is not None or self.halted is not None

    def check_budgets(self, trials: list[TrialRecord], spent: Spent, open_trials: OpenTrials) -> Orders:
        """Ends the study once a budget is used up."""
        if self.ending is not None:
            return Orders()
        reason = exceeded(self.experiment, trials, spent)
        return self._end_study(reason, open_trials) if reason else Orders()

    def stop(self, number: int | None, open_trials: OpenTrials) -> Orders:
        """Does a person's request: cancels a trial, or for None ends the study."""
        if number is None:
            return self._end_study(BY_A_PERSON, open_trials)
        return Orders(
            end=tuple(known for known in open_trials.waiting if known == number),
            ask=self._ask((known for known in open_trials.started if known == number), Outcome.cancelled()),
        )

    def halt(self, error: Exception, open_trials: OpenTrials) -> Orders:
        """Stops the study because of an error; its trials stay open. The first error counts."""
        self.halted = self.halted or error
        return Orders(ask=self._ask(open_trials.started, None))

    def after_completion(self, number: int, epoch: int) -> Decision:
        """Decides about a trial that finished, that the scheduler stopped, or that was asked to end.

        Args:
            epoch: the last epoch that it reported; 0 for none.
        """
        if epoch >= self.experiment.train.epochs:
            return End(Outcome.finished())
        if number in self.asked:
            return self._as_asked(number)
        if epoch:
            return End(Outcome.stopped_early(epoch))
        return End(Outcome.failed("it reported nothing"))

    def after_failure(self, number: int, failure: Failure) -> Decision:
        """Decides about a trial that raised an error."""
        if number in self.asked:
            return self._as_asked(number)
        if failure.kind == "unavailable":
            return Halt(UnavailableError(f"trial {number}: {failure.reason}"))
        return End(Outcome.failed(failure.reason))

    def after_death(self, number: int, death: str, saved: int, ray_is_alive: bool) -> Decision:
        """Decides about a trial whose process, node or owner died. It continues, up to a number of deaths.

        Args:
            death: says that it died, see `describe_death`.
            saved: the step of its last checkpoint, 0 if it has none.
        """
        if number in self.asked:
            return self._as_asked(number)
        deaths, saved_before = self.deaths.get(number, (0, -1))
        deaths = deaths + 1 if saved == saved_before else 1
        self.deaths[number] = (deaths, saved)
        if not ray_is_alive:
            return Halt(Interrupted("Ray is gone"))
        if deaths > self.experiment.train.max_failures:
            return End(Outcome.failed(f"{death} {deaths} times in a row at step {saved}"))
        if not self.is_closed:
            return Continue(death, saved)
        return End(Outcome.cancelled()) if self.halted is None else LeaveOpen()

    def study_outcome(self, reason: str, has_best: bool) -> Outcome:
        """How the study itself ends; `reason` says why, `has_best` whether a trial has finished."""
        if reason == BY_A_PERSON:
            return Outcome.cancelled()
        return Outcome.finished() if has_best else Outcome.failed("no trial finished")

    def _end_study(self, reason: str, open_trials: OpenTrials) -> Orders:
        """Ends the study: no more trials start, and open trials are cancelled."""
        self.ending = reason
        return Orders(open_trials.waiting, self._ask(open_trials.started, Outcome.cancelled()))

    def _ask(self, numbers: Iterable[int], outcome: Outcome | None) -> tuple[int, ...]:
        """Asks trials to end, each once; returns the numbers of the trials that were not asked before."""
        new = tuple(number for number in numbers if number not in self.asked)
        self.asked |= dict.fromkeys(new, outcome)
        return new

    def _as_asked(self, number: int) -> Decision:
        outcome = self.asked[number]
        return End(outcome) if outcome else LeaveOpen()
