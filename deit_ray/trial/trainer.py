"""Ray Train's trainer of one run, which leaves nothing behind however the run ends."""

from collections.abc import Callable

from ray.train import UserCallback

from deit_ray import storage
from deit_ray.cluster.holdings import group_name
from deit_ray.errors import HopelessError, OtherCodeError, UnavailableError, UserError
from deit_ray.results.folders import SNAPSHOT
from deit_ray.trial.failure import root_cause
from deit_ray.trial.train_private import RAISE, CountedFailures, InProcessTrainer

REPORT_POLL_S = 0.1


class Trainer(InProcessTrainer):
    """Trains a run with Ray Train, in this process and the workers'.

    Whatever way the run ends, workers, placement group and the reservations of Train and of the stream are
    given back; `holdings.sweep` does what is left when this process itself is killed.

    Args:
        run: the run's name; see `holdings.run_of`.
        one_machine: the cluster has one node for good, which nobody preempts.
        arguments: of TorchTrainer. The run configuration's first callback is an `OnReport`, and
            `train_loop_config` has the stream's `cursor`.
    """

    def __init__(self, run: str, one_machine: bool, **arguments):
        super().__init__(run, group_name(run), REPORT_POLL_S, not one_machine, **arguments)

    def make_failure_policy(self) -> "RetryUnlessHopeless":
        return RetryUnlessHopeless(self.run_config.failure_config, self.run_config.callbacks[0])

    def write_snapshot(self, text: str) -> None:
        write_snapshot(storage.join(self.run_config.storage_path, self.run_config.name), text)

    def end_stream(self) -> None:
        self.train_loop_config["cursor"].clear()
        super().end_stream()


def write_snapshot(folder: str, text: str) -> None:
    """Writes Ray Train's list of a run's checkpoints into the run's folder, whole or not at all."""
    storage.write_bytes(storage.join(folder, SNAPSHOT), text.encode())


class RetryUnlessHopeless(CountedFailures):
    """Restarts the workers from their checkpoint when one dies, as long as that helps.

    Machines come and go: only failures in a row without a new checkpoint count against `train.max_failures`.
    A failure that would come again in the same way ends the run at once.
    """

    def __init__(self, failure_config, reports: "OnReport"):
        super().__init__(failure_config)
        self.reports, self.reports_before = reports, 0

    def make_decision(self, training_failed_error):
        failures = getattr(training_failed_error, "worker_failures", {})
        if any(is_hopeless(root_cause(failure)) for failure in failures.values()):
            return RAISE
        if self.reports.count > self.reports_before:
            self.reports_before = self.reports.count
            self.forget_failures()
        return super().make_decision(training_failed_error)


def is_hopeless(error: BaseException) -> bool:
    if isinstance(error, OtherCodeError):
        return True
    return isinstance(error, (HopelessError, UserError)) and not isinstance(error, UnavailableError)


class OnReport(UserCallback):
    """Passes the metrics of every report on, in the controller's process."""

    def __init__(self, handle: Callable[[dict], None] | None):
        self.handle, self.count = handle, 0

    def after_report(self, run_context, metrics, checkpoint):
        self.count += 1
        self.handle(dict(metrics[0]))

    def __reduce__(self):
        """Leaves the function out: the workers, to whom Ray Train sends all callbacks, have no use for it."""
        return OnReport, (None,)
