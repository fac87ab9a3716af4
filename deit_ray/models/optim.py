"""The optimizer, the schedule of the learning rate, and the decay of the moving average."""

import math

import torch
from timm.optim import Lamb, param_groups_weight_decay
from torch import nn


def make_optimizer(model: nn.Module, optim) -> torch.optim.Optimizer:
    """AdamW, or timm's LAMB.

    As in timm, biases, norms and the model's own exceptions (tokens, position embedding) do not decay.
    """
    exceptions = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, optim.weight_decay, no_weight_decay_list=exceptions)
    betas, eps = (0.9, 0.999), 1e-8
    if optim.kind == "lamb":
        return Lamb(groups, lr=optim.lr, betas=betas, eps=eps)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=eps, fused=True)


def lr_at(step: int, steps_per_epoch: int, optim, epochs: int, peak: float) -> float:
    """The learning rate of an optimizer step: linear warm-up, then a cosine down to min_lr, then constant.

    The same as timm's CosineLRScheduler with the reference's settings, where the warm-up counts as part of
    the cosine. timm's changes once an epoch, and so does this one with `optim.schedule_per: epoch`;
    otherwise it changes with every optimizer step. If min_lr or warmup_lr is above the peak, the peak
    replaces it.

    Args:
        step: number of optimizer steps before this one.
        epochs: the run's epochs. The cosine has the same length, unless `optim.schedule_epochs` is set.
        peak: see `Optim.peak_lr`.
    """
    epoch = step // steps_per_epoch if optim.schedule_per == "epoch" else step / steps_per_epoch
    low, start = min(optim.min_lr, peak), min(optim.warmup_lr, peak)
    if epoch < optim.warmup_epochs:
        return start + (peak - start) * epoch / optim.warmup_epochs
    length = optim.schedule_epochs or epochs
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * min(epoch / length, 1)))


def ema_decay_at(step: int, optim) -> float:
    """The part that the moving average keeps at an optimizer step.

    Args:
        step: number of optimizer steps before this one.
    """
    if optim.ema_warmup == "none":
        return optim.ema_decay
    return min(optim.ema_decay, (1 + step) / (10 + step))
