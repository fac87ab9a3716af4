"""A whole study in virtual time: one loop calls a method's searcher and scheduler as Ray Tune does.

The order is that of `TuneController.step` (ray/tune/execution/tune_controller.py of Ray 2.60): first trials
are proposed while places are free; then one event of one trial is handled to its end, its stop included;
then trials are proposed again. After its last epoch a trial has one more event, the end of its process.
"""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from bench.searching.problems import Problem

CONCURRENT = 4


class Method(ABC):
    """A way to search, with its own searcher and scheduler.

    A method that promotes a paused trial proposes its number again; the trial then continues after its last
    epoch.
    """

    @abstractmethod
    def suggest(self) -> tuple[int, dict] | None:
        """The number and the values of the next trial; None while the method has none."""

    @abstractmethod
    def report(self, number: int, epoch: int, value: float) -> bool:
        """A running trial has evaluated its model; returns whether the trial's process ends now."""

    @abstractmethod
    def end(self, number: int) -> None:
        """The process of a trial has ended after its last epoch."""


class Clock(ABC):
    """Decides which of the running trials has the next event."""

    @abstractmethod
    def begin(self, number: int, pace: float) -> None:
        """A trial begins or continues; each of its epochs takes `pace`."""

    @abstractmethod
    def next(self) -> int | None:
        """The number of the trial with the next event; None at the end."""

    @abstractmethod
    def end(self, number: int) -> None:
        """A trial has ended, or is paused."""


class VirtualClock(Clock):
    """Every trial has an event when its next epoch would be over."""

    def __init__(self):
        self.now, self.events, self.paces = 0.0, [], {}

    def begin(self, number: int, pace: float) -> None:
        self.paces[number] = pace
        heapq.heappush(self.events, (self.now + pace, number))

    def next(self) -> int | None:
        while self.events:
            self.now, number = heapq.heappop(self.events)
            if number in self.paces:
                heapq.heappush(self.events, (self.now + self.paces[number], number))
                return number
        return None

    def end(self, number: int) -> None:
        del self.paces[number]


class RecordedClock(Clock):
    """The events have the order in which they came before, such as in a real study.

    Args:
        numbers: the trial of each event.
    """

    def __init__(self, numbers: list[int]):
        self.numbers: Iterator[int] = iter(numbers)

    def begin(self, number: int, pace: float) -> None:
        pass

    def next(self) -> int | None:
        return next(self.numbers, None)

    def end(self, number: int) -> None:
        pass


@dataclass
class Progress:
    """How far a trial has come.

    Attributes:
        observed: what it reports after each epoch.
        true: the same without noise.
        stopped: whether its process ended before its last epoch.
    """

    params: dict
    observed: np.ndarray
    true: np.ndarray
    epoch: int = 0
    stopped: bool = False


@dataclass
class Virtual:
    """A study that has ended.

    Attributes:
        epochs: the epochs that all trials have spent.
        reached: whether a trial came within 1% of the best reachable value; the study ended there.
        trials: by number.
    """

    epochs: int = 0
    reached: bool = False
    trials: dict[int, Progress] = field(default_factory=dict)


def run_study(
    method: Method,
    problem: Problem,
    most_epochs: float,
    clock: Clock | None = None,
    until_reached: bool = True,
) -> Virtual:
    """Runs a study until a trial is good enough or the epochs are spent.

    Args:
        clock: by default a virtual one.
        until_reached: False lets the study run on after a good trial.
    """
    study, running, clock = Virtual(), set(), clock or VirtualClock()
    while study.epochs < most_epochs:
        _propose(method, problem, study, running, clock)
        number = clock.next()
        if number is None:
            break
        trial = study.trials[number]
        if trial.epoch == problem.epochs:
            method.end(number)
            ends = True
        else:
            value, true = trial.observed[trial.epoch], trial.true[trial.epoch]
            trial.epoch += 1
            study.epochs += 1
            ends = trial.stopped = method.report(number, trial.epoch, float(value))
            study.reached = study.reached or problem.is_reached(true)
        if ends:
            running.remove(number)
            clock.end(number)
        if study.reached and until_reached:
            break
    return study


def _propose(method: Method, problem: Problem, study: Virtual, running: set[int], clock: Clock) -> None:
    """Fills the free places with trials."""
    while len(running) < CONCURRENT and (proposed := method.suggest()) is not None:
        number, params = proposed
        if number not in study.trials:
            study.trials[number] = Progress(params, problem.observed(params), problem.true(params))
        study.trials[number].stopped = False
        running.add(number)
        clock.begin(number, problem.pace(params))
