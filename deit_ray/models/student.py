"""The student: any timm classifier. A distilled one has two heads, and gives the logits of both."""

import difflib
import functools
import json
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from deit_ray.errors import UserError
from deit_ray.models.weights import METADATA, create_pretrained, make_model, read_weights

# keys of the experiment's `student` section, and the arguments of timm.create_model that they set
ARGUMENTS = {"patch_size": "patch_size", "width": "embed_dim", "depth": "depth", "heads": "num_heads"}


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
    else:
        try:
            model = make_model(student.model, student.drop_path, arguments)
        except (RuntimeError, TypeError, AssertionError, ValueError) as error:
            raise UserError(f"student.model: {student.model!r} with {arguments}: {error}") from None
    if student.init not in ("scratch", "pretrained"):
        load_weights(model, student.init, "student.init")
    if has_two_heads(model):
        model.set_distilled_training(True)
    return model


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
        return {"fused": model(images_BCHW)}
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


def load_weights(model: nn.Module, path: str | Path, key: str) -> None:
    """Loads a checkpoint as timm does.

    Position embeddings are resized. If the file's head is for another number of classes, the model keeps its
    own initial head.

    Args:
        key: the experiment's key, named in errors.

    Raises:
        UserError: there is no such file, or it holds weights of another architecture.
    """
    from timm.models.vision_transformer import checkpoint_filter_fn

    state = read_weights(path, key)
    own = model.state_dict()
    state = without_prefix(state, own)
    if why := token_mismatch(state, own):
        raise UserError(f"{key}: {path}: {why}")
    if hasattr(model, "pos_embed") and hasattr(model, "patch_embed"):
        try:
            state = checkpoint_filter_fn(state, model)
        except Exception as error:  # torch's own, about shapes
            raise UserError(
                f"{key}: {path}: the weights are of another architecture: {str(error).splitlines()[0]}"
            ) from None
    heads = tuple(f"{head}." for head in ("head", "head_dist", "fc", "classifier"))
    misfits = [name for name in state if name in own and state[name].shape != own[name].shape]
    for name in [name for name in misfits if name.startswith(heads)]:
        state.pop(name)
        misfits.remove(name)
    missing = [name for name in own if name not in state and not name.startswith(heads)]
    if misfits or missing:
        raise UserError(
            f"{key}: {path}: the weights are of another architecture: "
            f"{len(missing)} tensors missing, {len(misfits)} of another shape, "
            f"such as {(misfits + missing)[0]}"
        )
    model.load_state_dict(state, strict=False)


def without_prefix(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights without a first part that a training script put before every name, such as `model.`."""
    prefixes = {name.partition(".")[0] + "." for name in state}
    if len(prefixes) != 1 or state.keys() & own.keys():
        return state
    (prefix,) = prefixes
    shorter = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return shorter if shorter.keys() & own.keys() else state


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
