"""A trial: one experiment trained by Ray Train inside an actor, that leaves nothing behind however it ends."""

import asyncio
import contextlib
import os
import posixpath
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import ray
import ray.train
import ray.tune
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.util.placement_group import placement_group

from deit_ray import cluster, storage
from deit_ray.augment.policy import Photometric, place_of
from deit_ray.config import Experiment
from deit_ray.data import shards, stream
from deit_ray.data.blocks import Recipe
from deit_ray.data.crop import Geometry
from deit_ray.data.worklist import WorkList
from deit_ray.errors import HopelessError, UnavailableError, UserError
from deit_ray.failure import FAILURE, TrialFailed, describe_failure, keeping_traceback, root_cause, write_failure, write_worker
from deit_ray.folders import SNAPSHOT
from deit_ray.holdings import group_name, is_cancelled, run_of, sweep
from deit_ray.journal import step_of
from deit_ray.phase import show_phase

STREAM_END_S = 5.0
STREAM_STORE = 0.4  # of the object store, for the streams of all trials; two windows of one overlap for a moment only
CANCEL_POLL_S = 1.0
REPORT_POLL_S = "0.1"  # ray.train.report blocks until the controller polls: every 2 s by default


@dataclass(frozen=True)
class Needs:
    """What a trial takes from the cluster: reserved by its workers, and counted for its stream."""

    gpus: float
    cpus: float
    stream_cpus: float

    @classmethod
    def of(cls, experiment: Experiment, device: str) -> "Needs":
        workers = experiment.train.workers
        return cls(
            gpus=float(workers if device == "cuda" else 0),
            cpus=workers * experiment.train.cpus_per_worker,
            stream_cpus=workers * experiment.data.cpus_per_worker,
        )

    def fit(self, resources: dict[str, float]) -> int:
        """How many such trials fit into a cluster's resources at once."""
        by_cpu = (resources.get("CPU", 0) + 1e-6) // (self.cpus + self.stream_cpus)
        by_gpu = (resources.get("GPU", 0) + 1e-6) // self.gpus if self.gpus else by_cpu
        return int(min(by_cpu, by_gpu))

    def sum_shown(self, experiment: Experiment) -> str:
        train, data, workers = experiment.train, experiment.data, experiment.train.workers
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        return (
            f"{workers} workers x ({train.cpus_per_worker:g} training + {data.cpus_per_worker:g} stream) CPUs "
            f"= {self.cpus + self.stream_cpus:g} CPUs{gpus}"
        )


def store_share(resources: dict[str, float], needs: Needs) -> float:
    """Bytes of the cluster's object store for each of a trial's two windows, when as many trials run as fit into the cluster."""
    return STREAM_STORE * resources["object_store_memory"] / max(1, needs.fit(resources))


def make_worklist(
    experiment: Experiment, manifest: shards.Manifest, uri: str, splits: tuple[str, ...], epochs: int | None = None
) -> WorkList:
    """The work list of a run over a prepared data set.

    Args:
        splits: which of val and test are evaluated.
        epochs: instead of the experiment's; 0 for a run that only evaluates.
    """
    data, train = experiment.data, experiment.train
    groups = {split: shards.row_groups(uri, manifest, split, data.holdout) for split in splits}
    groups = {split: found for split, found in groups.items() if found.images}
    images = shards.row_groups(uri, manifest, "train", data.holdout) if epochs != 0 else shards.NO_ROW_GROUPS
    try:
        return WorkList(
            images, groups, train.batch_size, train.workers, data.views,
            train.epochs if epochs is None else epochs, train.eval_every, experiment.seed,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"train.batch_size: {error}; the data set at {uri} has {manifest.rows('train')}, "
                        f"of which data.holdout keeps {data.holdout:.0%} aside") from None  # fmt: skip


def make_recipe(experiment: Experiment, device: str) -> Recipe:
    data = experiment.data
    geometry = Geometry(data.image_size, tuple(data.crop_scale), tuple(data.crop_ratio), data.flip, data.eval_crop, experiment.seed)
    in_stream = place_of(experiment.augment.place, device) == "stream"
    photometric = Photometric.of(experiment.augment, data.mean, experiment.seed) if in_stream else None
    return Recipe(geometry, photometric, keep_crops=experiment.distillation.teacher_sees_crops)


@dataclass(frozen=True)
class Shared:
    """What all trials of a study have in common.

    Attributes:
        manifest, data: the prepared data set and its absolute URI.
        teacher, initial: Ray object references of `TeacherWeights` and the student's initial weights, or None.
    """

    manifest: shards.Manifest
    data: str
    teacher: object
    initial: object


def make_trial(
    experiment: Experiment,
    device: str,
    shared: Shared,
    splits: tuple[str, ...],
    config: dict,
    on_report: Callable[[dict], None],
) -> "Trainer":
    """The trainer of one trial; a partial of it is what a `Trial` actor is made with.

    Args:
        experiment: the study's, or the run's own.
        splits: which of val and test it evaluates.
        config: Tune's: the trial's `folder`, and the searched values by dotted key.
    """
    params = {key: value for key, value in config.items() if key in experiment.search.space}
    own = experiment.with_overrides({**params, "search.space": {}})
    worklist = make_worklist(own, shared.manifest, shared.data, splits)
    job = {"classes": shared.manifest.classes, "teacher": shared.teacher, "initial": shared.initial}
    return make_trainer(own, device, "train", {**job, "folder": config["folder"]}, worklist, config["folder"], on_report)


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
        object.__setattr__(self.train_run_context, "run_id", run)  # so that `sweep` can find what the run holds

    def _create_default_callbacks(self):
        return [c for c in super()._create_default_callbacks() if not isinstance(c, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **arguments):
        arguments["failure_policy"] = RetryUnlessHopeless(self.run_config.failure_config, self.run_config.callbacks[0])
        worker_group.placement_group = partial(placement_group, name=group_name(self.run))  # Ray gives it no name
        self.controller = TrainController(**arguments)
        manager, folder = self.controller._checkpoint_manager, storage.join(self.run_config.storage_path, self.run_config.name)
        manager._write_state_to_storage = lambda: write_snapshot(folder, manager._save_state())  # Ray's own leaves it torn when killed
        try:
            asyncio.run(self.controller.run())
        finally:
            self._stop_stream()
        return self.controller.get_result()

    def abort(self) -> None:
        """Ends the run from another thread, whatever its workers do."""
        if self.controller is None or self.controller.get_state().is_terminal():
            return
        self.controller._controller_callback_manager.invoke_best_effort("before_controller_abort")  # Train's reservation
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
                with contextlib.suppress(ray.exceptions.RayError):  # it died already, and its executions with it
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
        if any(isinstance(c, (HopelessError, UserError)) and not isinstance(c, UnavailableError) for c in causes):
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

    def __reduce__(self):  # the run's description, callbacks included, is sent to the workers, who have no use for it
        return OnReport, (None,)


def make_trainer(
    experiment: Experiment,
    device: str,
    worker: str,
    job: dict,
    worklist: WorkList,
    folder: str,
    on_report: Callable[[dict], None],
) -> Trainer:
    """The trainer of one run.

    Args:
        device: cpu or cuda.
        worker: what each worker runs, a key of `worker.WORKERS`.
        job: what it is told besides what is made here: the fields of its job.
        worklist: what the run reads.
        folder: URI of the run's results; an unfinished run there goes on from its latest checkpoint.
        on_report: called with the metrics of each report.
    """
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = REPORT_POLL_S  # read by the controller, which lives here
    if cluster.possible_nodes() == 1:
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # one machine is not preempted; it saves an actor
    needs, run = Needs.of(experiment, device), run_of(folder)
    store = store_share(ray.cluster_resources(), needs)
    datasets, data_config, cursor = stream.make_datasets(run, worklist, make_recipe(experiment, device), 0, needs.stream_cpus, store)
    job = {"experiment": experiment, "worklist": worklist, "cursor": cursor, **job}
    parent, _, name = storage.absolute(folder).rpartition("/")
    ranked = experiment.search.metric if experiment.search.metric.split("/")[0] in worklist.evaluations else None
    return Trainer(
        run,
        partial(_run_worker, worker),
        train_loop_config=job,
        datasets=datasets,
        dataset_config=data_config,
        scaling_config=ScalingConfig(
            num_workers=experiment.train.workers,
            use_gpu=device == "cuda",
            resources_per_worker={"CPU": experiment.train.cpus_per_worker} | ({"GPU": 1} if device == "cuda" else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=parent,
            failure_config=FailureConfig(max_failures=experiment.train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=ranked),
            callbacks=[OnReport(on_report)],
        ),
    )


def _run_worker(name: str, config: dict) -> None:
    """Starts this rank's stream, and while it fills imports what takes long: models, which a trial's actor has no use for."""
    show_phase("start")
    checkpoint = ray.train.get_checkpoint()
    start = step_of(posixpath.basename(checkpoint.path)) if checkpoint else 0
    rank = ray.train.get_context().get_world_rank()
    if "folder" in config:
        write_worker(config["folder"], rank)
    batches = stream.Stream(config["worklist"], ray.train.get_dataset_shard, config.pop("cursor"), rank, start)
    from deit_ray import worker

    function, job = worker.WORKERS[name]
    with keeping_traceback():
        function(job(stream=batches, **config))


class Trial(ray.tune.Trainable):
    """A Ray Tune trial that runs a `Trainer`; each evaluation is one result.

    `config["folder"]` is the URI of its results; a failure is described in failure.json there, and raised as `TrialFailed`.
    """

    def setup(self, config: dict, make: Callable[[dict, Callable], Trainer] | None = None):
        self.folder = config["folder"]
        self.events: queue.Queue = queue.Queue()
        self.last: dict = {}
        self.trainer: Trainer | None = None

        def fit():
            try:
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
            with contextlib.suppress(UnavailableError):  # a full disk; the driver gets it with the exception too
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
