"""The runs of findings.py: their data, their settings, and how one is trained, without Ray."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors.torch import load_file

from bench.record import ROOT
from deit_ray.data import shards
from deit_ray.data.blocks import Samples, make_samples
from deit_ray.data.images import encode
from deit_ray.data.sources import Digits
from deit_ray.experiment.config import Experiment
from deit_ray.experiment.load import load_experiment
from deit_ray.models.student import save_model
from deit_ray.training.evaluate import evaluate
from deit_ray.training.step import Batch
from deit_ray.training.worker import describe
from deit_ray.trial.reading import make_recipe, make_worklist
from deit_ray.trial.resolve import resolve
from tests.support.training import CONVNET, CPU, local_batches, make_step

SEEDS = {"digits": 5, "cifar": 3}
DIGITS_A_CLASS = 15  # training images; all others are test images
CIFAR_A_CLASS = 500
QUALITY = 92  # of the digits' JPEGs, as `deit-ray data prepare digits` makes them
TEACHER_SEED = 100  # seed of the first teacher
EVERY = {"digits": 2, "cifar": 30}  # epochs between evaluations of a teacher
EQUAL = 0.01  # largest difference of the accuracies of teachers that count as equal
WARM_UP = 3  # steps before the time of a step is measured
MEASURED = 8  # steps
UNUSED = "none"  # the teacher's file of a run without a teacher
HEADS = ("top1", "top1_cls", "top1_dist")

Line = dict  # a run's result, see `train_run`

PLAIN = {"student.model": "deit_tiny_patch16_224"}  # without the distillation token
NONE = PLAIN | {"distillation.kind": "none"}
# each kind with the weight that the paper gives it
HARD = {"distillation.kind": "hard", "distillation.weight": 0.5}
SOFT = PLAIN | {"distillation.kind": "soft", "distillation.weight": 0.1, "distillation.temperature": 3.0}
FILES = {"digits": "digits_student", "cifar": "cifar10_student"}  # in experiments/
# What differs from these files. The digits have the paper's augmentation (arXiv:2012.12877, table 9), but at
# half its strength, since at the full one a student without a teacher learns too slowly for 1,200 steps.
BASES = {
    "digits": {
        "augment.policy": "randaugment",
        "augment.random_erasing": 0.25,
        "augment.mixup": 0.8,
        "augment.cutmix": 1.0,
        "augment.strength": 0.5,
        "data.views": 3,
        "train.batch_size": 30,
        "train.epochs": 240,
        "optim.warmup_epochs": 10,
    },
    "cifar": {
        "student.patch_size": 8,
        "student.width": 96,
        "student.depth": 4,
        "student.heads": 3,
        "train.batch_size": 125,
        "train.epochs": 30,
        "optim.warmup_epochs": 2,
    },
}
CONVNET_TEACHER = CONVNET | {"student.drop_path": 0.0}


@dataclass(frozen=True)
class Arm:
    """One setting, which is run with every seed.

    Attributes:
        keys: what differs from the part's base, by dotted key.
        teacher: name of the teacher's arm, or of one that was stopped as good as the other one.
        teaches: whether the arm is a teacher, which is evaluated while it trains.
    """

    keys: dict
    teacher: str | None = None
    teaches: bool = False


ARMS = {
    "digits": {
        "convnet": Arm(CONVNET_TEACHER, teaches=True),
        "transformer": Arm(NONE, teaches=True),
        "none": Arm(NONE),
        "soft": Arm(SOFT | {"distillation.soft_mean": "batch"}, "convnet"),
        "soft_elements": Arm(SOFT | {"distillation.soft_mean": "elements"}, "convnet"),
        "hard": Arm(PLAIN | HARD, "convnet"),
        "token": Arm(HARD, "convnet"),
        "token_equal_convnet": Arm(HARD, "convnet_equal"),
        "token_equal_transformer": Arm(HARD, "transformer_equal"),
        "no_randaugment": Arm(NONE | {"augment.policy": "none", "augment.color_jitter": 0.0}),
        "no_mixup": Arm(NONE | {"augment.mixup": 0.0}),
        "no_cutmix": Arm(NONE | {"augment.cutmix": 0.0}),
        "no_mixing": Arm(NONE | {"augment.mixup": 0.0, "augment.cutmix": 0.0}),
        "no_erasing": Arm(NONE | {"augment.random_erasing": 0.0}),
        "no_repeated": Arm(NONE | {"data.views": 1}),
    },
    "cifar": {
        "convnet": Arm(CONVNET_TEACHER, teaches=True),
        "none": Arm(NONE),
        "soft": Arm(SOFT | {"distillation.soft_mean": "batch"}, "convnet"),
        "hard": Arm(PLAIN | HARD, "convnet"),
        "token": Arm(HARD, "convnet"),
    },
}


def write_digits(uri: str, seed: int) -> None:
    """Writes scikit-learn's digits: 15 of each class, drawn by the seed, for training, the rest to test."""
    from sklearn.datasets import load_digits

    labels = load_digits().target
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = [order[labels[order] == digit][:DIGITS_A_CLASS] for digit in range(10)]
    train = np.sort(np.concatenate(chosen))
    numbers = {"train": train, "test": np.setdiff1d(order, train)}
    splits, counts = {}, {}
    for split, places in numbers.items():
        pixels = Digits().read(pa.table({"offset": places}))
        rows = (
            (encode(image, 0, QUALITY), int(labels[place]), f"digit-{place:04d}")
            for place, image in zip(places, pixels, strict=True)
        )
        splits[split], counts[split] = shards.write_split(uri, split, rows)
    shards.write_manifest(uri, [str(digit) for digit in range(10)], splits, counts, {})


def write_cifar(uri: str, checkout: Path) -> None:
    """Writes the first 500 images of each class of CIFAR-10 for training, and all test images."""
    classes = sorted(path.name for path in (checkout / "train").iterdir() if path.is_dir())
    splits, counts = {}, {}
    for split, count in (("train", CIFAR_A_CLASS), ("test", None)):
        rows = (
            (image.read_bytes(), label, image.name)
            for label, name in enumerate(classes)
            for image in sorted((checkout / split / name).iterdir())[:count]
        )
        splits[split], counts[split] = shards.write_split(uri, split, rows)
    shards.write_manifest(uri, classes, splits, counts, {})


@dataclass(frozen=True)
class Run:
    """An arm with one seed, which decides the draws, and for the digits the training images too."""

    part: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.part} {self.arm} {self.seed}"

    @property
    def teaches(self) -> bool:
        return ARMS[self.part][self.arm].teaches

    @property
    def teachers(self) -> list["Run"]:
        """The runs that must have finished before."""
        teacher = ARMS[self.part][self.arm].teacher
        names = {None: [], "convnet": ["convnet"]}.get(teacher, ["convnet", "transformer"])
        return [Run(self.part, name, self.seed) for name in names]

    def experiment(self, work: Path, teacher: str = UNUSED) -> Experiment:
        """The run's settings.

        Args:
            work: the folder of data sets and models.
            teacher: path of the teacher's model.
        """
        data = f"digits-{self.seed}" if self.part == "digits" else "cifar"
        keys = BASES[self.part] | ARMS[self.part][self.arm].keys
        common = {
            "data.uri": str(work / data),
            "data.holdout": 0.0,
            "distillation.teacher.weights": teacher,
            "optim.ema_decay": 0.0,
            "results.uri": str(work),
            # a teacher never has the draws of its students
            "seed": self.seed + (TEACHER_SEED if self.teaches else 0),
        }
        return load_experiment(ROOT / "experiments" / f"{FILES[self.part]}.yaml", keys | common)

    def settings(self, work: Path) -> str:
        """A hash of everything that decides the run's result, its teachers' settings included."""
        tree = self.experiment(work).as_dict()
        del tree["data"]["uri"], tree["results"], tree["distillation"]["teacher"]
        teacher = ARMS[self.part][self.arm].teacher
        parts = [tree, teacher, *(run.settings(work) for run in self.teachers)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def model_path(self, work: Path, epoch: int) -> Path:
        """The file of a teacher as it is after an epoch."""
        name = f"{self.part}-{self.arm}-{self.seed}-{self.settings(work)}-{epoch}.safetensors"
        return work / "models" / name


def train_run(run: Run, work: Path) -> Line:
    """Trains a run to its end. The data, and the results of the runs of its teachers, are in `work`.

    Returns:
        top1 and, with the distillation token, top1_cls and top1_dist, fractions of the test images; core_s;
        curve, of a teacher: (epoch, top1) of each evaluation; teacher_top1, of a distilled student.
    """
    teacher = find_teacher(run, work)
    trial = Trial(run.experiment(work, str(teacher.path) if teacher else UNUSED))
    begin = time.process_time()
    curve = []
    for epoch in range(1, trial.experiment.train.epochs + 1):
        trial.train_epoch()
        if run.teaches and epoch % EVERY[run.part] == 0:
            curve.append((epoch, trial.evaluate()["test/top1"]))
    metrics = trial.evaluate()
    figures = {key: metrics[f"test/{key}"] for key in HEADS if f"test/{key}" in metrics}
    if run.teaches:
        trial.save(run.model_path(work, trial.experiment.train.epochs))
        figures["curve"] = curve
    if teacher:
        figures["teacher_top1"] = teacher.top1
    return figures | {"core_s": round(time.process_time() - begin, 1)}


class Trial:
    """The training of one model in this process, with one thread."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.resolved = experiment, resolve(experiment)
        self.step = make_step(experiment, self.resolved)
        self.batches = local_batches(experiment, self.resolved, splits=())
        self.number = 0  # of the next step
        self.test = make_worklist(experiment, self.resolved.manifest, self.resolved.data, ("test",), epochs=0)

    @property
    def test_steps(self) -> int:
        return self.test.evaluation_steps("test")

    def train_epoch(self) -> None:
        for _ in range(self.step.steps_per_epoch):
            self.train_step()

    def train_step(self) -> None:
        self.step(Batch.of(next(self.batches), CPU), self.number)
        self.number += 1

    def evaluate(self, steps: int | None = None) -> dict[str, float]:
        """The accuracies on the test images, or on the first batches of them."""
        step = self.step
        steps = steps or self.test_steps
        return evaluate("test", step.model, None, self._test_batches(), steps, step.normalise, step.autocast)

    def _test_batches(self) -> Iterator[Samples]:
        recipe = make_recipe(self.experiment, "cpu")
        for task in self.test.tasks_between(0, 0):
            yield from make_samples(task, recipe, self.experiment.train.batch_size, 1)

    def save(self, path: Path) -> None:
        """Writes the model, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        description = describe(self.experiment, self.resolved.manifest.classes, False)
        unfinished = path.with_suffix(f".{os.getpid()}")
        save_model(unfinished, self.step.model.state_dict(), description)
        unfinished.replace(path)

    def load(self, path: Path) -> None:
        self.step.model.load_state_dict(load_file(path))


@dataclass(frozen=True)
class Teacher:
    path: Path
    top1: float


def find_teacher(run: Run, work: Path) -> Teacher | None:
    """The model that teaches a run, chosen by the results of its teachers' runs; None without a teacher."""
    if not run.teachers:
        return None
    results = read_results(work, run.teachers)
    curves = [results[teacher]["curve"] for teacher in run.teachers]
    kind = ARMS[run.part][run.arm].teacher.removesuffix("_equal")
    number = [teacher.arm for teacher in run.teachers].index(kind)
    if len(curves) == 1:
        return stop_teacher(run.teachers[0], curves[0][-1][0], work)
    place = equal_epochs(*curves)[number]
    return stop_teacher(run.teachers[number], curves[number][place][0], work)


def stop_teacher(run: Run, epoch: int, work: Path) -> Teacher:
    """A teacher as it is after an epoch, trained again until there if its model is not kept."""
    path = run.model_path(work, epoch)
    trial = Trial(run.experiment(work))
    if path.exists():
        trial.load(path)
    else:
        for _ in range(epoch):
            trial.train_epoch()
        trial.save(path)
    return Teacher(path, trial.evaluate()["test/top1"])


def equal_epochs(first: list, second: list) -> tuple[int, int]:
    """Where two teachers are equally good: the better one is stopped where it was as good as the other's end.

    Args:
        first, second: (epoch, top1) of each evaluation.

    Returns:
        The places in both lists. The worse teacher's is the last one.
    """
    if first[-1][1] < second[-1][1]:
        return equal_epochs(second, first)[::-1]
    goal = second[-1][1]
    # the latest of the nearest ones: it has learnt longest
    place = min(range(len(first)), key=lambda place: (abs(first[place][1] - goal), -place))
    return place, len(second) - 1


def keep_result(run: Run, result: Line, work: Path) -> None:
    """Writes a run's result as one line into a file of its own, whole or not at all."""
    path = _result_path(run, work)
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps({"run": str(run), "settings": run.settings(work)} | result) + "\n")
    unfinished.replace(path)


def read_results(work: Path, runs: list[Run]) -> dict[Run, Line]:
    """The results of those runs that have finished with their present settings."""
    results = {}
    for run in runs:
        path = _result_path(run, work)
        line = json.loads(path.read_text()) if path.exists() else {}
        if line.get("settings") == run.settings(work):
            results[run] = line
    return results


def _result_path(run: Run, work: Path) -> Path:
    return work / "results" / f"{run.part}-{run.arm}-{run.seed}.json"


def measure(run: Run, work: Path) -> tuple[float, int]:
    """Estimates a run's seconds of a core from a few steps, and counts its steps; its teacher is not trained.

    What other processes do at the same time hardly matters.
    """
    teacher = work / f"untrained-{run.part}.safetensors"
    if not teacher.exists():
        Trial(Run(run.part, "convnet", run.seed).experiment(work)).save(teacher)
    trial = Trial(run.experiment(work, str(teacher)))
    for _ in range(WARM_UP):
        trial.train_step()
    step_s = _seconds(trial.train_step, MEASURED)
    batch_s = _seconds(lambda: trial.evaluate(MEASURED), 1) / MEASURED
    epochs = trial.experiment.train.epochs
    evaluations = 1 + (epochs // EVERY[run.part] if run.teaches else 0)
    steps = epochs * trial.step.steps_per_epoch
    return steps * step_s + evaluations * trial.test_steps * batch_s, steps


def _seconds(function: Callable, times: int) -> float:
    begin = time.process_time()
    for _ in range(times):
        function()
    return (time.process_time() - begin) / times
