"""Trains the same small students through timm's training classes and through ours, and compares the losses.

    python bench/parity.py [--steps 100] [--reference FOLDER]

Both sides start from the same weights and see the same images in the same order, with the same draws of
mixup, cutmix and stochastic depth, on the CPU in float32. timm's side is its `Mixup`, `TokenDistillationTask`
or `ClassificationTask`, optimizer factory, `CosineLRScheduler`, `dispatch_clip_grad` and `ModelEma`; ours is
`training.step.TrainStep`. With --reference FOLDER, a checkout of facebookresearch/deit, the loss is its
losses.py instead. The cases are

- hard: hard distillation with mixup and cutmix;
- soft: soft distillation with timm's mean (`soft_mean: batch`), and clipped gradients;
- views: hard distillation with three views of an image. There the batch of each view is one of three ranks;
- deit3: DeiT III's recipe: binary cross entropy, LAMB, LayerScale, a rate that changes once an epoch.

Prints, for each case, the largest difference of a loss, and `max_loss_difference`, the largest of all: at
most 1e-4, or the exit status is 1. Also `max_ema_difference`, of a weight of the moving average after the
last step. It takes about a minute of one core.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import numpy as np
import timm
import timm.data.mixup
import torch
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task import ClassificationTask, TokenDistillationTask
from timm.utils import ModelEma, dispatch_clip_grad
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.record import record  # noqa: E402
from deit_ray import rng  # noqa: E402
from deit_ray.experiment.config import Experiment  # noqa: E402
from deit_ray.experiment.load import default_experiment  # noqa: E402
from deit_ray.models.student import create_student  # noqa: E402
from deit_ray.models.teacher import TeacherWeights, build_teacher  # noqa: E402
from deit_ray.training.step import Batch, TrainStep  # noqa: E402

CPU = torch.device("cpu")
CLASSES, SIZE, BATCH, STEPS_PER_EPOCH = 10, 32, 24, 20
ALLOWED = 1e-4
BASE = {
    "data.image_size": SIZE,
    "data.views": 1,
    "augment.policy": "none",
    "augment.random_erasing": 0.0,
    "augment.color_jitter": 0.0,
    "student": {
        "model": "deit_tiny_distilled_patch16_224",
        "patch_size": 8,
        "width": 48,
        "depth": 3,
        "heads": 3,
        "drop_path": 0.2,
    },
    "optim": {"lr": 2e-3, "warmup_epochs": 2, "ema_decay": 0.99},
    "train": {"epochs": 5, "batch_size": BATCH},
}
TEACHER_MODEL = "test_resnet"
TEACHER = {"distillation.teacher": {"weights": "pretrained"}}  # random weights, given to both sides
CASES = {
    "hard": TEACHER | {"distillation.kind": "hard"},
    "soft": TEACHER | {
        "distillation.kind": "soft",
        "distillation.soft_mean": "batch",
        "distillation.weight": 0.7,
        "optim.clip_grad": 1.0,
    },
    "views": TEACHER | {"distillation.kind": "hard", "data.views": 3},
    "deit3": {
        "student.model": "deit_tiny_patch16_224",
        "student.layer_scale": 1e-4,
        "optim.label_smoothing": 0.0,
        "optim.label_loss": "bce",
        "optim.kind": "lamb",
        "optim.schedule_per": "epoch",
    },
}  # fmt: skip
ELEMENTS = {"soft": {"distillation.soft_mean": "elements"}}  # the reference's mean


@dataclass(frozen=True)
class Differences:
    """Largest absolute differences of a loss, and of a weight of the moving average."""

    loss: float
    ema: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--reference", type=Path, help="a checkout of facebookresearch/deit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: compare(name, arguments.steps) for name in CASES}
    if arguments.reference:
        losses = read_losses(arguments.reference / "losses.py")
        found |= {f"reference_{name}": compare(name, arguments.steps, losses) for name in CASES}
    figures = {f"loss_difference_{name}": f"{differences.loss:.2g}" for name, differences in found.items()}
    largest = max(differences.loss for differences in found.values())
    figures = {name: float(value) for name, value in figures.items()} | {
        "max_loss_difference": float(f"{largest:.2g}"),
        "max_ema_difference": float(f"{max(d.ema for d in found.values()):.2g}"),
        "steps": arguments.steps,
    }
    record("parity", figures)
    if largest > ALLOWED:
        sys.exit(f"max_loss_difference is above {ALLOWED}")


def compare(case: str, steps: int, reference: ModuleType | None = None) -> Differences:
    """Trains one case on both sides.

    Args:
        reference: the reference's losses.py as a module; None for timm's classes.
    """
    keys = BASE | CASES[case] | (ELEMENTS.get(case, {}) if reference else {})
    experiment = default_experiment(keys)
    torch.manual_seed(0)
    student = create_student(experiment.student, SIZE, CLASSES)
    # timm normalises the images again for the teacher; the reference gives the teacher the student's input
    cfg = timm.get_pretrained_cfg(experiment.student.model if reference else TEACHER_MODEL)
    teacher = teacher_weights(list(cfg.mean), list(cfg.std)) if experiment.distils else None
    ours = TrainStep(experiment, student, student, teacher, CLASSES, STEPS_PER_EPOCH, 0, CPU)
    theirs = TheirStep(experiment, deepcopy(student), teacher, reference)
    differences = []
    for step in range(steps):
        batch = make_batch(step, experiment.data.views)
        differences.append(abs(ours(batch, step)["loss"].item() - theirs(batch, step)))
    weights = zip(ours.ema.module.parameters(), theirs.ema.ema.parameters(), strict=True)
    return Differences(max(differences), max((a - b).abs().max().item() for a, b in weights))


def teacher_weights(mean: list[float], std: list[float]) -> TeacherWeights:
    """A small convolutional teacher with random weights."""
    torch.manual_seed(1)
    arguments = {"num_classes": CLASSES}
    model = timm.create_model(TEACHER_MODEL, **arguments)
    return TeacherWeights(TEACHER_MODEL, arguments, model.state_dict(), mean, std)


def make_batch(step: int, views: int) -> Batch:
    """The images of a step: blobs whose colour depends on the class, so that there is something to learn."""
    draws = np.random.default_rng([7, step])
    labels = draws.integers(0, CLASSES, BATCH)
    colours = np.random.default_rng(3).integers(0, 256, (CLASSES, 3))
    noise = draws.normal(0, 60, (BATCH, SIZE, SIZE, 3))
    images = (colours[labels][:, None, None] + noise).clip(0, 255).astype(np.uint8)
    places = np.arange(BATCH)
    tensors = {
        "images": torch.from_numpy(images),
        "labels": torch.from_numpy(labels),
        "valid": torch.ones(BATCH),
    }
    return Batch(tensors, places // views, places % views, step // STEPS_PER_EPOCH)


class TheirStep:
    """One training step as timm's train.py does it, with timm's classes."""

    def __init__(
        self,
        experiment: Experiment,
        student: nn.Module,
        teacher: TeacherWeights | None,
        reference: ModuleType | None,
    ):
        self.experiment, self.student = experiment, student
        optim, augment = experiment.optim, experiment.augment
        self.mixup = timm.data.Mixup(
            mixup_alpha=augment.mixup,
            cutmix_alpha=augment.cutmix,
            switch_prob=augment.mixup_switch,
            label_smoothing=optim.label_smoothing,
            num_classes=CLASSES,
        )
        network = build_teacher(teacher, CPU) if teacher else None
        if reference:
            self.loss = self._reference_loss(reference, network)
        else:
            self.loss = self._timm_loss(network)
        self.peak = optim.lr * BATCH / 512
        self.optimizer = create_optimizer_v2(
            student, opt=optim.kind, lr=self.peak, weight_decay=optim.weight_decay, eps=1e-8
        )
        self.per_epoch = optim.schedule_per == "epoch"
        length = 1 if self.per_epoch else STEPS_PER_EPOCH
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=experiment.train.epochs * length,
            lr_min=min(optim.min_lr, self.peak),
            warmup_t=optim.warmup_epochs * length,
            warmup_lr_init=optim.warmup_lr,
            t_in_epochs=self.per_epoch,
        )
        self.ema = ModelEma(student, decay=optim.ema_decay)
        data = experiment.data
        self.mean, self.std = (torch.tensor(x).view(1, 3, 1, 1) for x in (data.mean, data.std))

    def _timm_loss(self, teacher: nn.Module | None) -> Callable:
        distillation = self.experiment.distillation
        is_bce = self.experiment.optim.label_loss == "bce"
        criterion = (
            BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0) if is_bce else SoftTargetCrossEntropy()
        )
        if teacher is None:
            task = ClassificationTask(self.student, criterion, verbose=False)
        else:
            task = TokenDistillationTask(
                self.student,
                teacher,
                criterion,
                distill_type=distillation.kind,
                task_loss_weight=1 - distillation.weight,
                temperature=distillation.temperature,
                verbose=False,
            )
        return lambda images, targets: task.train()(images, targets)["loss"]

    def _reference_loss(self, reference: ModuleType, teacher: nn.Module | None) -> Callable:
        """The loss as main.py and engine.py of the reference put it together."""
        distillation = self.experiment.distillation
        is_bce = self.experiment.optim.label_loss == "bce"
        criterion = reference.DistillationLoss(
            nn.BCEWithLogitsLoss() if is_bce else SoftTargetCrossEntropy(),
            teacher,
            distillation.kind,
            distillation.weight,
            distillation.temperature,
        )

        def loss(images, targets):
            targets = targets.gt(0.0).type(targets.dtype) if is_bce else targets
            return criterion(images, self.student.train()(images), targets)

        return loss

    def __call__(self, batch: Batch, step: int) -> float:
        """Does one update; returns the loss."""
        if self.per_epoch:
            self.schedule.step(step // STEPS_PER_EPOCH)
        else:
            self.schedule.step_update(step)
        images, targets = self._mix(batch, step)
        seed = self.experiment.seed
        torch.manual_seed(rng.integer(seed, "drop path", step, 0))
        loss = self.loss(images, targets)
        self.optimizer.zero_grad()
        loss.backward()
        if clip := self.experiment.optim.clip_grad:
            dispatch_clip_grad(self.student.parameters(), clip, mode="norm")
        self.optimizer.step()
        self.ema.update(self.student)
        return loss.item()

    def _mix(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalised images and targets, mixed by timm: each view as the batch of a rank of its own."""
        images = (batch.images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        targets = torch.empty(BATCH, CLASSES)
        for view in np.unique(batch.views).tolist():
            own = np.flatnonzero(batch.views == view)
            draws = rng.generator(self.experiment.seed, "mix", step, 0, *([view] if view else []))
            with patch.object(timm.data.mixup, "np", fed_by(draws)):
                images[own], targets[own] = self.mixup(images[own], batch.labels[own])
        return images, targets


def fed_by(draws: np.random.Generator) -> SimpleNamespace:
    """What timm's Mixup calls numpy, drawing from a generator. Its first draw is whether to mix at all."""
    uniform = chain([0.0], iter(draws.random, None))
    random = SimpleNamespace(
        rand=lambda: next(uniform),
        beta=draws.beta,
        randint=lambda low, high, size: draws.integers(high),
    )
    return SimpleNamespace(random=random, sqrt=np.sqrt, clip=np.clip)


def read_losses(path: Path) -> ModuleType:
    """The reference's losses.py, as it is in a checkout."""
    spec = importlib.util.spec_from_file_location("reference_losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
