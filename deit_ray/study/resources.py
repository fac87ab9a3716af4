"""What a study holds of the cluster: the time of its trials, and what a dead process may have left behind."""

import contextlib
import threading

import ray

from deit_ray.cluster import connect
from deit_ray.cluster.holdings import forget_cancel, sweep
from deit_ray.study.observers import Observer
from deit_ray.study.study import Study

SAVE_SPENT_S = 10.0
SWEEP_AFTER_S = 3.0  # an actor that ends by itself gives back within this what it holds


class Resources(Observer):
    """Counts what the study spends, and gives back what its trials' processes held.

    Args:
        gpus: the number of GPUs of each trial.

    Attributes:
        spent: over all resumes; the database has it as it was at most ten seconds ago.
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
        """Gives back what a trial's process left behind, once it has had the time to do so itself."""
        self.sweeps[folder] = threading.Timer(SWEEP_AFTER_S, self._sweep, [folder])
        self.sweeps[folder].daemon = True
        self.sweeps[folder].start()

    def sweep_now(self) -> None:
        """Does at once what `sweep_soon` has not done yet."""
        for folder, timer in list(self.sweeps.items()):
            timer.cancel()
            self._sweep(folder)

    def _sweep(self, folder: str) -> None:
        self.sweeps.pop(folder, None)
        with contextlib.suppress(ray.exceptions.RayError):  # the cluster is gone, and its holdings with it
            if connect.is_alive():
                sweep(folder)
