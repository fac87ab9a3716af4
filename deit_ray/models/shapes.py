"""Whether a model can be built and takes images of a size, tried on torch's meta device.

That device holds no numbers, so a model of any size costs a fraction of a second, and no memory.
"""

import functools
import re
from dataclasses import dataclass

import timm
import torch
from timm.layers import PatchEmbed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deit_ray.errors import first_line
from deit_ray.models.student import ARGUMENTS, has_blocks, has_two_heads, unknown_model
from deit_ray.models.weights import make_model

MOST_BATCH = 64  # images; more show nothing else


@dataclass(frozen=True)
class Shape:
    """What is known of a model and a size of images.

    Attributes:
        refusal: why the model cannot run on such images, to be read after its name; None if it can.
        two_heads: whether it has a distillation token with a head of its own.
        one_pixel_convolutions: whether the output of one of its convolutions is a single pixel.
        has_blocks: see `student.has_blocks`.
    """

    refusal: str | None = None
    two_heads: bool = False
    one_pixel_convolutions: bool = False
    has_blocks: bool = False


def shape_of(
    name: str, arguments: dict, image_size: int, batch: int = 2, drop_path: float = 0.0, trains: bool = False
) -> Shape:
    """Builds a timm model without numbers, and runs images through it.

    Args:
        arguments: of timm.create_model, without `drop_path`.
        batch: images that a worker gives it at once; some layers cannot train on a single one.
        trains: whether it will be trained, rather than asked.
    """
    hashable = tuple(sorted((key, tuple(v) if isinstance(v, list) else v) for key, v in arguments.items()))
    return _shape_of(name, hashable, image_size, min(batch, MOST_BATCH), drop_path > 0, trains)


@functools.lru_cache(maxsize=1024)
def _shape_of(name: str, arguments: tuple, image_size: int, batch: int, drops: bool, trains: bool) -> Shape:
    if why := unknown_model(name):
        return Shape(why)
    given = dict(arguments)
    shown = ", ".join(f"{KEYS.get(key, key)} {value}" for key, value in given.items() if key != "num_classes")
    if (width := given.get("embed_dim")) and (heads := given.get("num_heads")) and width % heads:
        return Shape(f"student.width {width} is not divisible by student.heads ({heads})")
    with torch.device("meta"):
        try:
            model = make_model(name, 0.1 if drops else 0.0, given)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown:
                return Shape(f"takes no {KEYS.get(unknown[1], unknown[1])}; leave it out")
            return Shape(f"cannot be built with {shown}: {first_line(error)}")
        except Exception as error:  # each architecture raises its own
            return Shape(f"cannot be built with {shown}: {first_line(error)}")
        if unseen := _unseen_pixels(model, image_size):
            return Shape(unseen)
        singles = _watch_convolutions(model)
        images = torch.empty(batch, 3, image_size, image_size)
        try:
            outputs = model.train(trains)(images)
        except Exception as error:  # each architecture raises its own
            return Shape(
                f"cannot take images of {image_size}x{image_size} pixels, "
                f"{batch} at a time{f', with {shown}' if shown else ''}: {first_line(error)}"
            )
    expected = (batch, given.get("num_classes", getattr(model, "num_classes", None)))
    if not isinstance(outputs, torch.Tensor) or tuple(outputs.shape) != expected:
        return Shape("is not a classifier that gives a number for each image and class")
    return Shape(None, has_two_heads(model), bool(singles), has_blocks(model))


KEYS = {argument: f"student.{key}" for key, argument in ARGUMENTS.items()} | {
    "img_size": "data.image_size",
    "drop_path_rate": "student.drop_path",
}


def _unseen_pixels(model: nn.Module, image_size: int) -> str | None:
    """Why a part of each image would never be seen: timm cuts what is left beside whole patches, silently."""
    embed = getattr(model, "patch_embed", None)
    if not isinstance(embed, PatchEmbed) or embed.dynamic_img_pad:
        return None
    patch = max(embed.patch_size)
    left = image_size % patch
    if not left:
        return None
    below, above = image_size - left, image_size - left + patch
    allowed = f"{below} or {above}" if below else f"{above}"
    return (
        f"cuts images into patches of {patch}x{patch} pixels, which do not fill data.image_size "
        f"({image_size}): the last {left} rows and columns would never be seen; allowed: a multiple of "
        f"{patch}, such as {allowed}"
    )


def _watch_convolutions(model: nn.Module) -> list[bool]:
    """A list that gets an entry, once the model has run, for each convolution that gave a single pixel."""
    singles: list[bool] = []

    def look(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if tuple(output.shape[2:]) == (1, 1):
            singles.append(True)

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    return singles


def count_multiply_adds(model: str, arguments: dict, image_size: int) -> int:
    """The multiply-adds of one image, by torch's counter: matrix products, convolutions and attention.

    Args:
        model, arguments: of timm.create_model.
        image_size: pixels of a side.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        timm.create_model(model, **arguments).eval()(torch.empty(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class Weights:
    """The bytes of a model's weights.

    Attributes:
        bytes: of all its tensors that are saved.
        trained_bytes: of its trained parameters.
    """

    bytes: int
    trained_bytes: int


def weights_of(model: str, arguments: dict) -> Weights:
    """The bytes of a timm model's weights.

    Args:
        model, arguments: of timm.create_model.
    """
    with torch.device("meta"):
        built = timm.create_model(model, **arguments)
    trained = [parameter for parameter in built.parameters() if parameter.requires_grad]
    return Weights(*(sum(t.nbytes for t in found) for found in (built.state_dict().values(), trained)))
