"""Weights of another model start a student: of another size of images, class count, or set of tokens."""

import math
from pathlib import Path

import torch
from torch import nn

from deit_ray.errors import UserError
from deit_ray.models.weights import read_weights

HEADS = ("head", "head_dist", "fc", "classifier")  # names of classifiers in timm's models
HEAD_STD = 0.02


def load_weights(model: nn.Module, path: str | Path, key: str) -> None:
    """Loads a checkpoint as timm does.

    Position embeddings are resized, and tokens fitted: see `fit_tokens`. If the file's head is for another
    number of classes, the model's head is new: see `renew_heads`.

    Args:
        key: the experiment's key, named in errors.

    Raises:
        UserError: there is no such file, or it holds weights of another architecture.
    """
    from timm.models.vision_transformer import checkpoint_filter_fn

    state, own = read_weights(path, key), model.state_dict()
    state = fit_tokens(without_prefix(state, own), own)
    if hasattr(model, "pos_embed") and hasattr(model, "patch_embed"):
        try:
            state = checkpoint_filter_fn(state, model, adapt_layer_scale=True)
        except Exception as error:  # torch's own, about shapes
            raise UserError(
                f"{key}: {path}: the weights are of another architecture: {str(error).splitlines()[0]}"
            ) from None
    heads = tuple(f"{head}." for head in HEADS)
    misfits = [name for name in state if name in own and state[name].shape != own[name].shape]
    renewed = [name for name in misfits if name.startswith(heads)]
    misfits = [name for name in misfits if name not in renewed]
    missing = [name for name in own if name not in state and not name.startswith(heads)]
    if misfits or missing:
        raise UserError(
            f"{key}: {path}: the weights are of another architecture: "
            f"{len(missing)} tensors missing, {len(misfits)} of another shape, "
            f"such as {(misfits + missing)[0]}{_layer_scale_hint(missing)}"
        )
    if scaled := [name for name in state if _is_layer_scale(name) and name not in own]:
        raise UserError(
            f"{key}: {path}: the weights are of another architecture: they have LayerScale ({scaled[0]}); "
            "set student.layer_scale"
        )
    model.load_state_dict({name: state[name] for name in state if name not in renewed}, strict=False)
    if renewed or not any(name.startswith(heads) for name in state):
        renew_heads(model)


def renew_heads(model: nn.Module) -> None:
    """Draws new classifiers: weights with a standard deviation of 0.02, biases of 0, as in DeiT.

    An untrained head then says little of any class, whatever the network, so the loss starts near
    ln(classes). EfficientNet's own first head, for training from scratch, has 0.18 with ten classes: behind
    trained features, the loss starts at 9.5 instead of 2.3.
    """
    names = model.pretrained_cfg["classifier"]
    for name in [names] if isinstance(names, str) else names:
        head = model.get_submodule(name)
        nn.init.trunc_normal_(head.weight, std=HEAD_STD)
        if head.bias is not None:
            nn.init.zeros_(head.bias)


def fit_tokens(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A transformer's weights with the tokens of another one.

    Where the distillation token is lacking, it starts as a copy of the class token, with its place and its
    head. Where it is not wanted, it is left out, and the class token's head remains.

    Args:
        own: the weights of the model that gets them.
    """
    if "cls_token" not in state or "cls_token" not in own or "pos_embed" not in state:
        return state
    has, wants = "dist_token" in state, "dist_token" in own
    if has == wants:
        return state
    places = state["pos_embed"]
    grid = places[:, 2:] if has else places
    if not has and math.isqrt(places.shape[1]) ** 2 != places.shape[1]:
        grid = places[:, 1:]
    first = places[:, : places.shape[1] - grid.shape[1]][:, :1]  # none where tokens have no place
    if wants:
        if not first.shape[1]:
            first = torch.zeros_like(places[:, :1])
        copies = {name.replace("head.", "head_dist."): t for name, t in state.items() if _is_class_head(name)}
        tokens = {"dist_token": state["cls_token"], "pos_embed": torch.cat([first, first, grid], 1)}
        return state | copies | tokens
    kept = {
        name: tensor for name, tensor in state.items() if not name.startswith(("dist_token", "head_dist."))
    }
    has_place = own["pos_embed"].shape[1] != math.isqrt(own["pos_embed"].shape[1]) ** 2
    return kept | {"pos_embed": torch.cat([first, grid], 1) if has_place else grid}


def without_prefix(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights without a first part that a training script put before every name, such as `model.`."""
    prefixes = {name.partition(".")[0] + "." for name in state}
    if len(prefixes) != 1 or state.keys() & own.keys():
        return state
    (prefix,) = prefixes
    shorter = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return shorter if shorter.keys() & own.keys() else state


def _is_class_head(name: str) -> bool:
    return name in ("head.weight", "head.bias")


def _is_layer_scale(name: str) -> bool:
    return name.endswith((".ls1.gamma", ".ls2.gamma"))


def _layer_scale_hint(missing: list[str]) -> str:
    return "; leave out student.layer_scale" if missing and all(map(_is_layer_scale, missing)) else ""
