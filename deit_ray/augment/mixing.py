"""Mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899) of a batch with its own reverse, as timm's Mixup in mode `batch`."""

import numpy as np
import torch
import torch.nn.functional as F

from deit_ray import rng
from deit_ray.augment.levels import Levels


def smooth_targets(labels_B: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
    """One-hot targets [batch, classes] with label smoothing: 1 - s + s / classes on the label, s / classes elsewhere."""
    return F.one_hot(labels_B, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def mix(images_BCHW: torch.Tensor, targets_BC: torch.Tensor, levels: Levels, seed: int, step: int, rank: int):
    """Mixes each image with the one at the mirrored place of the batch.

    Returns:
        (images, targets), new tensors where anything was mixed.
    """
    if levels.mixup == 0 and levels.cutmix == 0:
        return images_BCHW, targets_BC
    draws = rng.generator(seed, "mix", step, rank)
    use_cutmix = levels.cutmix > 0 and (levels.mixup == 0 or draws.random() < levels.mixup_switch)
    alpha = levels.cutmix if use_cutmix else levels.mixup
    lam = float(draws.beta(alpha, alpha))
    if use_cutmix:
        images_BCHW, lam = cut_and_paste(images_BCHW, lam, draws)
    else:
        images_BCHW = images_BCHW * lam + images_BCHW.flip(0) * (1 - lam)
    return images_BCHW, targets_BC * lam + targets_BC.flip(0) * (1 - lam)


def cut_and_paste(images_BCHW: torch.Tensor, lam: float, draws: np.random.Generator) -> tuple[torch.Tensor, float]:
    """Pastes a box of about 1 - lam of the area; returns the images and the lam of the box that fits inside."""
    height, width = images_BCHW.shape[-2:]
    cut = np.sqrt(1 - lam)
    cut_h, cut_w = int(height * cut), int(width * cut)
    centre_y, centre_x = int(draws.integers(height)), int(draws.integers(width))
    top, bottom = max(0, centre_y - cut_h // 2), min(height, centre_y + cut_h // 2)
    left, right = max(0, centre_x - cut_w // 2), min(width, centre_x + cut_w // 2)
    mixed = images_BCHW.clone()
    mixed[:, :, top:bottom, left:right] = images_BCHW.flip(0)[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
