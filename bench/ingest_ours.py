"""Our side of bench/ingest.py: the stream as a training run has it, through Ray Train's controller to a worker that only takes batches.

A run is what `launch.run_trial` starts for any trial: an actor with Train's controller, a worker, the stream's tasks and
Ray's daemons; only the worker's loop is replaced. Its batches become tensors as they do before an optimizer step.
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
        data: a prepared folder. Its shards are read again and again, as if they were the many of a large data set.
        cpus: of the stream.
        views, size, batch, epochs: as in an experiment.
        images: in an epoch, about.
        samples: to be measured at least, in whole rounds of tasks, one on each CPU, after one round that is not; 0 takes all there are.
        first_only: ends with the first batch.
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
            {"name": "ingest", "data": data, "train": train, "distillation": {"kind": "none"},
             "augment": {"place": "device"}, "optim": {"warmup_epochs": 0}}  # photometric work is the device's
        )  # fmt: skip

    def worklist(self) -> WorkList:
        experiment, manifest = self.experiment(), read_manifest(self.data)
        times = max(1, self.images // manifest.rows("train"))
        return assemble.make_worklist(experiment, repeated(manifest, times), self.data, ())

    def rounds(self, worklist: WorkList) -> int:
        """Of tasks, one on each CPU, that make the samples."""
        return math.ceil(self.samples / (self.cpus * worklist.task_steps * self.batch))

    def recipe(self):
        return assemble.make_recipe(self.experiment(), "cpu")


def repeated(manifest: Manifest, times: int) -> Manifest:
    """A manifest that lists the training shards so many times; each time they are other images, with other ids."""
    return dataclasses.replace(manifest, splits={"train": manifest.splits["train"] * times})


@contextmanager
def local_ray(cpus: int, consumers: int = 1) -> Iterator[None]:
    """A Ray with so many CPUs for streams, and one for each consumer besides."""
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
    """Runs these at the same time, on the Ray that is there. For each, what `consume` found."""
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
    """What a trial's actor makes its trainer with: that of any run, but for the worker's loop."""

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
    """A worker's loop that takes batches as fast as they come."""

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
        """Samples per second and CPU seconds per sample, of whole rounds of tasks: within one, batches come unevenly."""
        turn, rounds = way.cpus * worklist.task_steps, way.rounds(worklist)
        warm, wanted = (turn, rounds * turn) if rounds else (0, worklist.steps - 1)
        for _ in itertools.islice(batches, warm):
            pass
        begin, cpu, times, memory = time.time(), cpu_seconds(self.root), [], []
        for number, _ in zip(range(wanted), batches, strict=False):
            times.append(time.time())
            if not rounds and number % 500 == 250:  # at no window's border
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
