"""A trial: one experiment trained by Ray Train inside an actor, that leaves nothing behind however it
ends."""

import contextlib
import queue
import threading
from collections.abc import Callable

from deit_ray import storage
from deit_ray.cluster.code import check_same_code
from deit_ray.cluster.holdings import is_cancelled, sweep
from deit_ray.errors import UnavailableError
from deit_ray.trial.failure import FAILURE, TrialFailed, describe_failure, write_failure
from deit_ray.trial.train_private import PlainTrainable
from deit_ray.trial.trainer import Trainer

CANCEL_POLL_S = 1.0


class Trial(PlainTrainable):
    """A Ray Tune trial that runs a `Trainer`; each evaluation is one result.

    `config["folder"]` is the URI of its results; a failure is described in failure.json there, and raised as
    `TrialFailed`. `code` is the hash of the driver's code; see `check_same_code`.
    """

    def setup(
        self,
        config: dict,
        make: Callable[[dict, Callable], Trainer] | None = None,
        code: str | None = None,
    ):
        self.folder = config["folder"]
        self.events: queue.Queue = queue.Queue()
        self.last: dict = {}
        self.trainer: Trainer | None = None

        def fit():
            try:
                check_same_code(code)
                storage.remove(storage.join(self.folder, FAILURE))  # of an earlier attempt
                sweep(self.folder)
                self.trainer = make(config, lambda metrics: self.events.put(("report", metrics)))
                self.trainer.fit()
                self.events.put(("end", None))
            except BaseException as error:  # raised again in `step`
                self.events.put(("end", error))

        self.thread = threading.Thread(target=fit, daemon=True)
        self.thread.start()

    def step(self) -> dict:
        while not is_cancelled(self.folder):
            try:
                kind, value = self.events.get(timeout=CANCEL_POLL_S)
            except queue.Empty:
                continue
            if kind == "report":
                self.last = value
                return value
            if value is None:
                return {**self.last, "done": True}
            failure = describe_failure(value, self.folder)
            with contextlib.suppress(
                UnavailableError
            ):  # a full disk; the driver gets it with the exception too
                write_failure(self.folder, failure)
            raise TrialFailed(failure)
        return {**self.last, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> dict:
        return {}  # Ray Train keeps the checkpoints

    def load_checkpoint(self, checkpoint) -> None:
        pass

    def cleanup(self) -> None:
        if self.thread.is_alive() and self.trainer is not None:
            self.trainer.abort()
