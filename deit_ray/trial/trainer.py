"""Ray Train's trainer of one run, which leaves nothing behind however the run ends."""

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial

import ray
import ray.train
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.util.placement_group import placement_group

from deit_ray import storage
from deit_ray.cluster.holdings import group_name
from deit_ray.errors import HopelessError, UnavailableError, UserError
from deit_ray.results.folders import SNAPSHOT
from deit_ray.trial.failure import root_cause

STREAM_END_S = 5.0


class Trainer(TorchTrainer):
    """A TorchTrainer whose controller runs in this process instead of an actor of its own.

    It starts a trial seconds sooner, hands over reports without a queue between processes, and makes the end certain:
    whatever way it comes, workers, placement group and the reservations of Train and of the stream are given back. So
    Ray's detached cleaner, which fails without a dashboard, is not needed; `sweep` does what is left when this process dies.
    """

    controller: TrainController | None = None

    def __init__(self, run: str, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.run = run
        object.__setattr__(
            self.train_run_context, "run_id", run
        )  # so that `sweep` can find what the run holds

    def _create_default_callbacks(self):
        return [
            c for c in super()._create_default_callbacks() if not isinstance(c, PlacementGroupCleanerCallback)
        ]

    def _initialize_and_run_controller(self, **arguments):
        arguments["failure_policy"] = RetryUnlessHopeless(
            self.run_config.failure_config, self.run_config.callbacks[0]
        )
        worker_group.placement_group = partial(
            placement_group, name=group_name(self.run)
        )  # Ray gives it no name
        self.controller = TrainController(**arguments)
        manager, folder = (
            self.controller._checkpoint_manager,
            storage.join(self.run_config.storage_path, self.run_config.name),
        )
        manager._write_state_to_storage = lambda: write_snapshot(
            folder, manager._save_state()
        )  # Ray's own leaves it torn when killed
        try:
            asyncio.run(self.controller.run())
        finally:
            self._stop_stream()
        return self.controller.get_result()

    def abort(self) -> None:
        """Ends the run from another thread, whatever its workers do."""
        if self.controller is None or self.controller.get_state().is_terminal():
            return
        self.controller._controller_callback_manager.invoke_best_effort(
            "before_controller_abort"
        )  # Train's reservation
        self._stop_stream()
        group = self.controller.get_worker_group()
        if group is not None and group.has_started():
            group.abort()

    def _stop_stream(self) -> None:
        """Ends the stream's executions and waits for it, since what they have reserved outlives their process."""
        self.train_loop_config["cursor"].clear()
        for callback in self.controller._callbacks:
            provider = getattr(callback, "_dataset_shard_provider", None)
            if provider is not None:
                with contextlib.suppress(
                    ray.exceptions.RayError
                ):  # it died already, and its executions with it
                    ray.get(provider._dataset_manager.shutdown_data_executors.remote(), timeout=STREAM_END_S)


def write_snapshot(folder: str, text: str) -> None:
    """Writes Ray Train's list of a run's checkpoints, whole or not at all."""
    storage.write_bytes(storage.join(folder, SNAPSHOT), text.encode())


class RetryUnlessHopeless(DefaultFailurePolicy):
    """Restarts the workers from their checkpoint when one dies, as long as that helps.

    Machines come and go: what counts against `train.max_failures` is only a failure before the next checkpoint. What would fail
    in the same way again is not tried again.
    """

    def __init__(self, failure_config, reports: "OnReport"):
        super().__init__(failure_config)
        self.reports, self.seen = reports, 0

    def make_decision(self, training_failed_error):
        failures = getattr(training_failed_error, "worker_failures", {})
        causes = [root_cause(failure) for failure in failures.values()]
        if any(
            isinstance(c, (HopelessError, UserError)) and not isinstance(c, UnavailableError) for c in causes
        ):
            return FailureDecision.RAISE
        if self.reports.count > self.seen:
            self.seen, self._worker_group_failures = self.reports.count, 0
        return super().make_decision(training_failed_error)


class OnReport(UserCallback):
    """Hands every report's metrics over, in the controller's process."""

    def __init__(self, handle: Callable[[dict], None]):
        self.handle, self.count = handle, 0

    def after_report(self, run_context, metrics, checkpoint):
        self.count += 1
        self.handle(dict(metrics[0]))

    def __reduce__(
        self,
    ):  # the run's description, callbacks included, is sent to the workers, who have no use for it
        return OnReport, (None,)
