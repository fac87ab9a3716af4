"""Everything that deit_ray uses of Ray Train and Ray Tune although Ray does not promise to keep it.

Each entry says why it is needed and what to do when a new Ray no longer has it; tests/test_ray_private.py
finds out whether it is there. cluster/ray_private.py does the same for Ray Core and Ray Data.
"""

import asyncio
import contextlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from unittest import mock

import ray
import ray.tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.tune.execution import class_cache
from ray.util.placement_group import placement_group

from deit_ray.cluster.ray_private import has_started_ray

STREAM_END_S = 5.0
RAISE = FailureDecision.RAISE


class InProcessTrainer(TorchTrainer, ABC):
    """A TorchTrainer whose controller runs in the calling process instead of an actor of its own.

    It starts a trial seconds sooner, passes reports on without a queue between processes, and lets `abort`
    end the run from another thread. When a hook is gone: see how TorchTrainer.fit runs its controller then;
    without any way in, call TorchTrainer.fit as it is, and give back what a killed trial holds with
    `holdings.sweep` alone.

    Args:
        run: the run's name; Ray Train's names of what it reserves contain it, so that `sweep` finds them.
        group_name: of the run's placement group. Ray Train gives it none, and `sweep` finds it by its name.
        poll_s: how often the controller looks at the workers: `ray.train.report` returns at the next look,
            which is 2 s away by default.
        watches_preemption: starts an actor that learns from the cloud when a node will go away.
        arguments: of TorchTrainer.
    """

    controller: TrainController | None = None

    def __init__(self, run: str, group_name: str, poll_s: float, watches_preemption: bool, **arguments):
        super().__init__(**arguments)
        self.group_name, self.poll_s, self.watches_preemption = group_name, poll_s, watches_preemption
        # The field is frozen. When it is gone: reservations have other names, which `sweep` must find in
        # another way.
        object.__setattr__(self.train_run_context, "run_id", run)

    @abstractmethod
    def make_failure_policy(self) -> DefaultFailurePolicy:
        """Decides whether workers start again after a failure. Ray Train offers no public way to choose
        another policy.

        When `DefaultFailurePolicy` is gone: every failure counts against `train.max_failures`.
        """

    @abstractmethod
    def write_snapshot(self, text: str) -> None:
        """Writes Ray Train's list of the run's checkpoints. Ray's own writing leaves a torn file when it is
        killed.

        When `_write_state_to_storage` is gone: see whether Ray writes the file whole or not at all by then.
        """

    def _create_default_callbacks(self) -> list:
        """Without the detached actor that removes a dead run's placement group: it fails without a dashboard.

        When `PlacementGroupCleanerCallback` is gone, so is the reason for this.
        """
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if not isinstance(c, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **arguments):
        arguments["failure_policy"] = self.make_failure_policy()
        # When the module no longer calls `placement_group`: name the group where it is made by then.
        worker_group.placement_group = partial(placement_group, name=self.group_name)
        settings = {
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(self.poll_s),
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": str(int(self.watches_preemption)),
        }
        with environment(settings):
            self.controller = TrainController(**arguments)
        manager = self.controller._checkpoint_manager
        manager._write_state_to_storage = lambda: self.write_snapshot(manager._save_state())
        try:
            asyncio.run(self.controller.run())
        finally:
            self.end_stream()
        return self.controller.get_result()

    def abort(self) -> None:
        """Ends the run from another thread, whatever its workers do."""
        if self.controller is None or self.controller.get_state().is_terminal():
            return
        # gives back what Train has reserved
        self.controller._controller_callback_manager.invoke_best_effort("before_controller_abort")
        self.end_stream()
        group = self.controller.get_worker_group()
        if group is not None and group.has_started():
            group.abort()

    def end_stream(self) -> None:
        """Ends the executions of the run's datasets and waits for their end: what they reserve outlives their
        process.

        Ray Train asks for the end too, but does not wait. When `_dataset_shard_provider` or
        `_dataset_manager` is gone: leave it to `holdings.sweep`.
        """
        for callback in self.controller._callbacks:
            provider = getattr(callback, "_dataset_shard_provider", None)
            if provider is not None:
                with contextlib.suppress(ray.exceptions.RayError):  # it is dead, and its executions with it
                    ray.get(provider._dataset_manager.shutdown_data_executors.remote(), timeout=STREAM_END_S)


class PlainTrainable(ray.tune.Trainable):
    """A Trainable that needs no home folder outside Ray Tune.

    Ray would make a folder in ~/ray_results for each one and leave it there. When `_setup_logdir` is gone:
    see where Ray keeps it by then; nothing of ours reads it.
    """

    def _setup_logdir(self) -> None:
        if self._storage:
            super()._setup_logdir()
        else:
            self._logdir = tempfile.gettempdir()


class CountedFailures(DefaultFailurePolicy):
    """Ray Train's policy: it gives up after `max_failures` failures. Here the count can be set back.

    When `_worker_group_failures` is gone: every failure counts, however far the run came in between.
    """

    def forget_failures(self) -> None:
        self._worker_group_failures = 0


@contextlib.contextmanager
def without_runtime_environment() -> Iterator[None]:
    """While it is entered, Ray Tune gives its trials no runtime environment of their own.

    Ray Tune sets a variable for PyTorch Lightning, which all processes of a trial inherit. Ray starts a
    process with such an environment by way of another one, which imports Ray for this alone. Variables that
    people set, such as AWS credentials, are passed on as ever; the processes of a Ray that this process has
    started have them anyway. When the tables are gone: leave it out, and look at `start_cpu_ratio` of
    bench/trial_overhead.py.
    """
    names = set() if has_started_ray() else class_cache.ENV_VARS_TO_PROPAGATE
    with (
        mock.patch.object(class_cache, "DEFAULT_ENV_VARS", {}),
        mock.patch.object(class_cache, "ENV_VARS_TO_PROPAGATE", names),
    ):
        yield


@contextlib.contextmanager
def every_death_known() -> Iterator[None]:
    """While it is entered, Ray Tune takes every death of a trial's process for the end of that trial alone.

    Tune knows `RayActorError`. Where Ray itself ended the process, since memory ran out, or where the node or
    the owner died, there is another `RayError`: Tune ends all trials where the process ran, and forgets the
    cause where it was starting. When one of the two methods is gone: give Tune an OutOfMemoryError
    (tests/cluster/test_surroundings.py), and see how it ends.
    """
    task_failed, start_failed = RayActorManager._actor_task_failed, RayActorManager._actor_start_failed

    def known(exception: Exception) -> Exception:
        if not isinstance(exception, RayError) or isinstance(exception, (RayActorError, RayTaskError)):
            return exception
        died = RayActorError(error_msg=str(exception))
        died.cause = exception  # Tune pickles the exception, which would lose its __cause__
        return died

    def handle_task(manager, tracked_actor_task, exception: Exception) -> None:
        task_failed(manager, tracked_actor_task, known(exception))

    def handle_start(manager, tracked_actor, exception: Exception) -> None:
        start_failed(manager, tracked_actor, known(exception))

    with (
        mock.patch.object(RayActorManager, "_actor_task_failed", handle_task),
        mock.patch.object(RayActorManager, "_actor_start_failed", handle_start),
    ):
        yield


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables while it is entered.

    The controller reads its two when it is made. Ray Train would send variables that stay set to its workers,
    whose processes it would then start in a slower way, with a runtime environment.
    """
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
