"""The student: any timm classifier. A distilled one has two heads, and gives the logits of both."""

import difflib
import json
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from deit_ray.errors import UserError

METADATA = "deit_ray"  # the key of the description in a model.safetensors


def model_arguments(student, image_size: int, num_classes: int) -> dict:
    """The keyword arguments of `timm.create_model` for a `student` section."""
    sizes = {
        "patch_size": student.patch_size,
        "embed_dim": student.width,
        "depth": student.depth,
        "num_heads": student.heads,
    }
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
    pretrained = student.init == "pretrained"
    path = student.init if student.init not in ("scratch", "pretrained") else None
    try:
        model = timm.create_model(
            student.model, pretrained=pretrained, drop_path_rate=student.drop_path, **arguments
        )
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise UserError(f"student.model: {student.model!r} with {arguments}: {error}") from None
    if path:
        load_weights(model, path, "student.init")
    if has_two_heads(model):
        model.set_distilled_training(True)
    return model


def takes_image_size(name: str) -> bool:
    """Whether a timm model is built for one image size, as transformers are. Convolutional models are not.

    Raises:
        UserError: timm has no such model.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise UserError(f"timm has no model named {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
    return bool(timm.get_pretrained_cfg(name).fixed_input_size)


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
        description: model, arguments (of timm.create_model), classes, image_size, eval_crop, mean, std.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, path, metadata={"format": "pt", METADATA: json.dumps(description)})


def read_description(path: str | Path) -> dict | None:
    """The description that `save_model` wrote into the file; None if another program wrote the file."""
    if not str(path).endswith(".safetensors"):
        return None
    with safe_open(path, framework="pt") as file:
        found = (file.metadata() or {}).get(METADATA)
    return json.loads(found) if found else None


def load_weights(model: nn.Module, path: str | Path, key: str) -> None:
    """Loads a checkpoint as timm does.

    Position embeddings are resized. If the file's head is for another number of classes, the model keeps its
    own initial head.

    Args:
        key: the experiment's key, named in errors.

    Raises:
        UserError: there is no such file, or it holds weights of another architecture.
    """
    from timm.models import load_state_dict
    from timm.models.vision_transformer import checkpoint_filter_fn

    if not Path(path).is_file():
        raise UserError(f"{key}: {path}: no such file")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch, safetensors and pickle each raise their own
        raise UserError(f"{key}: {path}: cannot be read as weights: {error}") from None
    own = model.state_dict()
    if hasattr(model, "pos_embed") and hasattr(model, "patch_embed"):
        state = checkpoint_filter_fn(state, model)
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


def weights_of(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a weights file, by name."""
    from timm.models import load_state_dict

    return load_state_dict(str(path), weights_only=True)
