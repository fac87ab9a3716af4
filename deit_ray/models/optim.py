"""AdamW and the learning rate's schedule."""

import math

import torch
from timm.optim import param_groups_weight_decay
from torch import nn


def effective_lr(optim, batch_size: int) -> float:
    """The peak learning rate: with `scale_lr` it is lr x batch / 512 (DeiT, section 6)."""
    return optim.lr * batch_size / 512 if optim.scale_lr else optim.lr


def make_optimizer(model: nn.Module, optim) -> torch.optim.Optimizer:
    """AdamW; biases, norms and the model's own exceptions (tokens, position embedding) do not decay, as in timm."""
    exceptions = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, optim.weight_decay, no_weight_decay_list=exceptions)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(0.9, 0.999), eps=1e-8)


def lr_at(step: int, steps_per_epoch: int, optim, epochs: int, peak: float) -> float:
    """The learning rate of an optimizer step: linear warm-up, then a cosine down to min_lr, where it stays.

    As timm's CosineLRScheduler in the reference's setting (warm-up counted as part of the cosine), but stepped with every
    optimizer step instead of once an epoch. Floors above the peak are lowered to it.

    Args:
        epochs: of the run; the cosine is as long, unless `optim.schedule_epochs` says otherwise.
    """
    epoch = step / steps_per_epoch
    low, start = min(optim.min_lr, peak), min(optim.warmup_lr, peak)
    if epoch < optim.warmup_epochs:
        return start + (peak - start) * epoch / optim.warmup_epochs
    length = optim.schedule_epochs or epochs
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * min(epoch / length, 1)))
