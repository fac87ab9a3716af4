"""Forwards Ray Tune's events about trials to the driver."""

from pathlib import Path

import ray
import ray.tune
from ray import cloudpickle

from deit_ray.trial.failure import Failure, TrialFailed, describe_death, describe_failure


class Listener(ray.tune.Callback):
    """Calls the driver at each of Tune's events.

    Args:
        driver: the `Driver`. Its `guarding` hides exceptions from Tune, which would take them for failures of
            a trial.
    """

    def __init__(self, driver):
        self.driver = driver

    def __deepcopy__(self, memo):
        return self  # Tune copies its configuration, but the study has one driver

    def __reduce__(self):
        return object, ()  # Tune saves its configuration for `Tuner.restore`, which is never called

    def on_step_end(self, iteration, trials, **info):
        with self.driver.guarding():
            self.driver.tick()

    def on_trial_start(self, iteration, trials, trial, **info):
        with self.driver.guarding():
            self.driver.trials.started(trial.config["number"])

    def on_trial_result(self, iteration, trials, trial, result, **info):
        if self.driver.metric in result:
            with self.driver.guarding():
                self.driver.trials.reported(trial.config["number"], result)

    def on_trial_complete(self, iteration, trials, trial, **info):
        with self.driver.guarding():
            self.driver.trial_completed(trial.config["number"])
        self.driver.resources.sweep_soon(trial.config["folder"])

    def on_trial_error(self, iteration, trials, trial, **info):
        number, folder = trial.config["number"], trial.config["folder"]
        with self.driver.guarding():
            error = error_of(trial)
            failure = failure_of(error, folder)
            if failure is None:
                self.driver.trial_died(number, describe_death(error))
            else:
                self.driver.trial_failed(number, failure)
            if self.driver.trials.has_ended(number):  # a trial that continues sweeps when it starts
                self.driver.resources.sweep_soon(folder)


def error_of(trial) -> BaseException:
    """The exception that ended a trial, from Tune: raised by the trial's process, or by the death of it.

    Raises:
        RuntimeError: Tune itself failed.
    """
    if trial.pickled_error_file is None:
        text = Path(trial.error_file).read_text()
        raise RuntimeError(f"Ray Tune failed with trial {trial.config['number']}: {text}")
    return cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())


def failure_of(error: BaseException, folder: str) -> Failure | None:
    """The failure of a trial; None if its process, node or owner died, which is an interruption."""
    cause = getattr(error, "cause", error)
    if isinstance(cause, TrialFailed):
        return cause.failure
    if isinstance(error, ray.exceptions.RayTaskError):
        return describe_failure(error, folder)
    return None
