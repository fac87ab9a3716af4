"""The parts of a trial: an experiment becomes a work list, a recipe for its samples, and a trainer."""

import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

from deit_ray import storage
from deit_ray.cluster import connect
from deit_ray.cluster.code import check_same_code
from deit_ray.cluster.holdings import run_of
from deit_ray.cluster.phase import show_phase
from deit_ray.data import shards, stream
from deit_ray.data.worklist import WorkList
from deit_ray.experiment.config import Experiment
from deit_ray.results.journal import step_of
from deit_ray.trial.failure import keeping_traceback, write_worker
from deit_ray.trial.needs import Needs, store_share
from deit_ray.trial.reading import make_recipe, make_worklist, uneven_splits
from deit_ray.trial.trainer import OnReport, Trainer

TRAIN = "deit_ray.training.worker:train_worker"
EVALUATE = "deit_ray.training.worker:evaluate_worker"
Loop = Callable[[str, dict], None]


@dataclass(frozen=True)
class Shared:
    """What all trials of a study have in common.

    Attributes:
        manifest, data: the prepared data set and its absolute URI.
        teacher, initial: Ray object references of `TeacherWeights` and the student's initial weights, or
            None.
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
    loop: Loop | None = None,
) -> Trainer:
    """The trainer of one trial; a partial of it is what a `Trial` actor is made with.

    Args:
        experiment: the study's, or the run's own.
        device: cpu or cuda.
        shared: what all trials have in common.
        splits: which of val and test it evaluates.
        config: Tune's: the trial's `folder`, and the searched values by dotted key.
        on_report, loop: see `make_trainer`.
    """
    params = {key: value for key, value in config.items() if key in experiment.search.space}
    own = experiment.with_overrides({**params, "search.space": {}})
    worklist = make_worklist(own, shared.manifest, shared.data, splits)
    job = {
        "classes": shared.manifest.classes,
        "exif": shared.manifest.exif,
        "balanced": uneven_splits(shared.manifest),
        "teacher": shared.teacher,
        "initial": shared.initial,
        "folder": config["folder"],
    }
    return make_trainer(own, device, TRAIN, job, worklist, config["folder"], on_report, loop)


def make_trainer(
    experiment: Experiment,
    device: str,
    worker: str,
    job: dict,
    worklist: WorkList,
    folder: str,
    on_report: Callable[[dict], None],
    loop: Loop | None = None,
) -> Trainer:
    """The trainer of one run.

    Args:
        experiment: the run's.
        device: cpu or cuda.
        worker: the dotted name of the function that each worker calls, as MODULE:FUNCTION.
        job: the function's keyword arguments, besides the experiment, the worklist and this rank's stream.
        worklist: what the run reads.
        folder: URI of the run's results; an unfinished run there continues from its latest checkpoint.
        on_report: called with the metrics of each report.
        loop: what runs in each worker, called with the dotted name and with the arguments, which have the
            stream's `cursor` instead of the stream; by default `run_worker`. Benchmarks and tests wrap that
            one, or replace it.
    """
    needs, run, code = Needs.of(experiment, device), run_of(folder), connect.code_of_nodes()
    datasets, data_config, cursor = stream.make_datasets(
        run,
        worklist,
        make_recipe(experiment, device),
        0,
        needs.stream_cpus,
        store_share(ray.cluster_resources(), needs),
        code,
    )
    parent, _, name = storage.absolute(folder).rpartition("/")
    metric, train = experiment.search.metric, experiment.train
    is_evaluated = metric.split("/")[0] in worklist.evaluations
    gpu = {"GPU": train.gpus_per_worker} if device == "cuda" else {}
    return Trainer(
        run,
        connect.possible_nodes() == 1,
        train_loop_per_worker=partial(run_checked, code, loop or run_worker, worker),
        train_loop_config={"experiment": experiment, "worklist": worklist, "cursor": cursor, **job},
        datasets=datasets,
        dataset_config=data_config,
        scaling_config=ScalingConfig(
            num_workers=train.workers,
            use_gpu=device == "cuda",
            resources_per_worker={"CPU": train.cpus_per_worker} | gpu,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=parent,
            failure_config=FailureConfig(max_failures=train.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=metric if is_evaluated else None
            ),
            callbacks=[OnReport(on_report)],
        ),
    )


def run_checked(code: str | None, loop: Loop, worker: str, config: dict) -> None:
    """Runs a loop in a worker whose machine has the same code as the trial's own process.

    Args:
        code: see `check_same_code`.
        loop, worker, config: see `make_trainer`.
    """
    with keeping_traceback():
        check_same_code(code)
    loop(worker, config)


def run_worker(worker: str, config: dict) -> None:
    """What each worker runs: starts this rank's stream, then calls the worker's function.

    While the stream fills, it imports the function's module, which takes long: it needs models, and the
    trial's own process, which imports this module, does not.

    Args:
        worker: see `make_trainer`.
        config: the function's arguments, and the stream's `cursor`.
    """
    show_phase("start")
    checkpoint = ray.train.get_checkpoint()
    start = step_of(posixpath.basename(checkpoint.path)) if checkpoint else 0
    rank = ray.train.get_context().get_world_rank()
    if "folder" in config:
        write_worker(config["folder"], rank)
    batches = stream.Stream(
        config["worklist"], ray.train.get_dataset_shard, config.pop("cursor"), rank, start
    )
    module, _, function = worker.partition(":")
    with keeping_traceback():
        call = getattr(import_module(module), function)
        if "folder" in config and (gpu := gpu_name()):
            write_worker(config["folder"], rank, gpu)
        call(stream=batches, **config)


def gpu_name() -> str | None:
    """The name of this worker's GPU; None if it trains on the CPU."""
    import torch  # here, since the trial's own process needs none of it
    from ray.train.torch import get_device

    device = get_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
