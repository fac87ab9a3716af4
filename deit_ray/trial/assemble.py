"""What a trial is made of: an experiment becomes a work list, a recipe for its samples, and a trainer."""

import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

from deit_ray import storage
from deit_ray.cluster import connect
from deit_ray.cluster.holdings import run_of
from deit_ray.cluster.phase import show_phase
from deit_ray.data import shards, stream
from deit_ray.data.worklist import WorkList
from deit_ray.experiment.config import Experiment
from deit_ray.results.journal import step_of
from deit_ray.trial.failure import keeping_traceback, write_worker
from deit_ray.trial.needs import Needs, store_share
from deit_ray.trial.reading import make_recipe, make_worklist
from deit_ray.trial.trainer import OnReport, Trainer

REPORT_POLL_S = "0.1"  # ray.train.report blocks until the controller polls: every 2 s by default


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
    return make_trainer(
        own, device, "train", {**job, "folder": config["folder"]}, worklist, config["folder"], on_report
    )


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
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = (
        REPORT_POLL_S  # read by the controller, which lives here
    )
    if connect.possible_nodes() == 1:
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = (
            "0"  # one machine is not preempted; it saves an actor
        )
    needs, run = Needs.of(experiment, device), run_of(folder)
    store = store_share(ray.cluster_resources(), needs)
    datasets, data_config, cursor = stream.make_datasets(
        run, worklist, make_recipe(experiment, device), 0, needs.stream_cpus, store
    )
    job = {"experiment": experiment, "worklist": worklist, "cursor": cursor, **job}
    parent, _, name = storage.absolute(folder).rpartition("/")
    ranked = (
        experiment.search.metric if experiment.search.metric.split("/")[0] in worklist.evaluations else None
    )
    return Trainer(
        run,
        partial(_run_worker, worker),
        train_loop_config=job,
        datasets=datasets,
        dataset_config=data_config,
        scaling_config=ScalingConfig(
            num_workers=experiment.train.workers,
            use_gpu=device == "cuda",
            resources_per_worker={"CPU": experiment.train.cpus_per_worker}
            | ({"GPU": 1} if device == "cuda" else {}),
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
    batches = stream.Stream(
        config["worklist"], ray.train.get_dataset_shard, config.pop("cursor"), rank, start
    )
    from deit_ray.training import worker

    function, job = worker.WORKERS[name]
    with keeping_traceback():
        function(job(stream=batches, **config))
