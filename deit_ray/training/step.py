"""One optimizer step: augment, student, teacher, loss, update. Needs torch and timm, not Ray."""

import functools
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from deit_ray import rng
from deit_ray.augment import erasing, kernel_cv2, kernel_torch, mixing
from deit_ray.augment.policy import Photometric, place_of
from deit_ray.augment.table import Stage
from deit_ray.models import losses, optim
from deit_ray.models.ema import MovingAverage
from deit_ray.models.teacher import TeacherWeights, build_teacher
from deit_ray.training.compiled import CompiledModels, is_wanted

COORDINATES = ("ids", "views")


@dataclass
class Batch:
    """One rank's share of a batch.

    Attributes:
        tensors: the arrays of `Samples` by name, on the device, without ids and views. `valid` is float32
            [batch], 1 if the sample counts and otherwise 0.
        ids, views: int64 NumPy arrays [batch], coordinates of the samples, on the host.
        epoch: the samples' epoch.
        counted: bool NumPy array [batch], `valid` on the host; None if every sample counts.
    """

    tensors: dict[str, torch.Tensor]
    ids: np.ndarray
    views: np.ndarray
    epoch: int
    counted: np.ndarray | None = None

    @classmethod
    def of(cls, samples, device: torch.device) -> "Batch":
        """Makes a batch from the stream's `Samples`.

        The copy to a GPU does not block. On a CPU nothing is copied: the tensors must not be written to.
        """
        arrays = samples.arrays | {"valid": samples.valid.astype(np.float32)}
        tensors = {
            name: _to_device(array, device) for name, array in arrays.items() if name not in COORDINATES
        }
        return cls(tensors, samples.ids, samples.views, samples.epoch, samples.valid)

    @property
    def images(self) -> torch.Tensor:
        """uint8 [batch, size, size, 3]."""
        return self.tensors["images"]

    @property
    def labels(self) -> torch.Tensor:
        """int64 [batch]."""
        return self.tensors["labels"]

    @property
    def valid(self) -> torch.Tensor:
        """float32 [batch]."""
        return self.tensors["valid"]


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    # the arrays are in Ray's object store and read-only, of which torch warns
    with warnings.catch_warnings(action="ignore"):
        tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    copies, computations = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):  # during the step before, which the GPU still computes
        copied = tensor.pin_memory().to(device, non_blocking=True)
    computations.wait_stream(copies)
    copied.record_stream(computations)
    return copied


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Inputs:
    """Augments, erases and mixes a batch, before each model's own normalisation. Needs no model.

    Args:
        experiment: the trial's.
        num_classes: number of classes of the data.
        rank: this worker's rank, for the mixing draws.
        device: the device of the batches.

    Attributes:
        photometric: the work on colours and shapes.
        augments_here: whether that work is done here; if not, the stream has done it.
        normalise: the student's normalisation.
    """

    def __init__(self, experiment, num_classes: int, rank: int, device: torch.device):
        self.seed, self.rank, self.num_classes = experiment.seed, rank, num_classes
        self.smoothing = experiment.optim.label_smoothing
        self.teacher_sees_crops = experiment.distillation.teacher_sees_crops
        self.photometric = Photometric.of(experiment.augment, experiment.data.mean, experiment.seed)
        self.augments_here = place_of(experiment.augment.place, device.type) == "device"
        self.normalise = Normalise(experiment.data.mean, experiment.data.std, device)

    def __call__(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Augments, erases and mixes. Mixing is linear, so it may come before the normalisation.

        Returns:
            (the student's images, soft targets, the teacher's images): images are float [batch, 3, size,
            size] in [0, 1]. The teacher's images are the student's, or their crops mixed in the same way, so
            that both show the same classes.
        """
        images = _to_float(self.augment(batch))
        self.erase(images, batch)
        mix = self.mix(batch, step)
        targets = mixing.smooth_targets(batch.labels, self.num_classes, self.smoothing)
        images, targets = mix.images(images), mix.targets(targets)
        if not self.teacher_sees_crops:
            return images, targets, images
        crops = batch.tensors.get("crops", batch.images)
        return images, targets, mix.images(_to_float(crops))

    def augment(self, batch: Batch) -> torch.Tensor:
        """The images, uint8 [batch, size, size, 3], after the photometric work."""
        images = batch.images
        if not self.augments_here:
            return images
        stages = self.photometric.stages(batch.epoch, batch.ids, batch.views, *images.shape[1:3])
        return augment_here(images, stages)

    def erase(self, images_BCHW: torch.Tensor, batch: Batch) -> None:
        """Replaces a rectangle of some images, float in [0, 1], by noise, in place."""
        coordinates = (batch.epoch, batch.ids, batch.views)
        probability = self.photometric.levels.random_erasing
        mean, std = self.normalise.mean[0], self.normalise.std[0]
        erasing.erase(images_BCHW, self.seed, *coordinates, probability, mean, std)

    def mix(self, batch: Batch, step: int) -> mixing.BatchMix:
        """How the images of a step are mixed."""
        counted = np.ones(len(batch.views), bool) if batch.counted is None else batch.counted
        size, device = batch.images.shape[1:3], batch.images.device
        levels = self.photometric.levels
        return mixing.draw_batch(levels, self.seed, step, self.rank, batch.views, counted, *size, device)


def _to_float(images_BHWC: torch.Tensor) -> torch.Tensor:
    """uint8 images as float32 [batch, 3, size, size] in [0, 1]."""
    return images_BHWC.permute(0, 3, 1, 2).float().div_(255)


class TrainStep:
    """The state of the optimization, and one step of it.

    Args:
        experiment: the trial's.
        model: the student, on its device.
        wrapped: the module that is called in training: the model, or with several workers its data-parallel
            wrapper.
        teacher: the teacher's weights; None without distillation.
        num_classes: number of classes of the data.
        steps_per_epoch: for the schedule.
        rank: this worker's rank, for the mixing draws.
        device: the device of the model.

    Attributes:
        compiled: the compiled models; None if the models are not to be compiled.
    """

    def __init__(
        self,
        experiment,
        model: nn.Module,
        wrapped: nn.Module,
        teacher: TeacherWeights | None,
        num_classes: int,
        steps_per_epoch: int,
        rank: int,
        device: torch.device,
    ):
        self.experiment, self.model, self.wrapped, self.device = experiment, model, wrapped, device
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # all steps have the same shapes
        self.steps_per_epoch, self.rank = steps_per_epoch, rank
        self.inputs = Inputs(experiment, num_classes, rank, device)
        self.normalise = self.inputs.normalise
        half = torch.bfloat16 if uses_bfloat16(experiment, device) else None
        self.teacher = build_teacher(teacher, device, half) if teacher else None
        self.teacher_normalise = self._normalise_for(teacher) if teacher else None
        self.optimizer = optim.make_optimizer(model, experiment.optim)
        self.peak_lr = experiment.optim.peak_lr(experiment.train.batch_size)
        self.ema = MovingAverage(model) if experiment.optim.ema_decay else None
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(experiment, device))
        self.compiled = None
        if is_wanted(experiment.train.compile, device):
            models = [model, self.teacher] if self.teacher else [model]
            self.compiled = CompiledModels(models, always=experiment.train.compile == "always")

    def __call__(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        """Does one update.

        Args:
            batch: this rank's share.
            step: number of optimizer steps before this one.

        Returns:
            Scalars: loss and its parts, lr, and grad_norm if gradients are clipped. They stay on the device.
        """
        experiment = self.experiment
        lr = optim.lr_at(step, self.steps_per_epoch, experiment.optim, experiment.train.epochs, self.peak_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        images, targets, teacher_images = self.inputs(batch, step)
        inputs = self.normalise(images)
        # before the student's activations take memory
        teacher_logits = self._teach(teacher_images, inputs if teacher_images is images else None)
        torch.manual_seed(rng.integer(experiment.seed, "drop path", step, self.rank))
        self.model.train()
        with self.autocast:
            outputs = self._call(self.wrapped, inputs)
        outputs = tuple(o.float() for o in outputs) if isinstance(outputs, tuple) else outputs.float()
        parts = losses.distilled_loss(
            outputs,
            targets,
            teacher_logits,
            batch.valid,
            experiment.distillation,
            experiment.optim.label_loss,
        )
        self.optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        scalars = {name: value.detach() for name, value in parts.items()}
        if experiment.optim.clip_grad:
            scalars["grad_norm"] = nn.utils.clip_grad_norm_(
                self.model.parameters(), experiment.optim.clip_grad
            )
        self.optimizer.step()
        if self.ema:
            self.ema.decay = optim.ema_decay_at(step, experiment.optim)
            self.ema.update(self.model)
        return scalars | {"lr": torch.tensor(lr)}

    def _normalise_for(self, teacher: TeacherWeights) -> "Normalise":
        """The teacher's normalisation; the student's own if both are equal."""
        data = self.experiment.data
        if (teacher.mean, teacher.std) == (data.mean, data.std):
            return self.normalise
        return Normalise(teacher.mean, teacher.std, self.device)

    def _teach(self, images_BCHW: torch.Tensor, inputs_BCHW: torch.Tensor | None) -> torch.Tensor | None:
        """The teacher's logits.

        Args:
            images_BCHW: the teacher's images in [0, 1].
            inputs_BCHW: the same images after the student's normalisation; None if the student sees others.
        """
        if self.teacher is None or self.experiment.distillation.kind == "none":
            return None
        if inputs_BCHW is None or self.teacher_normalise is not self.normalise:
            inputs_BCHW = self.teacher_normalise(images_BCHW)
        with torch.no_grad(), self.autocast:
            return self._call(self.teacher, inputs_BCHW).float()

    def _call(self, module: nn.Module, inputs_BCHW: torch.Tensor):
        return self.compiled.call(module, inputs_BCHW) if self.compiled else module(inputs_BCHW)

    def state_dict(self) -> dict:
        """Everything that the next step depends on, except its number."""
        ema = {"ema": self.ema.module.state_dict()} if self.ema else {}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), **ema}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])


class Normalise:
    """Brings images [batch, 3, height, width] in [0, 1] to zero mean and unit variance."""

    def __init__(self, mean: list[float], std: list[float], device: torch.device):
        self.mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, 3, 1, 1)

    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return (images_BCHW - self.mean).div_(self.std)


def augment_here(images_BHWC: torch.Tensor, stages: list[Stage]) -> torch.Tensor:
    """The uint8 images after the stages. A GPU runs the torch kernel, a CPU the kernel of the stream."""
    if images_BHWC.device.type == "cuda":
        return kernel_torch.augment_images(images_BHWC, stages)
    augmented = images_BHWC.clone()
    kernel_cv2.augment_images(augmented.numpy(), stages)
    return augmented


def uses_bfloat16(experiment, device: torch.device) -> bool:
    precision = experiment.train.precision
    return has_bfloat16(device) if precision == "auto" else precision == "bfloat16"


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device is a GPU that computes in bfloat16, and does not emulate it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
