"""The frozen teacher. The driver reads its weights once; the workers get plain tensors."""

from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

from deit_ray.errors import UserError
from deit_ray.models import student


@dataclass(frozen=True)
class TeacherWeights:
    """Everything that a worker needs to rebuild the teacher.

    Attributes:
        model, arguments: for timm.create_model.
        state: the model's tensors, on the CPU.
        mean, std: the teacher's normalisation, for pixels in [0, 1].
    """

    model: str
    arguments: dict
    state: dict[str, torch.Tensor]
    mean: list[float]
    std: list[float]


def read_teacher(teacher, path: str | None, image_size: int, num_classes: int) -> TeacherWeights:
    """Reads the teacher of an experiment and checks that it can teach this student.

    Args:
        teacher: the `distillation.teacher` section.
        path: the local file of `teacher.weights`; None for timm's pretrained weights.
        image_size: side of the student's images in pixels.
        num_classes: number of classes of the student's data.

    Raises:
        UserError: the file, the model or the number of classes is wrong.
    """
    key = "distillation.teacher.weights"
    if path and not Path(path).is_file():
        raise UserError(f"{key}: {path}: no such file")
    description = (student.read_description(path) if path else None) or {}
    name = teacher.model or description.get("model")
    if name is None:
        raise UserError(
            f"distillation.teacher.model: missing; {teacher.weights} does not say which timm model it is"
        )
    arguments = dict(description.get("arguments", {}))
    if not arguments and student.takes_image_size(name):
        arguments = {"img_size": image_size}
    model = timm.create_model(name, pretrained=path is None, **arguments)
    if path:
        _load(model, student.weights_of(path), f"{key}: {path}")
    if model.num_classes != num_classes:
        raise UserError(
            f"{key}: {teacher.weights}: the teacher knows {model.num_classes} classes, but the data set has "
            f"{num_classes}; a teacher must have been trained on the same classes"
        )
    cfg = model.pretrained_cfg
    mean = teacher.mean or description.get("mean") or list(cfg["mean"])
    std = teacher.std or description.get("std") or list(cfg["std"])
    arguments["num_classes"] = model.num_classes
    return TeacherWeights(name, arguments, dict(model.state_dict()), list(mean), list(std))


def build_teacher(weights: TeacherWeights, device: torch.device) -> nn.Module:
    """The teacher in evaluation mode, without gradients."""
    model = timm.create_model(weights.model, **weights.arguments)
    model.load_state_dict(weights.state)
    return model.to(device).eval().requires_grad_(False)


def _load(model: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Loads weights by name. If no name fits, tensors are loaded in order.

    No name fits if the file holds the same network under another library's names.

    Raises:
        UserError: the weights do not fit the model.
    """
    classifier = model.pretrained_cfg["classifier"]
    bias = state.get(f"{classifier if isinstance(classifier, str) else classifier[0]}.bias")
    if bias is not None and len(bias) != model.num_classes:
        model.reset_classifier(len(bias))
    own = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    if not own.keys() & state.keys():
        state = dict(zip(own, state.values(), strict=False))
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    if wrong:
        raise UserError(
            f"{where}: not the weights of this model: {len(wrong)} tensors do not fit, such as {wrong[0]}"
        )
    model.load_state_dict({name: state[name] for name in own}, strict=False)
