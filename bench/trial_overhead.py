"""How much longer a trial lasts than its work: ours, beside the pattern of Ray's documentation.

Overhead is a trial's wall time, from the start of `Tuner.fit` to its return, less the time inside optimizer
steps and evaluations. All trials train the same student with the same steps, evaluations and checkpoints for
10 epochs of digits; they differ in the data's way and in what runs it:

- ours: a study of one trial, as `deit-ray tune` runs it, Optuna and MLflow included.
- plain: https://docs.ray.io/en/latest/train/user-guides/hyperparameter-optimization.html and
  data-loading-preprocessing.html: a driver function, given to Tune, calls `TorchTrainer.fit`; each epoch
  iterates over the datasets again.
- one execution: the same, but one iteration whose rows are all epochs' rows, for the training images and for
  `val`. They come from a copy of the file for each epoch: Ray reads a path given ten times once, and a union
  of ten datasets lists files ten times, which took 22 s before the first batch.

Where the pattern leaves a choice it gets what is fastest: files without the rows that it does not use,
nothing shuffled, models imported by the worker alone, all CPUs but the worker's for the data.

And what the start of a trial costs in CPU time, beside the commit before it was made cheaper: see
start_cpu.py. Both take about 15 minutes on 2 CPU cores.

    python bench/trial_overhead.py [--part overhead|start] [--repeat N]
"""

import argparse
import contextlib
import io
import itertools
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import ray
import ray.train
import ray.tune
from record import ROOT, record
from start_cpu import measure_start_cpu

import deit_ray
from deit_ray.augment import kernel_cv2
from deit_ray.cluster import connect
from deit_ray.cluster.ray_private import forked_workers
from deit_ray.data import crop, stream
from deit_ray.data.blocks import Recipe, Samples
from deit_ray.data.worklist import WorkList
from deit_ray.study import driver
from deit_ray.trial.assemble import make_recipe, make_worklist, run_worker
from deit_ray.trial.needs import MODULES
from deit_ray.trial.resolve import Resolved, resolve

EPOCHS = 10
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["overhead", "start"], help="only this one")
    parser.add_argument(
        "--repeat", type=int, default=3, help="trials of each way, of which the median counts"
    )
    arguments = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench.prepare(Path(folder))
        if arguments.part != "start":
            figures |= measure_overhead(bench, arguments.repeat)
        if arguments.part != "overhead":
            figures |= measure_start_cpu(str(bench.folder / "digits"), str(bench.resolved.teacher_path))
    record("trial_overhead", {name: round(value, 3) for name, value in figures.items()})


def measure_overhead(bench: "Bench", repeat: int) -> dict[str, float]:
    """Runs trials of each way in turn, each on a Ray of its own."""
    ways = {
        "ours": partial(run_study, bench),
        "plain": partial(run_documented, bench, one_execution=False),
        "one_execution": partial(run_documented, bench, one_execution=True),
    }
    measured = {name: [] for name in ways}
    for turn in range(repeat):
        for name, way in ways.items():
            with local_ray(f"{bench.folder}/ray", forks=name == "ours"):
                trial = measure(way, bench.folder / f"{name}-{turn}.json", bench.worklist.steps)
            measured[name].append(trial)
            print(f"{name:14} {trial}", flush=True)
    figures = {}
    for name, trials in measured.items():
        medians = {
            key: statistics.median(getattr(trial, key) for trial in trials)
            for key in ("overhead_s", "first_step_s", "end_s")
        }
        figures |= {
            f"{name}_s": medians["overhead_s"],
            f"{name}_first_step_s": medians["first_step_s"],
            f"{name}_end_s": medians["end_s"],
        }
        print(f"{name:14} median overhead {medians['overhead_s']:.2f} s")
    figures["overhead_ratio"] = figures["ours_s"] / figures["plain_s"]
    figures["overhead_ratio_one_execution"] = figures["ours_s"] / figures["one_execution_s"]
    return figures


@contextlib.contextmanager
def local_ray(folder: str, forks: bool) -> Iterator[None]:
    """A Ray of two CPUs with a running worker process, so that no trial includes the start of Ray.

    Args:
        forks: its processes are forked, as those of the Ray that deit-ray starts; the documented pattern
            knows none of that.
    """
    with forked_workers(MODULES) if forks else contextlib.nullcontext():
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    try:
        ray.get(ray.remote(lambda: None).remote())
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Bench:
    """What all trials have in common.

    Attributes:
        folder: of the benchmark's files; `train` and `val` in it hold the documented pattern's, a copy for
            each epoch.
        experiment: a study of one trial.
        resolved: the things that it names.
        recipe: of the samples.
        worklist: says how many steps and evaluations there are.
    """

    folder: Path
    experiment: deit_ray.Experiment
    resolved: Resolved
    recipe: Recipe
    worklist: WorkList

    @classmethod
    def prepare(cls, folder: Path) -> "Bench":
        """Prepares digits and trains the teacher."""
        deit_ray.prepare("digits", str(folder / "digits"))
        where = {"data.uri": str(folder / "digits"), "results.uri": str(folder / "results")}
        experiments = ROOT / "experiments"
        deit_ray.train(
            deit_ray.load_experiment(experiments / "digits_teacher.yaml", where | {"train.epochs": 5})
        )
        one_trial = {
            "train.epochs": EPOCHS,
            "search.trials": 1,
            "search.space": {"optim.lr": {"log": [1e-3, 4e-3]}},
        }
        experiment = deit_ray.load_experiment(experiments / "digits_student.yaml", where | one_trial)
        resolved = resolve(experiment)
        worklist = make_worklist(experiment, resolved.manifest, resolved.data, ("val",))
        table = pq.read_table(folder / "digits" / "train-00000.parquet", columns=["image", "label"])
        held_out = worklist.train.images
        for split, rows in (("train", table.slice(0, held_out)), ("val", table.slice(held_out))):
            for copy in range(EPOCHS):
                (folder / split).mkdir(exist_ok=True)
                pq.write_table(rows, folder / split / f"{copy}.parquet")
        return cls(folder, experiment, resolved, make_recipe(experiment, "cpu"), worklist)


@dataclass(frozen=True)
class Measured:
    """What a trial took, in seconds.

    Attributes:
        wall_s: from the start of `Tuner.fit` to its return.
        work_s: inside optimizer steps and evaluations.
        first_step_s: from the start of `Tuner.fit` to the first optimizer step.
        end_s: from the end of the last optimizer step to the return of `Tuner.fit`, the last evaluation
            included.
    """

    wall_s: float
    work_s: float
    first_step_s: float
    end_s: float

    @property
    def overhead_s(self) -> float:
        return self.wall_s - self.work_s

    def __str__(self) -> str:
        return (
            f"overhead {self.overhead_s:6.2f} s  (wall {self.wall_s:6.2f}, work {self.work_s:5.2f}; "
            f"to the first step {self.first_step_s:5.2f}, from the last step {self.end_s:5.2f})"
        )


def measure(way: Callable[[Path], None], notes: Path, steps: int) -> Measured:
    """Runs one trial whose worker writes its `Work` to a file."""
    fit, span = ray.tune.Tuner.fit, []

    def timed_fit(tuner):
        span.append(time.perf_counter())
        try:
            return fit(tuner)
        finally:
            span.append(time.perf_counter())

    nowhere = io.StringIO()
    with (
        mock.patch.object(ray.tune.Tuner, "fit", timed_fit),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        way(notes)
    begin, end = span
    work = Work(**json.loads(notes.read_text()))
    if (work.steps, work.evaluations) != (steps, EPOCHS):
        raise RuntimeError(
            f"{work.steps} steps and {work.evaluations} evaluations instead of {steps} and {EPOCHS}"
        )
    return Measured(end - begin, work.inside_s, work.first_step - begin, end - work.last_step_end)


@dataclass
class Work:
    """A worker's notes of when it worked. The clock, `time.perf_counter`, is the machine's, the same in all
    processes.

    Attributes:
        steps, evaluations: how many there were.
        inside_s: seconds inside them. What an evaluation waits for its images is not work.
        first_step, last_step_end: times.
    """

    steps: int = 0
    evaluations: int = 0
    inside_s: float = 0.0
    first_step: float = 0.0
    last_step_end: float = 0.0

    def step(self, call: Callable, *arguments):
        """Takes an optimizer step."""
        begin = time.perf_counter()
        result = call(*arguments)
        self.last_step_end = time.perf_counter()
        self.first_step = self.first_step or begin
        self.inside_s += self.last_step_end - begin
        self.steps += 1
        return result

    def evaluate(self, call: Callable, split, model, ema, batches: Iterator, *arguments):
        """Evaluates."""
        waiting_s = 0.0

        def without_waiting():
            nonlocal waiting_s
            while True:
                asked = time.perf_counter()
                batch = next(batches)
                waiting_s += time.perf_counter() - asked
                yield batch

        begin = time.perf_counter()
        result = call(split, model, ema, without_waiting(), *arguments)
        self.inside_s += time.perf_counter() - begin - waiting_s
        self.evaluations += 1
        return result

    def write(self, notes: Path) -> None:
        notes.write_text(json.dumps(vars(self)))


def run_study(bench: Bench, notes: Path) -> None:
    """Ours."""
    make_noted = partial(driver.make_trial, loop=NotedLoop(notes))
    with mock.patch.object(driver, "make_trial", make_noted), mock.patch.dict(os.environ, QUIET):
        deit_ray.tune(bench.experiment)


class NotedLoop:
    """Our worker's loop, which writes down its work; otherwise it does the same in the same order."""

    def __init__(self, notes: Path):
        self.notes = notes

    def __call__(self, name: str, config: dict) -> None:
        work, make_stream = Work(), stream.Stream

        def make_stream_then_patch(*arguments):
            batches = make_stream(*arguments)  # flows while the models are imported, as without the notes
            from deit_ray.training import worker
            from deit_ray.training.step import TrainStep

            step, evaluate = TrainStep.__call__, worker.evaluate
            TrainStep.__call__ = lambda *arguments: work.step(step, *arguments)
            worker.evaluate = partial(work.evaluate, evaluate)
            return batches

        with mock.patch.object(stream, "Stream", make_stream_then_patch):
            run_worker(name, config)
        work.write(self.notes)


def run_documented(bench: Bench, notes: Path, one_execution: bool) -> None:
    """The pattern of Ray's documentation."""
    batch_size, val_steps = bench.experiment.train.batch_size, bench.worklist.evaluation_steps("val")
    # in one iteration no batch may hold images of two evaluations: 144 images are three full batches of 48
    val_batch_size = bench.worklist.evaluations["val"].images // val_steps if one_execution else batch_size
    config = {
        "experiment": bench.experiment,
        "classes": bench.resolved.manifest.classes,
        "exif": bench.resolved.manifest.exif,
        "teacher": ray.put(bench.resolved.teacher),
        "one_execution": one_execution,
        "steps": {"train": bench.worklist.steps_per_epoch, "val": val_steps},
        "batch_size": {"train": batch_size, "val": val_batch_size},
        "notes": notes,
    }
    driver = ray.tune.with_parameters(
        documented_driver, folder=bench.folder, recipe=bench.recipe, train_loop_config=config
    )
    results = ray.tune.Tuner(
        ray.tune.with_resources(driver, {connect.HEAD: 0.001}),  # leaves the CPUs to the worker and the data
        run_config=ray.tune.RunConfig(name=notes.stem, storage_path=str(bench.folder / "tune"), verbose=0),
    ).fit()
    if results.errors:
        raise results.errors[0]


def documented_driver(config: dict, folder: Path, recipe: Recipe, train_loop_config: dict) -> None:
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    files = "" if train_loop_config["one_execution"] else "0.parquet"
    datasets = {
        split: ray.data.read_parquet(str(folder / split / files)).map_batches(
            decode_and_crop, fn_kwargs={"recipe": recipe, "split": split}
        )
        for split in ("train", "val")
    }
    TorchTrainer(
        documented_loop,
        train_loop_config=train_loop_config,
        datasets=datasets,
        scaling_config=ray.train.ScalingConfig(
            num_workers=1, resources_per_worker={"CPU": train_loop_config["experiment"].train.cpus_per_worker}
        ),
        run_config=ray.train.RunConfig(
            name=f"train-{ray.tune.get_context().get_trial_id()}",
            storage_path=str(folder / "documented"),
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


def decode_and_crop(batch: dict[str, np.ndarray], recipe: Recipe, split: str) -> dict[str, np.ndarray]:
    """What our stream does to each image, with draws that need no epoch."""
    geometry, count = recipe.geometry, len(batch["image"])
    images = np.zeros((count, geometry.size, geometry.size, 3), np.uint8)
    ids, views = np.random.randint(2**31, size=count), np.zeros(count, np.int64)
    draws = crop.draw(geometry, 0, ids, views)
    for i, jpeg in enumerate(batch["image"]):
        if split == "train":
            crop.crop_view(crop.decode(jpeg), geometry, draws[i], images[i])
        else:
            crop.crop_centre(crop.decode(jpeg), geometry, images[i])
    if split == "train":
        kernel_cv2.augment_images(
            images, recipe.photometric.stages(0, ids, views, geometry.size, geometry.size)
        )
    return {"image": images, "label": batch["label"]}


def documented_loop(config: dict) -> None:
    import torch

    from deit_ray.models.student import create_student
    from deit_ray.training.checkpoint import Progress, save_checkpoint
    from deit_ray.training.evaluate import evaluate
    from deit_ray.training.step import Batch, TrainStep
    from deit_ray.training.worker import describe

    experiment, classes, steps, device = (
        config["experiment"],
        config["classes"],
        config["steps"],
        torch.device("cpu"),
    )
    torch.set_num_threads(experiment.train.threads)
    torch.manual_seed(experiment.seed)
    model = create_student(experiment.student, experiment.data.image_size, len(classes))
    train_step = TrainStep(
        experiment, model, model, ray.get(config["teacher"]), len(classes), steps["train"], 0, device
    )
    ema, description, work = train_step.ema.module, describe(experiment, classes, False), Work()

    train, val = (epochs_of(split, config) for split in ("train", "val"))
    for epoch in range(EPOCHS):
        for samples in next(train):
            work.step(train_step, Batch.of(samples, device), work.steps)
        batches = next(val)
        metrics = work.evaluate(
            evaluate, "val", model, ema, batches, steps["val"], train_step.normalise, train_step.autocast
        )
        for _ in batches:  # nothing is left but the end of the iteration
            pass
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder), train_step, Progress(work.steps), description)
            ray.train.report(
                metrics | {"epoch": epoch + 1}, checkpoint=ray.train.Checkpoint.from_directory(folder)
            )
    work.write(config["notes"])


def epochs_of(split: str, config: dict) -> Iterator[Iterator[Samples]]:
    """For each epoch its batches: of an iteration of its own, or of one iteration over all epochs' rows."""
    shard = ray.train.get_dataset_shard(split)
    iterate = partial(
        shard.iter_torch_batches, batch_size=config["batch_size"][split], drop_last=split == "train"
    )
    if config["one_execution"]:
        batches = iter(iterate())
        while True:
            yield map(samples_of, itertools.islice(batches, config["steps"][split]))
    while True:
        yield map(samples_of, iterate())


def samples_of(batch: dict) -> Samples:
    """A batch in the form that steps and evaluations take; arrays are not copied."""
    count = len(batch["label"])
    arrays = {
        "images": batch["image"].numpy(),
        "labels": batch["label"].numpy().astype(np.int64),
        "ids": np.arange(count),
        "views": np.zeros(count, np.int64),
        "valid": np.ones(count, bool),
    }
    return Samples(arrays, "", 0, 0)


if __name__ == "__main__":
    main()
