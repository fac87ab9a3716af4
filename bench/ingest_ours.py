"""Our side of bench/ingest.py: the stream of a training run, with a worker that only takes batches.

A run is started by `launch.run_trial`, as every trial: an actor with Ray Train's controller, a worker, the
stream's tasks and Ray's daemons. Only the worker's loop is replaced. Batches become tensors in the same way
as before an optimizer step.
"""

import dataclasses
import itertools
import json
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import ray.train
from measure import cpu_seconds, memory_bytes

from deit_ray.data import stream
from deit_ray.data.shards import Manifest, read_manifest
from deit_ray.data.worklist import WorkList
from deit_ray.experiment.config import Experiment
from deit_ray.trial import assemble, launch

IMAGENET = 1_281_167  # training images


@dataclasses.dataclass(frozen=True)
class Way:
    """One run to measure.

    Attributes:
        data: a prepared folder. Its shards are read many times, as if they were shards of a large data set.
        cpus: number of the stream's CPUs.
        views, size, batch, epochs: as in an experiment.
        images: number of images of an epoch, about.
        samples: least number of samples to measure. Whole rounds of tasks are measured, with one task on
            each CPU, after a first round that is not measured. 0 measures all samples of the run.
        first_only: whether the run ends with the first batch.
    """

    data: str
    cpus: int
    views: int = 3
    size: int = 224
    batch: int = 256
    epochs: int = 1
    images: int = IMAGENET
    samples: int = 60_000
    first_only: bool = False

    def experiment(self) -> Experiment:
        data = {
            "uri": self.data,
            "views": self.views,
            "image_size": self.size,
            "holdout": 0.0,
            "cpus_per_worker": float(self.cpus),
        }
        train = {"batch_size": self.batch, "epochs": self.epochs, "device": "cpu"}
        return Experiment.model_validate(
            {
                "name": "ingest",
                "data": data,
                "train": train,
                "distillation": {"kind": "none"},
                "augment": {"place": "device"},  # so the stream does no photometric work
                "optim": {"warmup_epochs": 0},
            }
        )

    def worklist(self) -> WorkList:
        experiment, manifest = self.experiment(), read_manifest(self.data)
        times = max(1, self.images // manifest.rows("train"))
        return assemble.make_worklist(experiment, repeated(manifest, times), self.data, ())

    def rounds(self, worklist: WorkList) -> int:
        """Number of rounds of tasks, one task on each CPU, that make `samples`."""
        return math.ceil(self.samples / (self.cpus * worklist.task_steps * self.batch))

    def recipe(self):
        return assemble.make_recipe(self.experiment(), "cpu")


def repeated(manifest: Manifest, times: int) -> Manifest:
    """A manifest that lists the training shards so many times; each repetition has its own image ids."""
    return dataclasses.replace(manifest, splits={"train": manifest.splits["train"] * times})


@contextmanager
def local_ray(cpus: int, consumers: int = 1) -> Iterator[None]:
    """Runs a Ray with `cpus` CPUs for streams, and one more for each consumer."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        ray.init(
            num_cpus=cpus + consumers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        try:
            ray.get(ray.remote(lambda: None).remote())
            yield
        finally:
            ray.shutdown()


def measure(ways: list[Way]) -> list[dict]:
    """Runs these at the same time on the connected Ray; returns the figures of each, see `Consume`."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        notes = [Path(folder) / f"{number}.json" for number in range(len(ways))]
        failures = []

        def start(way: Way, note: Path):
            make = MakeTrainer(way, str(note), os.getpid())
            try:
                launch.run_trial(make, f"{folder}/{note.stem}", lambda metrics: None)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=start, args=pair) for pair in zip(ways, notes, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return [json.loads(note.read_text()) for note in notes]


@dataclasses.dataclass(frozen=True)
class MakeTrainer:
    """Makes the trainer of a run whose workers run `Consume`; called in the trial's actor."""

    way: Way
    notes: str
    root: int

    def __call__(self, config: dict, on_report):
        way, consume = self.way, Consume(self.way, self.notes, self.root)
        return assemble.make_trainer(
            way.experiment(), "cpu", assemble.TRAIN, {}, way.worklist(), config["folder"], on_report, consume
        )


@dataclasses.dataclass(frozen=True)
class Consume:
    """A worker's loop that takes batches as fast as they come, and writes its figures to a file.

    Attributes:
        way: the run.
        notes: path of the file.
        root: pid of the process whose descendants' CPU time and memory are measured.
    """

    way: Way
    notes: str
    root: int

    def __call__(self, worker: str, config: dict) -> None:
        import torch

        from deit_ray.training.step import Batch

        way, worklist, device = self.way, config["worklist"], torch.device("cpu")
        torch.set_num_threads(1)
        begin = time.perf_counter()
        batches = stream.Stream(worklist, ray.train.get_dataset_shard, config["cursor"], 0, 0)
        Batch.of(next(batches), device)
        found = {"startup_s": time.perf_counter() - begin}
        if not way.first_only:
            found |= self.take(way, worklist, (Batch.of(samples, device) for samples in batches))
        Path(self.notes).write_text(json.dumps(found))

    def take(self, way: Way, worklist: WorkList, batches: Iterator) -> dict:
        """Measures samples per second and CPU seconds per sample over whole rounds of tasks.

        Within a round, batches do not come evenly.
        """
        turn, rounds = way.cpus * worklist.task_steps, way.rounds(worklist)
        warm, wanted = (turn, rounds * turn) if rounds else (0, worklist.steps - 1)
        for _ in itertools.islice(batches, warm):
            pass
        begin, cpu, times, memory = time.time(), cpu_seconds(self.root), [], []
        for number, _ in zip(range(wanted), batches, strict=False):
            times.append(time.time())
            if not rounds and number % 500 == 250:  # not at a window's border
                memory.append(memory_bytes(self.root))
        seconds, samples = times[-1] - begin, len(times) * way.batch
        return {
            "samples_per_s": samples / seconds,
            "cpu_s_per_sample": (cpu_seconds(self.root) - cpu) / samples,
            "seconds": seconds,
            "begin": begin,
            "times": times,
            "memory_bytes": memory,
        }
