"""The student: any timm classifier. A distilled one has two heads, and gives the logits of both."""

import difflib
import functools
import json
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.layers import DropPath
from torch import nn

from deit_ray.errors import UserError
from deit_ray.models.transfer import load_weights, renew_heads
from deit_ray.models.weights import METADATA, create_pretrained, make_model

# keys of the experiment's `student` section, and the arguments of timm.create_model that they set
ARGUMENTS = {
    "patch_size": "patch_size",
    "width": "embed_dim",
    "depth": "depth",
    "heads": "num_heads",
    "layer_scale": "init_values",
}


def model_arguments(student, image_size: int, num_classes: int) -> dict:
    """The keyword arguments of `timm.create_model` for a `student` section."""
    sizes = {argument: getattr(student, key) for key, argument in ARGUMENTS.items()}
    arguments = {"num_classes": num_classes} | {
        key: value for key, value in sizes.items() if value is not None
    }
    if takes_image_size(student.model):
        arguments["img_size"] = image_size
    return arguments


def create_student(student, image_size: int, num_classes: int) -> nn.Module:
    """Makes the model with its initial weights. Random weights come from torch's global generator.

    Raises:
        UserError: timm has no such model, or the weights do not fit.
    """
    arguments = model_arguments(student, image_size, num_classes)
    if student.init == "pretrained":
        model = create_pretrained(student.model, arguments, "student.init", student.drop_path)
        if timm.get_pretrained_cfg(student.model).num_classes != num_classes:
            renew_heads(model)
    else:
        try:
            model = make_model(student.model, student.drop_path, arguments)
        except (RuntimeError, TypeError, AssertionError, ValueError) as error:
            raise UserError(f"student.model: {student.model!r} with {arguments}: {error}") from None
    if student.init not in ("scratch", "pretrained"):
        load_weights(model, student.init, "student.init")
    if student.drop_path_rule == "uniform":
        drop_uniformly(model, student.drop_path)
    if has_two_heads(model):
        model.set_distilled_training(True)
    return model


def drop_uniformly(model: nn.Module, rate: float) -> None:
    """Gives every block of a transformer the same stochastic depth, as models_v2.py of the reference does.

    timm's rate rises from 0 in the first block to its full value in the last.
    """
    for block in model.blocks:
        block.drop_path1, block.drop_path2 = (DropPath(rate) if rate else nn.Identity() for _ in range(2))


def has_blocks(model: nn.Module) -> bool:
    """Whether the model is a transformer whose blocks have two stochastic depths each, as ViT's have."""
    blocks = getattr(model, "blocks", ())
    return len(blocks) > 0 and all(hasattr(b, "drop_path1") and hasattr(b, "drop_path2") for b in blocks)


def takes_image_size(name: str) -> bool:
    """Whether a timm model is built for one image size, as transformers are. Convolutional models are not.

    Raises:
        UserError: timm has no such model.
    """
    if why := unknown_model(name):
        raise UserError(why)
    return bool(timm.get_pretrained_cfg(name).fixed_input_size)


@functools.cache
def unknown_model(name: str) -> str | None:
    """Says that timm has no such model, and names near ones; None if it has."""
    if timm.is_model(name):
        return None
    near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
    return f"timm has no model named {name!r}" + (f"; near: {', '.join(near)}" if near else "")


def has_two_heads(model: nn.Module) -> bool:
    """Whether the model has a distillation token with a head of its own."""
    return hasattr(model, "set_distilled_training")


def head_logits(model: nn.Module, images_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits [batch, classes] for evaluation: `fused`, and with two heads also `cls` and `dist`.

    `fused` is the mean of both heads' logits, as in the reference and timm.
    """
    if not has_two_heads(model):
        return {"fused": model.forward(images_BCHW)}  # not compiled: `model(...)` may be, for training
    tokens = model.forward_features(images_BCHW)
    cls, dist = model.head(tokens[:, 0]), model.head_dist(tokens[:, 1])
    return {"fused": (cls + dist) / 2, "cls": cls, "dist": dist}


def save_model(path: Path, state: dict[str, torch.Tensor], description: dict) -> None:
    """Writes weights, with a description inside, that timm.create_model(..., checkpoint_path=path) loads.

    Args:
        description: model, arguments (of timm.create_model), classes, image_size, eval_crop, mean, std, and
            exif (whether images are turned as their EXIF says; absent in models of earlier versions).
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, path, metadata={"format": "pt", METADATA: json.dumps(description)})
