"""torch.compile for the models of a training step.

PyTorch keeps compiled code in memory and on the disk, by the operations and constants of a model. Values that
trials differ in must therefore be tensors: then a later trial, also in another process, compiles nothing.
"""

import logging
from collections.abc import Sequence

import torch
from timm.layers import DropPath
from torch import nn

from deit_ray.errors import HopelessError, first_line


class CannotCompile(HopelessError):
    """`train.compile` is always, and PyTorch cannot compile the models here."""


class CompiledModels:
    """Models that are compiled at their first call, in place: the names of their tensors stay as they are.

    Args:
        models: the student, and the teacher if there is one, on their device.
        always: whether a failure to compile is an error. Otherwise the models then run without compiling.

    Attributes:
        failure: why the models run without compiling, in one line; None if they do not.
    """

    def __init__(self, models: Sequence[nn.Module], always: bool):
        self.models, self.always = models, always
        self.failure: str | None = None
        for model in models:
            use_tensors_for_drop_path(model)
            model.compile()

    def call(self, module: nn.Module, images_BCHW: torch.Tensor):
        """The output of one of the models, or of the data-parallel wrapper of one.

        Raises:
            CannotCompile: with `always`.
        """
        from torch._dynamo.exc import TorchDynamoException  # takes a second

        try:
            return module(images_BCHW)
        except TorchDynamoException as error:
            self._give_up(error)
            return module(images_BCHW)

    def _give_up(self, error: Exception) -> None:
        self.failure = f"PyTorch cannot compile the models: {_reason_of(error)}"
        if self.always:
            raise CannotCompile(
                f"train.compile: always, but {self.failure}; install what is missing (g++, and for a GPU "
                "python3-dev and Triton), or set train.compile to auto or never"
            ) from error
        logging.getLogger(__name__).warning("%s; training continues without compiling", self.failure)
        for model in self.models:
            model.compile(disable=True)


def is_wanted(setting: str, device: torch.device) -> bool:
    """Whether `train.compile` is on for a device. `auto` is on for a GPU only."""
    return setting == "always" or (setting == "auto" and device.type == "cuda")


def use_tensors_for_drop_path(model: nn.Module) -> None:
    """Replaces the model's `DropPath` modules, in whose compiled code the probability is a constant."""
    device = next(model.parameters()).device
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, DropPath):
                setattr(module, name, TensorDropPath(child, device))


class TensorDropPath(nn.Module):
    """timm's `DropPath` with its probability in a tensor, which is not in the state dict.

    Its draws have the same distribution and are other numbers.
    """

    def __init__(self, original: DropPath, device: torch.device):
        super().__init__()
        self.scale_by_keep = original.scale_by_keep
        keep = torch.tensor(1 - original.drop_prob, device=device)
        self.register_buffer("keep", keep, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = (torch.rand(shape, device=x.device) < self.keep).to(x.dtype)
        if self.scale_by_keep:
            kept = kept / self.keep.to(x.dtype)
        return x * kept


def _reason_of(error: Exception) -> str:
    return first_line(getattr(error, "inner_exception", error))
