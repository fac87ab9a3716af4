"""Finds what limits a run: measures its step on synthetic data, its stream alone, and both together.

Ray is imported after `resolve`, so that a wrong model name is answered sooner.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial

from deit_ray.data import shards
from deit_ray.experiment.config import Experiment
from deit_ray.terminal.format import counted
from deit_ray.terminal.session import Session
from deit_ray.trial.needs import MODULES, Needs
from deit_ray.trial.reading import make_recipe, make_worklist
from deit_ray.trial.resolve import resolve

STEPS = 20_000  # steps of the work list: more than a measurement takes


@dataclasses.dataclass(frozen=True)
class Limits:
    """The measured speeds, summed over all workers.

    Attributes:
        step_per_s: images/s that the step trains on, with synthetic data.
        stream_per_s: images/s that the stream delivers while nothing trains.
        both_per_s: images/s that the step trains on, with images from the stream.
        data_wait: fraction of the time that the step waited for the stream, in the measurement of both.
        cpus: CPUs of the stream.
        workers: training workers.
    """

    step_per_s: float
    stream_per_s: float
    both_per_s: float
    data_wait: float
    cpus: float
    workers: int

    @property
    def by_stream(self) -> bool:
        """Whether the stream is the limit."""
        return self.stream_per_s < self.step_per_s

    @property
    def cpus_needed(self) -> float:
        """Stream CPUs for each worker that would deliver as many images as the step takes.

        Below one CPU they are rounded up to a tenth, else to a whole CPU.
        """
        needed = self.cpus * self.step_per_s / self.stream_per_s / self.workers
        return max(0.1, math.ceil(needed * 10) / 10) if needed <= 1 else math.ceil(needed)

    def sentence(self) -> str:
        cpus = counted(self.cpus, "stream CPU")
        step = f"the step takes {self.step_per_s:,.0f} images/s of synthetic data"
        stream = f"{cpus} give{'s' * (self.cpus == 1)} {self.stream_per_s:,.0f}"
        both = f"together they train on {self.both_per_s:,.0f} and wait {self.data_wait:.0%} of the time"
        feed = f"{self.cpus_needed:g} for each worker would feed it (data.cpus_per_worker)"
        limit = "stream" if self.by_stream else "step"
        return f"the {limit} is the limit: {step}, {stream}, {both}; about {feed}"


def bench_data(experiment: Experiment, seconds: float = 10.0, session: Session | None = None) -> Limits:
    """Runs an experiment's step on synthetic data, then its stream alone, then both together.

    Args:
        experiment: see `load_experiment`. Searched keys have the values of the experiment itself.
        seconds: approximate seconds of each measurement; longer if one step, or one round of the stream's
            tasks, takes longer.
        session: see `Session`.

    Raises:
        UserError: the experiment cannot run.
    """
    experiment = experiment.with_overrides({"search.space": {}})
    resolved = resolve(experiment)
    from deit_ray.cluster import connect
    from deit_ray.trial.launch import check_fits, run_trial, share

    with (session or Session()).connected(MODULES):
        device = check_fits(experiment, connect.possible_resources())
        connect.check_reachable("data.uri", experiment.data.uri)
        make = partial(_make_trainer, experiment, device, share(resolved), seconds)
        # Ray Train needs a folder; nothing in it is kept
        with tempfile.TemporaryDirectory(prefix="deit_ray-") as folder:
            found = run_trial(make, f"{folder}/bench", lambda metrics: None)
    values = {
        name.removeprefix("bench/"): value for name, value in found.items() if name.startswith("bench/")
    }
    return Limits(**values, cpus=_tasks(experiment, device), workers=experiment.train.workers)


def _tasks(experiment: Experiment, device: str) -> int:
    """Number of stream tasks at once; each keeps one CPU busy, even if only a part of it is reserved."""
    return max(1, int(Needs.of(experiment, device).stream_cpus))


def _make_trainer(experiment: Experiment, device: str, shared, seconds: float, config: dict, on_report):
    """The trainer whose workers run `_measure`; `shared` is a `Shared`."""
    from deit_ray.trial.assemble import TRAIN, make_trainer

    manifest: shards.Manifest = shared.manifest
    per_epoch = max(1, make_worklist(experiment, manifest, shared.data, ()).steps_per_epoch)
    worklist = make_worklist(experiment, manifest, shared.data, (), epochs=math.ceil(STEPS / per_epoch))
    job = {
        "classes": manifest.classes,
        "exif": manifest.exif,
        "teacher": shared.teacher,
        "initial": shared.initial,
    }
    # batches of one round of tasks; within a round they arrive unevenly
    turn = _tasks(experiment, device) * worklist.task_steps
    keeps_crops = make_recipe(experiment, device).keep_crops
    loop = partial(_measure, seconds, min(turn, worklist.steps_per_epoch), keeps_crops)
    return make_trainer(experiment, device, TRAIN, job, worklist, config["folder"], on_report, loop)


def _measure(seconds: float, turn: int, keeps_crops: bool, worker: str, config: dict) -> None:
    """The loop of each worker: takes the three measurements and reports them.

    Args:
        seconds: see `bench_data`.
        turn: batches of a round of the stream's tasks.
        keeps_crops: whether samples have the crops for the teacher too.
        worker, config: see `assemble.run_worker`; the worker's function is not called.
    """
    import ray.train
    import ray.train.torch
    import torch

    from deit_ray.data.stream import Stream
    from deit_ray.training.clock import Clock
    from deit_ray.training.step import Batch
    from deit_ray.training.worker import TrainJob, make_train_step, sum_over_workers

    cursor = config.pop("cursor")
    experiment, worklist = config["experiment"], config["worklist"]
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(experiment.train.threads)
    train_step = make_train_step(TrainJob(stream=None, folder="", **config), rank, world_size, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    batch_size, steps = experiment.train.batch_size, iter(range(worklist.steps))

    def count_in(second_each: float) -> int:
        """Number of repetitions that fit into the time; every worker gets the same number."""
        return max(1, round(sum_over_workers(min(1000, seconds / second_each)) / world_size))

    def train_on_synthetic() -> None:
        train_step(Batch.of(synthetic, device), next(steps))

    synthetic = synthetic_samples(batch_size // world_size, experiment.data.image_size, keeps_crops)
    train_on_synthetic()  # the first step chooses kernels and fills caches
    count = count_in(seconds_of(train_on_synthetic, 1, wait))
    step_per_s = batch_size / seconds_of(train_on_synthetic, count, wait)

    stream = Stream(worklist, ray.train.get_dataset_shard, cursor, rank, 0)
    for _ in range(turn):  # the start of the stream is not measured
        next(stream)
    taken, begin = 0, time.perf_counter()
    while sum_over_workers(time.perf_counter() - begin) < seconds * world_size:
        for _ in range(turn):
            next(stream)
        taken += turn
    stream_per_s = taken * batch_size / (time.perf_counter() - begin)

    clock = Clock(stream, device)
    for _ in range(count_in(batch_size / min(step_per_s, stream_per_s))):
        samples = next(stream)
        with clock.step():
            train_step(Batch.of(samples, device), next(steps))
        clock.count(batch_size, 0)
    wait()
    clock.enter("evaluation")
    both = clock.read()
    ray.train.report({
        "bench/step_per_s": step_per_s, "bench/stream_per_s": stream_per_s,
        "bench/both_per_s": both["perf/images_per_s"], "bench/data_wait": both["perf/data_wait_frac"],
    })  # fmt: skip


def synthetic_samples(count: int, size: int, keeps_crops: bool):
    """Samples of noise, in the form in which the stream delivers samples."""
    import numpy as np

    from deit_ray.data.blocks import Samples

    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    zeros = np.zeros(count, np.int64)
    arrays = {
        "images": images,
        "labels": zeros,
        "ids": np.arange(count),
        "views": zeros,
        "valid": np.ones(count, bool),
    }
    if keeps_crops:
        arrays["crops"] = images
    return Samples(arrays, "train", 0, 0)


def seconds_of(function: Callable[[], None], times: int, wait: Callable[[], None]) -> float:
    """Mean seconds of a call, over `times` calls in a row; `wait` waits for the device."""
    wait()
    begin = time.perf_counter()
    for _ in range(times):
        function()
    wait()
    return (time.perf_counter() - begin) / times
