"""Training without Ray, for tests."""

from dataclasses import dataclass
from pathlib import Path

import torch

from deit_ray.data.blocks import make_samples
from deit_ray.models.student import create_student, save_model
from deit_ray.training.evaluate import evaluate
from deit_ray.training.step import Batch, TrainStep
from deit_ray.training.worker import describe
from deit_ray.trial import assemble
from deit_ray.trial.resolve import resolve

CPU = torch.device("cpu")
# what makes a small convolutional teacher of an experiment with a transformer
CONVNET = {
    "student.model": "test_resnet",
    "student.patch_size": None,
    "student.width": None,
    "student.depth": None,
    "student.heads": None,
    "distillation.kind": "none",
}


@dataclass
class Trained:
    metrics: dict
    losses: list[float]
    model: str | None


def make_step(experiment, resolved=None) -> TrainStep:
    """A training step of a single worker, as the worker makes it."""
    resolved = resolved or resolve(experiment)
    worklist = assemble.make_worklist(experiment, resolved.manifest, resolved.data, ("val",))
    classes = len(resolved.manifest.classes)
    torch.set_num_threads(1)
    torch.manual_seed(experiment.seed)
    model = create_student(experiment.student, experiment.data.image_size, classes)
    return TrainStep(experiment, model, model, resolved.teacher, classes, worklist.steps_per_epoch, 0, CPU)


def local_batches(experiment, resolved=None, splits=("val", "test"), world_size: int = 1, start: int = 0):
    """Makes all batches of a run from step `start` on in this process, in the order of its work list.

    With several ranks, a task gives the batches of each rank in turn.
    """
    resolved = resolved or resolve(experiment)
    worklist = assemble.make_worklist(experiment, resolved.manifest, resolved.data, splits)
    recipe = assemble.make_recipe(experiment, "cpu")
    local = experiment.train.batch_size // world_size
    for task in worklist.tasks_between(start, worklist.steps):
        for samples in make_samples(task, recipe, experiment.train.batch_size, world_size):
            for k in range(len(samples.ids) // local):
                yield samples.slice(k * local, (k + 1) * local, samples.first_step + k)


def train_locally(experiment, folder: Path | None = None) -> Trained:
    """Trains to the end; returns the last metrics, all losses and, with a folder, the path of the model."""
    resolved = resolve(experiment)
    worklist = assemble.make_worklist(experiment, resolved.manifest, resolved.data, ("val", "test"))
    step, batches, losses, metrics = (
        make_step(experiment, resolved),
        local_batches(experiment, resolved),
        [],
        {},
    )
    for epoch in range(experiment.train.epochs):
        for number in range(epoch * worklist.steps_per_epoch, (epoch + 1) * worklist.steps_per_epoch):
            losses.append(step(Batch.of(next(batches), CPU), number)["loss"].item())
        for split in worklist.evaluations_after(epoch):
            steps = worklist.evaluation_steps(split)
            metrics |= evaluate(split, step.model, None, batches, steps, step.normalise, step.autocast)
    model = None
    if folder:
        model = str(folder / "model.safetensors")
        save_model(model, step.model.state_dict(), describe(experiment, resolved.manifest.classes, False))
    return Trained(metrics, losses, model)
