"""The driver's side of MLflow: it notes which runs MLflow must have, and one background thread delivers them.

Training never waits for the server. The thread retries failed deliveries. The journals keep the points that
are not delivered by the end of a study, and `deit-ray sync` delivers them.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from deit_ray import hints, storage
from deit_ray.cluster.phase import show_phase
from deit_ray.errors import UnavailableError
from deit_ray.experiment.config import Experiment
from deit_ray.outcome import BAD_IMAGES, Outcome
from deit_ray.results.folders import JOURNAL
from deit_ray.results.journal import iterate_segments
from deit_ray.terminal.format import counted
from deit_ray.tracking.address import note_on_uri, shown, tracking_uri
from deit_ray.tracking.datasets import Dataset
from deit_ray.tracking.delivery import Delivery
from deit_ray.tracking.model_server import ModelServer
from deit_ray.tracking.model_state import Weights
from deit_ray.tracking.reasons import reason_of
from deit_ray.tracking.server import Deleted
from deit_ray.tracking.tracked import Desired, Ending, Run
from deit_ray.tracking.view import View

# between deliveries of a running trial's points: the cost of a request hardly depends on its size
POLL_S = 20.0
PAUSE_S = (1.0, 30.0)  # between attempts while the server does not answer: the first pause, and the longest
# if a request fails sooner than this, a person is warned only if the next attempt fails too
HICCUP_S = 5.0
PATIENCE_S = 20.0  # longest wait at the end of a study while no delivery succeeds
LIMIT_S = 300.0  # longest wait at the end of a study while deliveries succeed
HASTE_S = 5.0  # longest wait if the study ends by Ctrl-C or an error


class Tracker:
    """Delivers runs to MLflow. A context manager: at its end it waits a while for pending deliveries.

    Args:
        uri: MLflow's tracking URI.
        experiment: MLflow's name of the experiment.
        artifacts: folder of the artifacts when the store is a local database.
        warn: shows a person a message, such as that tracking is behind.
    """

    def __init__(self, uri: str, experiment: str, artifacts: str | None, warn: Callable[[str], None]):
        self.uri, self.warn = shown(uri), warn
        self.server = ModelServer(uri, experiment, artifacts, self._begin_request)
        self.delivery = Delivery(self.server, self._warn_if_heard)
        self.contact = Contact(self.uri, self._warn_if_heard)
        self.runs = Runs()
        self.started = 0
        self.root: Run | None = None  # the study's run, or the only one
        self.kept = KeptTrials()
        self.wake, self.closing, self.stopped = threading.Event(), threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self.thread.start()

    @classmethod
    def of(cls, experiment: Experiment, console, folder: str) -> "Tracker":
        """The tracker of a study or run, whose folder has a URI."""
        results = storage.absolute(experiment.results.uri)
        artifacts = storage.join(results, "mlruns")
        if note := note_on_uri(experiment):
            console.begin(note)
        uri = tracking_uri(experiment, folder)
        return cls(uri, experiment.tracking.experiment, artifacts, console.warn)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind, *exception) -> None:
        if self.stopped.is_set():
            return
        left = self.finish(PATIENCE_S, LIMIT_S) if kind is None else self.finish(HASTE_S, HASTE_S)
        if left:
            self.warn(
                f"MLflow at {self.uri} does not have everything: {describe_left(left)}; "
                f"they are kept in the journals; deliver them with: {sync_command(self.root)}"
            )

    def start_run(
        self,
        name: str,
        tags: dict[str, str],
        params: dict[str, str],
        folder: str,
        parent: Run | None = None,
        journal: bool = True,
        started_ms: int | None = None,
        datasets: tuple[Dataset, ...] = (),
        view: View | None = None,
    ) -> Run:
        """Notes that MLflow must have a run. The run is created there, unless it exists already.

        Args:
            name: name of the run in MLflow's list.
            tags, params: tags and parameters of the run. A tag without a dot in its name is one of deit_ray.
            folder: URI of the run's results; its experiment.yaml becomes an artifact, its journal the curves.
            parent: the study's run, for a trial.
            journal: whether the folder has a journal.
            started_ms: when the run began, in ms since 1970, if that was not now.
            datasets: the data sets that the run reads.
            view: how MLflow shows the study whose own run it is.
        """
        tags = {(key if "." in key else f"deit_ray.{key}"): value for key, value in tags.items()}
        params = {key: str(value) for key, value in params.items()}
        uri = storage.join(folder, JOURNAL) if journal else None
        tags["deit_ray.folder"] = folder
        started = started_ms or now_ms()
        run = Run(Desired(name, folder, tags, params, uri, started, datasets=datasets, view=view), parent)
        self.runs.add(run)
        self.started += 1
        self.root = self.root or parent or run
        self.wake.set()
        return run

    def describe_run(self, run: Run, text: str) -> None:
        """Notes the description that MLflow must show of a run, unless a person has changed it there.

        It is sent with the run's next delivery: of a run that has not ended, at most every `POLL_S` seconds.

        Args:
            text: Markdown of at most 8,000 characters.
        """
        self.runs.describe(run, text)

    def end_run(
        self,
        run: Run,
        outcome: Outcome,
        folder: str,
        *files: str,
        metrics: dict[str, float] | None = None,
        ended_ms: int | None = None,
        tags: dict[str, str] | None = None,
        model: Weights | None = None,
        best: Run | None = None,
    ) -> None:
        """Notes that a run must be closed, with the rest of its journal, its artifacts and its model.

        Args:
            outcome: how it ended.
            folder: URI of the folder with the files.
            files: names of further artifacts. A file that does not exist is left out.
            metrics: last values that are in no journal.
            ended_ms: when the run ended, in ms since 1970, if that was not now.
            tags: tags that were not known when the run began, by their whole names.
            model: the best student of a run that has finished.
            best: the ended run of a study's best trial, whose model is registered under the study's name.
        """
        uris = tuple(storage.join(folder, file) for file in dict.fromkeys((BAD_IMAGES, *files)))
        ending = Ending(outcome, uris, metrics or {}, ended_ms or now_ms(), tags or {}, model, best)
        self.runs.end(run, ending)
        self.wake.set()

    def finish(
        self, patience_s: float, limit_s: float, on_progress: Callable[[int, int], None] | None = None
    ) -> list[Run]:
        """Waits until everything is delivered, and stops; returns the runs that are not delivered completely.

        Args:
            patience_s: how long to wait while no delivery succeeds.
            limit_s: how long to wait at most.
            on_progress: called from time to time with the numbers of delivered runs and of all runs.
        """
        self.closing.set()
        self.wake.set()
        begin = since = shown = time.monotonic()
        answers = self.server.answers
        while (
            self.thread.is_alive()
            and not self.contact.needs_person
            and time.monotonic() - since < patience_s
            and time.monotonic() - begin < limit_s
        ):
            self.thread.join(0.1)
            if self.server.answers != answers:
                answers, since = self.server.answers, time.monotonic()
            if on_progress and time.monotonic() - shown > 2:
                shown = time.monotonic()
                on_progress(self.started - len(self.runs.pending()), self.started)
        self.stopped.set()  # a thread that hangs in a request ends once the request returns
        return self.runs.pending()

    @property
    def has_changed(self) -> bool:
        """Whether a delivery has changed something in MLflow."""
        return self.delivery.changes > 0

    @property
    def last_error(self) -> str | None:
        """The last failure of a delivery, in one line."""
        return self.contact.last_error

    # The methods below run in the delivery thread.

    def _deliver(self) -> None:
        pause_s = PAUSE_S[0]
        show_phase("tracking")
        while not self.stopped.is_set():
            self.wake.clear()
            closing = self.closing.is_set()  # read before the journals, which may grow until it is set
            if closing:
                self.runs.take_grown()
            failed = self._deliver_round(closing)
            show_phase("tracking")
            self.runs.tidy(failed)
            self.contact.failing.intersection_update(self.runs.pending())
            if not failed and self.kept.deliver_lost(self.root):
                continue
            if failed:
                self._pause(pause_s, closing)
                pause_s = min(2 * pause_s, PAUSE_S[1])
            elif closing:
                return
            else:
                pause_s = PAUSE_S[0]
                self.wake.wait(self.runs.until_due_s())

    def _pause(self, pause_s: float, closing: bool) -> None:
        if closing:
            self.stopped.wait(min(pause_s, 1.0))
        else:  # random, so that many drivers do not retry at the same time
            self.closing.wait(pause_s * random.uniform(0.5, 1))

    def _deliver_round(self, closing: bool) -> Run | None:
        """Delivers what each run has so far. A failure ends the round, and the failed run is returned."""
        for run in self.runs.pending():
            begin = time.monotonic()
            if not closing and run.desired.ending is run.closed and begin - run.read_at < POLL_S:
                continue  # another run has woken the thread
            try:
                self.delivery.deliver(run)
            except Stopped:
                return run
            except Exception as error:  # of server, network or disk: the journals keep the data
                self.contact.note_failure(run, error, time.monotonic() - begin)
                return run
            self.contact.note_success(run)
            self.runs.note_delivered(run, begin, closing)
        return None

    def _warn_if_heard(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal is closed; deliveries continue
            self.warn(text)

    def _begin_request(self) -> None:
        if self.stopped.is_set():
            raise Stopped
        show_phase("delivery")


class Stopped(Exception):
    """The tracker has stopped: no more requests are sent."""


class Runs:
    """The runs that may not be fully delivered. The driver and the delivery thread share them."""

    def __init__(self):
        self.live: list[Run] = []
        self.delivered: list[Run] = []  # with their ends; a worker may measure on for a moment after the end
        self.lock = threading.RLock()

    def collecting(self) -> contextlib.AbstractContextManager:
        """While it is entered, no round of deliveries begins, so the end of an ended run is known with its
        start: else the run would be reopened in MLflow, and closed again with another time."""
        return self.lock

    def add(self, run: Run) -> None:
        """Adds a run. If a trial starts again before its end was delivered, its new run replaces the old."""
        with self.lock:
            folder = run.desired.folder
            self.live = [other for other in self.live if other.desired.folder != folder]
            self.delivered = [other for other in self.delivered if other.desired.folder != folder]
            self.live.append(run)

    def end(self, run: Run, ending: Ending) -> None:
        self._change(run, ending=ending)

    def describe(self, run: Run, text: str) -> None:
        if text != run.desired.description:
            self._change(run, description=text)

    def _change(self, run: Run, **values) -> None:
        with self.lock:
            run.desired, run.is_pending = replace(run.desired, **values), True
            if run not in self.live:  # it was delivered with its end; now there is more
                self.live.append(run)

    def pending(self) -> list[Run]:
        with self.lock:
            return [run for run in self.live if run.is_pending]

    def note_delivered(self, run: Run, begin: float, closing: bool) -> None:
        """Notes that a run was delivered as far as it was at `begin`, by time.monotonic().

        Args:
            closing: whether nothing more is added to any run.
        """
        with self.lock:
            run.read_at = begin
            run.is_pending = not closing and not run.is_complete

    def tidy(self, failed: Run | None) -> None:
        """Removes delivered runs. Moves a failed run to the end, so that it does not delay the others."""
        with self.lock:
            self.delivered += [run for run in self.live if not run.is_pending]
            self.live = [run for run in self.live if run.is_pending]
            if failed in self.live:
                self.live.remove(failed)
                self.live.append(failed)

    def take_grown(self) -> None:
        """Makes delivered runs whose journals have grown since pending again."""
        with self.lock:
            grown = [run for run in self.delivered if run not in self.live and has_grown(run)]
            for run in grown:
                run.is_pending = True
            self.live += grown
            self.delivered = []

    def until_due_s(self) -> float:
        """Seconds until a run must be delivered again."""
        now = time.monotonic()
        with self.lock:
            return max(0.0, min((run.read_at for run in self.live), default=now) + POLL_S - now)


class KeptTrials:
    """Trials whose runs were delivered in full. They are delivered again if MLflow turns out to have another
    run of the study than then, as a server does whose database was lost."""

    def __init__(self):
        self.kept: list[tuple[str | None, Callable[[], None]]] = []

    def add(self, study_run_id: str | None, deliver: Callable[[], None]) -> None:
        """Adds a trial.

        Args:
            study_run_id: MLflow's id of the study's run below which the trial's run was delivered.
            deliver: starts and ends the trial's run. The delivery thread calls it.
        """
        self.kept.append((study_run_id, deliver))

    def deliver_lost(self, root: Run | None) -> bool:
        """Delivers the trials again whose study has another run in MLflow; returns whether there are any.

        Args:
            root: the study's run.
        """
        if not self.kept or root.delivered.found is None:
            return False
        lost = 0
        while self.kept:
            run_id, deliver = self.kept.pop()  # the driver may add trials meanwhile
            if run_id != root.record.run_id:
                deliver()
                lost += 1
        return lost > 0


def has_grown(run: Run) -> bool:
    """Whether a run's journal has more than was delivered, or cannot be read: its delivery then says why."""
    if run.desired.journal is None:
        return False
    try:
        return any(True for _ in iterate_segments(run.desired.journal, run.segments))
    except UnavailableError:
        return True


class Contact:
    """Warns a person when tracking falls behind, and says when it has caught up: each once.

    Args:
        uri: MLflow's tracking URI.
        warn: shows a person a message.

    Attributes:
        failing: runs whose last delivery failed.
        failures: number of failures since the last moment without a failing run.
        last_error: the last failure, in one line.
        needs_person: whether that failure stays until a person acts.
    """

    def __init__(self, uri: str, warn: Callable[[str], None]):
        self.uri, self.warn = uri, warn
        self.failing: set[Run] = set()
        self.failures, self.is_behind = 0, False
        self.last_error: str | None = None
        self.needs_person = False

    def note_failure(self, run: Run, error: Exception, took_s: float) -> None:
        self.failing.add(run)
        self.failures += 1
        self.last_error, self.needs_person = reason_of(error), isinstance(error, Deleted)
        if not self.is_behind and (self.failures > 1 or took_s > HICCUP_S):
            self.is_behind = True
            self.warn(
                f"tracking is behind: MLflow at {self.uri} does not take deliveries ({self.last_error}); "
                "training does not wait, and deliveries are retried"
            )

    def note_success(self, run: Run) -> None:
        self.failing.discard(run)
        self.needs_person = False
        if self.failing:
            return
        self.failures = 0
        if self.is_behind:
            self.is_behind = False
            self.warn(f"tracking caught up: MLflow at {self.uri} takes deliveries again")


def describe_left(left: list[Run]) -> str:
    """The number of runs and points that are not delivered, in words."""
    journals = [(run.desired.journal, run.segments) for run in left]
    unread = [iterate_segments(uri, first) for uri, first in journals if uri and storage.is_local(uri)]
    points = sum(len(segment) for segments in unread for segment in segments)
    return f"{counted(len(left), 'run')} with {counted(points, 'point')} not delivered"


def sync_command(run: Run) -> str:
    """The command that delivers the rest of a study, or of a single run."""
    results, _, name = run.desired.folder.rpartition("/")
    return hints.command("sync", name, results=results)


def now_ms() -> int:
    return time.time_ns() // 1_000_000
