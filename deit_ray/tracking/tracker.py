"""The driver's side of MLflow: it notes what shall be there, and one thread in the background delivers it.

Training never waits for the server. What cannot be delivered now is tried again; what cannot be delivered until the end
of the study is in the journals, and `deit-ray sync` delivers it.
"""

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable

from deit_ray import storage
from deit_ray.cluster.phase import show_phase
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment
from deit_ray.outcome import Outcome
from deit_ray.results.folders import JOURNAL
from deit_ray.results.journal import iterate_segments
from deit_ray.tracking.delivery import Delivery, one_line
from deit_ray.tracking.tracked import Ending, Run

POLL_S = (
    20.0  # between deliveries of a running trial's points: what a request costs hardly depends on its size
)
PAUSE_S = (1.0, 30.0)  # between attempts while the server is away: at first, and at last
HICCUP_S = 5.0  # a failure that was quicker than this is tried again first, and told then
PATIENCE_S = 20.0  # how long the end of a study waits while nothing gets through
LIMIT_S = 300.0  # how long it waits while something does
HASTE_S = 5.0  # the same when the study ends by Ctrl-C or an error


class Tracker:
    """Delivers to MLflow. Use it as a context manager: leaving it waits for what is not delivered yet, a while.

    Args:
        uri: MLflow's tracking URI.
        experiment: MLflow's name of the experiment.
        artifacts: where artifacts go when the store is a local database.
        warn: tells a person that tracking is behind.
    """

    def __init__(self, uri: str, experiment: str, artifacts: str | None, warn: Callable[[str], None]):
        self.uri, self.warn = uri, warn
        self.delivery = Delivery(uri, experiment, artifacts, self._begin_request, self._tell)
        self.live: list[Run] = []
        self.lock = threading.Lock()  # of the list
        self.started = 0
        self.root: Run | None = None  # the study's, or the only one
        self.wake, self.closing, self.stopped = threading.Event(), threading.Event(), threading.Event()
        self.failing: set[Run] = set()
        self.failures, self.behind = 0, False
        self.last_error: str | None = None
        self.phase = ""
        self.thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self.thread.start()

    @classmethod
    def of(cls, experiment: Experiment, console) -> "Tracker":
        results = storage.absolute(experiment.results.uri)
        return cls(
            tracking_uri(experiment),
            experiment.tracking.experiment,
            storage.join(results, "mlruns"),
            console.warn,
        )

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind, *exception) -> None:
        if self.stopped.is_set():
            return
        left = self.finish(PATIENCE_S, LIMIT_S) if kind is None else self.finish(HASTE_S, HASTE_S)
        if left:
            self.warn(f"MLflow at {self.uri} has not got all: {self.describe_left(left)}; "
                      f"they are kept in the journals, and delivered by: {self._sync_command()}")  # fmt: skip

    def start_run(
        self,
        name: str,
        tags: dict[str, str],
        params: dict[str, str],
        folder: str,
        parent: Run | None = None,
        journal: bool = True,
        started_ms: int | None = None,
    ) -> Run:
        """Notes that a run shall be in MLflow, made there or found where it was made before.

        Args:
            name: what MLflow's list shows.
            tags, params: of the run.
            folder: URI of the run's results; its experiment.yaml becomes an artifact, its journal the curves.
            parent: the study's run, for a trial.
            journal: whether the folder has one.
            started_ms: when it began, if that was not now.
        """
        tags = {f"deit_ray.{key}": value for key, value in tags.items()} | {"deit_ray.folder": folder}
        uri = storage.join(folder, JOURNAL) if journal else None
        params = {key: str(value) for key, value in params.items()}
        run = Run(name, folder, tags, params, parent, uri, started_ms or now_ms())
        with self.lock:  # where a trial is started again before its end was delivered, it goes on
            self.live = [other for other in self.live if other.folder != folder]
            self.live.append(run)
        self.started += 1
        self.root = self.root or parent or run
        self.wake.set()
        return run

    def end_run(
        self,
        run: Run,
        outcome: Outcome,
        folder: str,
        *files: str,
        metrics: dict[str, float] | None = None,
        ended_ms: int | None = None,
    ) -> None:
        """Notes that a run shall be closed, with the rest of its journal and some of its files.

        Args:
            outcome: MLflow's status, tags and artifacts follow from it.
            folder: where the files are.
            files: names of further artifacts.
            metrics: last values that are in no journal.
            ended_ms: when it ended, if that was not now.
        """
        uris = tuple(storage.join(folder, file) for file in (*outcome.artifacts, *files))
        ending = Ending(outcome, uris, metrics or {}, ended_ms or now_ms())
        with self.lock:
            run.ending, run.left = ending, True
            if run not in self.live:  # it had ended before, and ends otherwise
                self.live.append(run)
        self.wake.set()

    def finish(
        self, patience_s: float, limit_s: float, on_progress: Callable[[int, int], None] | None = None
    ) -> list[Run]:
        """Waits until all is delivered, and stops; returns the runs of which something is not.

        Args:
            patience_s: how long to wait while nothing gets through.
            limit_s: how long at most.
            on_progress: told from time to time how many runs of how many are done.
        """
        self.closing.set()
        self.wake.set()
        begin = since = told = time.monotonic()
        seen = self.delivery.requests
        while (
            self.thread.is_alive()
            and time.monotonic() - since < patience_s
            and time.monotonic() - begin < limit_s
        ):
            self.thread.join(0.1)
            if self.delivery.requests != seen:
                seen, since = self.delivery.requests, time.monotonic()
            if on_progress and time.monotonic() - told > 2:
                told = time.monotonic()
                on_progress(self.started - len(self._left()), self.started)
        self.stopped.set()  # a thread that hangs in a request does nothing more once it returns
        return self._left()

    def describe_left(self, left: list[Run]) -> str:
        """How much of some runs is not delivered."""
        local = [run for run in left if run.journal and storage.is_local(run.journal)]
        points = sum(len(segment) for run in local for segment in iterate_segments(run.journal, run.segments))
        return (
            f"{len(left)} run{'s' * (len(left) != 1)} with {points} point{'s' * (points != 1)} not delivered"
        )

    def _left(self) -> list[Run]:
        with self.lock:
            return [run for run in self.live if run.left]

    def _sync_command(self) -> str:
        results, _, name = self.root.folder.rpartition("/")
        results = os.path.relpath(results) if storage.is_local(results) else results
        return f"deit-ray sync {name}{storage.results_option(results)}"

    # What follows runs in the delivery thread.

    def _deliver(self) -> None:
        pause_s = PAUSE_S[0]
        while not self.stopped.is_set():
            self._show("tracking")
            self.wake.clear()
            closing = self.closing.is_set()  # asked before the journals are read, which grow until then
            failed = self._deliver_round(closing)
            self._show("tracking")
            with self.lock:
                self.live = [run for run in self.live if run.left]
                if failed in self.live:  # behind the others: what fails for one run alone does not stop them
                    self.live.append(self.live.pop(self.live.index(failed)))
                self.failing.intersection_update(self.live)
            if failed:
                self.stopped.wait(min(pause_s, 1.0)) if closing else self.closing.wait(
                    pause_s * random.uniform(0.5, 1)
                )  # drivers that failed together come back apart
                pause_s = min(2 * pause_s, PAUSE_S[1])
            elif closing:
                return
            else:
                pause_s = PAUSE_S[0]
                self.wake.wait(self._until_due_s())

    def _until_due_s(self) -> float:
        now = time.monotonic()
        with self.lock:
            return max(0.0, min((run.delivered for run in self.live), default=now) + POLL_S - now)

    def _deliver_round(self, closing: bool) -> Run | None:
        """Delivers what there is of every run; returns the run at which that failed."""
        with self.lock:
            runs = [run for run in self.live if run.left]
        for run in runs:
            begin = time.monotonic()
            if not closing and run.ending is run.closed and begin - run.delivered < POLL_S:
                continue  # another run has woken the thread
            try:
                self.delivery.deliver(run)
            except Stopped:
                return run
            except (
                Exception
            ) as error:  # whatever the server, the network or the disk raises: the journals keep the data
                self._note_failure(run, error, time.monotonic() - begin)
                return run
            self._note_success(run)
            run.delivered = begin
            with self.lock:
                run.left = not closing and (run.closed is None or run.closed is not run.ending)
        return None

    def _note_failure(self, run: Run, error: Exception, took_s: float) -> None:
        self.failing.add(run)
        self.failures += 1
        self.last_error = one_line(error)
        if not self.behind and (self.failures > 1 or took_s > HICCUP_S):
            self.behind = True
            self._tell(f"tracking is behind: MLflow at {self.uri} does not take deliveries ({self.last_error}); "
                       "nothing waits for it, and it is tried again")  # fmt: skip

    def _note_success(self, run: Run) -> None:
        self.failing.discard(run)
        if not self.failing:
            self.failures = 0
            if self.behind:
                self.behind = False
                self._tell(f"tracking caught up: MLflow at {self.uri} takes deliveries again")

    def _tell(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody listens; deliveries go on
            self.warn(text)

    def _begin_request(self) -> None:
        if self.stopped.is_set():
            raise Stopped
        self._show("delivery")

    def _show(self, phase: str) -> None:
        if phase != self.phase:
            self.phase = phase
            show_phase(phase)


class Stopped(Exception):
    """Nobody waits for the deliveries any more."""


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def tracking_uri(experiment: Experiment) -> str:
    """MLflow's URI of an experiment: the one it names, or a SQLite file next to the results."""
    if experiment.tracking.uri:
        return experiment.tracking.uri
    results = storage.absolute(experiment.results.uri)
    if not storage.is_local(results):
        raise UserError(
            f"tracking.uri: missing; results.uri is {results}, where no SQLite file can be: name an MLflow server"
        )
    return f"sqlite:///{results}/mlflow.db"
