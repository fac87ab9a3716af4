"""The cluster's resources that a study uses: it counts GPU time, and releases what dead processes held."""

import contextlib
import threading

import ray

from deit_ray.cluster import connect
from deit_ray.cluster.holdings import forget_cancel, sweep
from deit_ray.study.observers import Observer
from deit_ray.study.study import Study

SAVE_SPENT_S = 10.0
SWEEP_AFTER_S = 3.0  # an actor that ends by itself has then released what it held


class Resources(Observer):
    """Counts the time that the study spends, and releases what its trials' processes held.

    Args:
        gpus: the number of GPUs of each trial.

    Attributes:
        spent: time spent over all resumes; the database is at most ten seconds behind.
    """

    def __init__(self, study: Study, gpus: float):
        self.study, self.gpus = study, gpus
        self.live: set[int] = set()  # trials whose process runs
        self.spent = study.spent
        self.unsaved_s = 0.0
        self.sweeps: dict[str, threading.Timer] = {}  # by the trial's folder

    def trial_reopened(self, number: int) -> None:
        forget_cancel(self.study.trial_folder(number))

    def trial_started(self, number: int) -> None:
        self.live.add(number)

    def trial_left(self, number: int) -> None:
        self.live.discard(number)
        forget_cancel(self.study.trial_folder(number))

    def time_passed(self, elapsed_s: float) -> None:
        self.spent.wall_s += elapsed_s
        self.spent.gpu_s += elapsed_s * self.gpus * len(self.live)
        self.unsaved_s += elapsed_s
        if self.unsaved_s > SAVE_SPENT_S:
            self.save_spent()

    def save_spent(self) -> None:
        self.study.spent = self.spent
        self.unsaved_s = 0.0

    def sweep_soon(self, folder: str) -> None:
        """Releases what a trial's process still holds, after the process had time to release it itself."""
        self.sweeps[folder] = threading.Timer(SWEEP_AFTER_S, self._sweep, [folder])
        self.sweeps[folder].daemon = True
        self.sweeps[folder].start()

    def sweep_now(self) -> None:
        """Does the pending sweeps of `sweep_soon` at once."""
        for folder, timer in list(self.sweeps.items()):
            timer.cancel()
            self._sweep(folder)

    def _sweep(self, folder: str) -> None:
        self.sweeps.pop(folder, None)
        with contextlib.suppress(ray.exceptions.RayError):  # the cluster is gone, with all that was held
            if connect.is_alive():
                sweep(folder)
