"""The moving average of the student's weights."""

import torch
from timm.utils import ModelEmaV3
from torch import nn


class MovingAverage(ModelEmaV3):
    """timm's moving average, to the bit. timm looks for all tensors of both models in every step; this class
    looks for them once.

    Args:
        model: the student. Its tensors must stay the same; their values change in place.
        options: those of `ModelEmaV3`.
    """

    def __init__(self, model: nn.Module, **options):
        super().__init__(model, **options)
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self.averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self.copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        averages, values = zip(*self.averaged, strict=True)
        torch._foreach_lerp_(averages, values, weight=1.0 - decay)
        for copy, value in self.copied:
            copy.copy_(value)
