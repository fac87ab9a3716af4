"""The observers of a study: at each event the driver calls one after the other.

`Resources` (resources.py) is another observer.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from deit_ray.errors import UnavailableError
from deit_ray.outcome import Kind, Outcome
from deit_ray.study.database import naming_database
from deit_ray.study.records import Evaluated, TrialRecord
from deit_ray.study.resume import Reconciled, Results
from deit_ray.study.study import Study
from deit_ray.study.sync import (
    delivered,
    describe_study,
    end_study,
    end_trial,
    save_report,
    start_study,
    start_trial,
)
from deit_ray.terminal.console import Console
from deit_ray.terminal.live import StudyView
from deit_ray.tracking.tracked import Run
from deit_ray.tracking.tracker import Tracker
from deit_ray.trial.described import Made
from deit_ray.trial.failure import Failure, describe_restart
from deit_ray.trial.run import warn_of_bad

DESCRIBE_S = 20.0  # least time between two descriptions of a study that runs
DESCRIBE_PART = 200  # a description takes at most one in so many seconds of the driver's time


@dataclass(frozen=True)
class TrialEnd:
    """How a trial ended.

    Attributes:
        value: the value of its best model, if it finished.
        failure: what is known about its failure, if it failed by its own fault.
    """

    number: int
    outcome: Outcome
    value: float | None = None
    failure: Failure | None = None


class Observer:
    """The events of a study. An observer overrides the methods that concern it."""

    def study_opened(self) -> None:
        """The driver holds the study and has not looked at its trials yet."""

    def study_started(self, found: list[Reconciled], total: int) -> None:
        """The driver has decided about the trials that it found; `total` trials will run."""

    def trial_kept(self, number: int) -> None:
        """The driver found a trial that had ended."""

    def trial_reopened(self, number: int) -> None:
        """The driver found a trial that had not ended; next it ends or continues the trial."""

    def results_found(self, number: int, results: Results) -> None:
        """The driver read `results` that a trial had measured and not reported before its process died."""

    def trial_started(self, number: int) -> None:
        """The process of a trial has started."""

    def trial_reported(self, number: int, result: dict) -> None:
        """A running trial has evaluated its model; `result` has the metrics by name."""

    def trial_left(self, number: int) -> None:
        """The process of a trial has ended; the trial itself may continue."""

    def trial_interrupted(self, number: int, death: str, step: int) -> None:
        """The process of a trial died, as `death` says; it resumes from `step`, 0 without a checkpoint."""

    def trial_ended(self, end: TrialEnd) -> None:
        """A trial has ended."""

    def time_passed(self, elapsed_s: float) -> None:
        """Some time has passed; called about once a second."""

    def study_ended(self, outcome: Outcome, best: TrialRecord | None) -> None:
        """The study has ended; `best` is its best trial, None if no trial has finished."""


class Database(Observer):
    """Optuna: the study's database, the only truth about the study."""

    def __init__(self, study: Study):
        self.study = study
        self.metric = study.experiment.search.metric
        self.images = f"{self.metric.split('/')[0]}/images"

    def study_opened(self) -> None:
        self.study.outcome = None

    def trial_reopened(self, number: int) -> None:
        self.study.reopen(number)

    def results_found(self, number: int, results: Results) -> None:
        for _, epoch, value in results:
            self.study.report(number, epoch, value)

    def trial_reported(self, number: int, result: dict) -> None:
        images = result.get(self.images)
        with self.study.as_one():
            self.study.report(number, result["epoch"], result[self.metric])
            if images and self.study.trial(number).images is None:
                self.study.note_images(number, images)

    def trial_ended(self, end: TrialEnd) -> None:
        signature = None
        if end.outcome.kind == Kind.FAILED and end.failure:
            signature = end.failure.signature
        self.study.end_trial(end.number, end.outcome, end.value, signature)

    def study_ended(self, outcome: Outcome, best: TrialRecord | None) -> None:
        self.study.outcome = outcome


class Tracking(Observer):
    """MLflow: a run for the study, and below it a run for each trial."""

    def __init__(self, study: Study, console: Console):
        self.study, self.console = study, console
        self.tracker: Tracker | None = None
        self.parent: Run | None = None
        self.made: Made | None = None
        self.runs: dict[int, Run] = {}  # of trials that have not ended
        self.has_news, self.describe_at = True, 0.0  # by time.monotonic()

    @contextlib.contextmanager
    def delivering(self) -> Iterator[None]:
        """Delivers in the background; at the end it waits a while for pending deliveries."""
        with Tracker.of(self.study.experiment, self.console, self.study.folder) as self.tracker:
            try:
                yield
            except BaseException:
                # where the database itself is gone, the description stays as it is
                with contextlib.suppress(UnavailableError), naming_database(self.study.folder):
                    self._describe(is_running=False)
                raise

    def study_opened(self) -> None:
        self.made = Made.read(self.study.folder, self.study.experiment)
        self.parent = start_study(self.tracker, self.study, self.made)

    def time_passed(self, elapsed_s: float) -> None:
        if self.has_news and time.monotonic() >= self.describe_at:
            self._describe(is_running=True)

    def trial_reported(self, number: int, result: dict) -> None:
        self.has_news = True

    def trial_kept(self, number: int) -> None:
        trial = self.study.trial(number)
        record = delivered(self.study, trial)
        if record is None:  # its driver was killed before that, or was of an earlier version
            self._deliver(trial, self.study.tested)
        else:
            deliver = partial(self._deliver, trial, self.study.tested)
            self.tracker.kept.add(record.parent_id, deliver)

    def trial_started(self, number: int) -> None:
        self.has_news = True
        self._open(number)

    def trial_ended(self, end: TrialEnd) -> None:
        self.has_news = True
        self._open(end.number)  # a trial can end before it starts
        self._close(end.number)

    def study_ended(self, outcome: Outcome, best: TrialRecord | None) -> None:
        tested, run = self.study.tested, None
        if tested is not None:  # only now that trial has its value on the test images
            run = self._deliver(self.study.trial(tested.trial), tested)
        if best is not None and (tested is None or tested.trial != best.number):
            run = self._deliver(best, tested)
        self._describe(is_running=False)
        save_report(self.study)
        end_study(self.tracker, self.study, self.parent, outcome, run)

    def _describe(self, is_running: bool) -> None:
        if self.parent is None:
            return
        begin = time.monotonic()
        describe_study(self.tracker, self.study, self.parent, is_running)
        took_s = time.monotonic() - begin
        self.has_news, self.describe_at = False, begin + max(DESCRIBE_S, DESCRIBE_PART * took_s)

    def _deliver(self, trial: TrialRecord, tested: Evaluated | None) -> Run:
        """Delivers a trial that has ended."""
        with self.tracker.runs.collecting():
            run = self._start(trial)
            end_trial(self.tracker, self.study, trial, run, tested)
        return run

    def _start(self, trial: TrialRecord) -> Run:
        return start_trial(self.tracker, self.study, trial, self.parent, self.made)

    def _open(self, number: int) -> None:
        if number not in self.runs:
            self.runs[number] = self._start(self.study.trial(number))

    def _close(self, number: int) -> None:
        end_trial(self.tracker, self.study, self.study.trial(number), self.runs.pop(number))


class Terminal(Observer):
    """The terminal: shows the study while it runs."""

    def __init__(
        self, study: Study, console: Console, device: str, concurrent: int, remarks: Sequence[str] = ()
    ):
        self.study, self.device, self.concurrent, self.remarks = study, device, concurrent, remarks
        self.warn = console.warn
        self.view = StudyView(console, study.name, study.experiment)

    def study_started(self, found: list[Reconciled], total: int) -> None:
        resumed = {trial.number: trial.text for trial in found if trial.action != "kept"}
        self.view.start(self.device, self.concurrent, total, resumed, self.remarks)

    def trial_started(self, number: int) -> None:
        self.view.trial_started(number, self.study.trial(number).params)

    def trial_reported(self, number: int, result: dict) -> None:
        self.view.trial_reported(number, result)

    def trial_interrupted(self, number: int, death: str, step: int) -> None:
        self.warn(f"trial {number}: {describe_restart(death, step)}")

    def trial_ended(self, end: TrialEnd) -> None:
        folder = self.study.trial_folder(end.number)
        self.view.trial_ended(end.number, end.outcome, self.study.trial(end.number).best)
        warn_of_bad(folder, lambda text: self.warn(f"trial {end.number}: {text}"))

    def study_ended(self, outcome: Outcome, best: TrialRecord | None) -> None:
        if best is not None:
            self.view.end(self.study.ended)

    def close(self) -> None:
        """Removes the live table from the terminal."""
        self.view.close()
