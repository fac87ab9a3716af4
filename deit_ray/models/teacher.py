"""The frozen teacher. The driver reads its weights once; the workers get plain tensors."""

from dataclasses import dataclass

import timm
import torch
from torch import nn

from deit_ray.errors import UserError, first_line
from deit_ray.models import student
from deit_ray.models.shapes import shape_of
from deit_ray.models.transfer import without_prefix
from deit_ray.models.weights import create_pretrained, read_description, read_weights

KEY = "distillation.teacher.weights"


@dataclass(frozen=True)
class TeacherWeights:
    """Everything that a worker needs to rebuild the teacher.

    Attributes:
        model, arguments: for timm.create_model.
        state: the model's tensors, on the CPU.
        mean, std: the teacher's normalisation, for pixels in [0, 1].
        classes: names, by output; None if its file does not say them.
    """

    model: str
    arguments: dict
    state: dict[str, torch.Tensor]
    mean: list[float]
    std: list[float]
    classes: list[str] | None = None


def read_teacher(teacher, path: str | None, image_size: int, num_classes: int) -> TeacherWeights:
    """Reads the teacher of an experiment and checks that it can teach this student.

    Args:
        teacher: the `distillation.teacher` section.
        path: the local file of `teacher.weights`; None for timm's pretrained weights.
        image_size: side of the student's images in pixels.
        num_classes: number of classes of the student's data.

    Raises:
        UserError: the file, the model, the number of classes or the size of the images is wrong.
    """
    where = KEY if path is None or path == teacher.weights else f"{KEY}: {teacher.weights}"
    description = (read_description(path, where) if path else None) or {}
    name = teacher.model or description.get("model")
    if name is None:
        raise UserError(
            f"distillation.teacher.model: missing; {teacher.weights} does not say which timm model it is"
        )
    if why := student.unknown_model(name):
        raise UserError(f"distillation.teacher.model: {why}")
    arguments = dict(description.get("arguments", {}))
    if not arguments and student.takes_image_size(name):
        arguments = {"img_size": image_size}
    if path is None:
        _check_count(timm.get_pretrained_cfg(name).num_classes, num_classes, teacher.weights)
        check_size(name, arguments, image_size, teacher.weights)
        model = create_pretrained(name, arguments, KEY)
    else:
        state = read_weights(path, where)
        try:
            model = timm.create_model(name, **arguments)
        except (RuntimeError, TypeError, AssertionError, ValueError) as error:
            raise UserError(
                f"distillation.teacher.model: {name} cannot be built as {path} describes it: "
                f"{first_line(error)}"
            ) from None
        _load(model, state, f"{where}: {path}")
    _check_count(model.num_classes, num_classes, teacher.weights)
    cfg = model.pretrained_cfg
    mean = teacher.mean or description.get("mean") or list(cfg["mean"])
    std = teacher.std or description.get("std") or list(cfg["std"])
    arguments["num_classes"] = model.num_classes
    check_size(name, arguments, image_size, teacher.weights)
    state, classes = dict(model.state_dict()), description.get("classes")
    return TeacherWeights(name, arguments, state, list(mean), list(std), classes)


def _check_count(known: int, num_classes: int, weights: str) -> None:
    if known != num_classes:
        raise UserError(
            f"{KEY}: {weights}: the teacher knows {known} classes, but the data set has "
            f"{num_classes}; a teacher must have been trained on the same classes"
        )


def check_size(name: str, arguments: dict, image_size: int, weights: str) -> None:
    """Checks that a teacher takes the student's images.

    Raises:
        UserError: it is a transformer that was built for images of another size.
    """
    made_for = arguments.get("img_size", image_size)
    if made_for != image_size and shape_of(name, arguments, image_size).refusal:
        raise UserError(
            f"{KEY}: {weights}: the teacher {name} takes images of {made_for} pixels only, but "
            f"data.image_size is {image_size}; set data.image_size to {made_for}, or name a teacher for "
            f"{image_size} pixels or a convolutional one"
        )
    if why := shape_of(name, arguments, image_size).refusal:
        raise UserError(f"{KEY}: {weights}: the teacher {name} {why}")


def build_teacher(
    weights: TeacherWeights, device: torch.device, half: torch.dtype | None = None
) -> nn.Module:
    """The teacher in evaluation mode, without gradients.

    Args:
        half: the precision of autocast, if the teacher runs under it; None in float32. On a GPU, the weights
            that autocast would convert in every step are converted once.
    """
    model = timm.create_model(weights.model, **weights.arguments)
    model.load_state_dict(weights.state)
    model = model.to(device).eval().requires_grad_(False)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
        for module in model.modules():
            if half and isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(half)
    return model


def _load(model: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Loads weights by name. If no name fits, tensors are loaded in order.

    No name fits if the file holds the same network under another library's names.

    Raises:
        UserError: the weights do not fit the model.
    """
    state = without_prefix(state, model.state_dict())
    classifier = model.pretrained_cfg["classifier"]
    bias = state.get(f"{classifier if isinstance(classifier, str) else classifier[0]}.bias")
    if bias is not None and len(bias) != model.num_classes:
        model.reset_classifier(len(bias))
    if why := token_mismatch(state, model.state_dict()):
        raise UserError(f"{where}: {why}")
    own = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    if not own.keys() & state.keys():
        state = dict(zip(own, state.values(), strict=False))
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    if wrong == ["pos_embed"] and "pos_embed" in state:
        raise UserError(
            f"{where}: the weights are of a transformer for images of another size: its position embedding "
            f"has {state['pos_embed'].shape[1]} places, and one for data.image_size has "
            f"{own['pos_embed'].shape[1]}"
        )
    if wrong:
        raise UserError(
            f"{where}: not the weights of this model: {len(wrong)} tensors do not fit, such as {wrong[0]}"
        )
    model.load_state_dict({name: state[name] for name in own}, strict=False)


def token_mismatch(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> str | None:
    """Why weights do not fit a model of which only one has the distillation token; None if that is not so."""
    if "cls_token" not in state or "cls_token" not in own:
        return None
    if "dist_token" in own and "dist_token" not in state:
        return (
            "the weights are of a transformer without the distillation token (dist_token), which this model "
            "has; name a model without it, such as deit_tiny_patch16_224, or weights with it"
        )
    if "dist_token" in state and "dist_token" not in own:
        return (
            "the weights are of a transformer with the distillation token (dist_token), which this model "
            "lacks; name a model with it, such as deit_tiny_distilled_patch16_224, or weights without it"
        )
    return None
