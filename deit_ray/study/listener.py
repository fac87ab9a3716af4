"""What Ray Tune says about trials, passed on to the driver, and what is swept up behind them."""

import contextlib
import threading
from pathlib import Path

import ray
import ray.tune
from ray import cloudpickle

from deit_ray.cluster import connect
from deit_ray.cluster.holdings import sweep

SWEEP_AFTER_S = 3.0


class Listener(ray.tune.Callback):
    """Passes on what Tune says about trials, and sweeps up behind them."""

    def __init__(self, driver):
        self.driver = driver

    def __deepcopy__(self, memo):
        return self  # Tune copies its configuration; what speaks to the study must stay the one that does

    def __reduce__(self):
        return object, ()  # Tune saves its configuration for `Tuner.restore`, which is never called

    def on_step_end(self, iteration, trials, **info):
        with self.driver.guarding():
            self.driver.tick()

    def on_trial_start(self, iteration, trials, trial, **info):
        with self.driver.guarding():
            self.driver.trial_started(trial.config["number"])

    def on_trial_result(self, iteration, trials, trial, result, **info):
        if self.driver.experiment.search.metric in result:
            with self.driver.guarding():
                self.driver.trial_reported(trial.config["number"], result)

    def on_trial_complete(self, iteration, trials, trial, **info):
        with self.driver.guarding():
            self.driver.trial_completed(trial.config["number"])
        self.driver.sweeps.soon(trial.config["folder"])

    def on_trial_error(self, iteration, trials, trial, **info):
        number = trial.config["number"]
        with self.driver.guarding():
            self.driver.trial_failed(number, error_of(trial))
            if self.driver.study.trial(number).state.is_finished():  # one that goes on sweeps for itself
                self.driver.sweeps.soon(trial.config["folder"])


def error_of(trial) -> BaseException:
    """What Tune says has ended a trial: the exception of its process, or that it died.

    Raises:
        RuntimeError: it was an error of Tune's own.
    """
    if trial.pickled_error_file is None:
        raise RuntimeError(
            f"Ray Tune failed with trial {trial.config['number']}: {Path(trial.error_file).read_text()}"
        )
    return cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())


class Sweeps:
    """Sweeps up behind trials once their actors have had the time to do so themselves."""

    def __init__(self):
        self.timers: dict[str, threading.Timer] = {}

    def soon(self, folder: str) -> None:
        self.timers[folder] = threading.Timer(SWEEP_AFTER_S, self._sweep, [folder])
        self.timers[folder].daemon = True
        self.timers[folder].start()

    def close(self) -> None:
        """Does now what is still to be done."""
        for folder, timer in list(self.timers.items()):
            timer.cancel()
            self._sweep(folder)

    def _sweep(self, folder: str) -> None:
        self.timers.pop(folder, None)
        with contextlib.suppress(
            ray.exceptions.RayError
        ):  # the cluster is gone, and all that was left with it
            if connect.is_alive():
                sweep(folder)
