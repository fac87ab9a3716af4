"""Mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899) of a batch with its own reverse.

The same as timm's Mixup in mode `batch`.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from deit_ray import rng
from deit_ray.augment.levels import Levels


@dataclass(frozen=True)
class Mix:
    """How each image of a batch is mixed with the one at the mirrored place.

    Attributes:
        lam: an image's own share, from 0 to 1.
        box: (top, bottom, left, right) of the part pasted from the other image; None blends the two images.
    """

    lam: float
    box: tuple[int, int, int, int] | None = None

    def images(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """The mixed images: a new tensor, or the given one if nothing is mixed."""
        if self.lam == 1:
            return images_BCHW
        if self.box is None:
            return images_BCHW.flip(0).lerp_(images_BCHW, self.lam)
        top, bottom, left, right = self.box
        mixed = images_BCHW.clone()
        mixed[:, :, top:bottom, left:right] = images_BCHW[:, :, top:bottom, left:right].flip(0)
        return mixed

    def targets(self, targets_BC: torch.Tensor) -> torch.Tensor:
        """The targets, mixed with the same shares as the images."""
        return targets_BC if self.lam == 1 else targets_BC * self.lam + targets_BC.flip(0) * (1 - self.lam)


def draw(levels: Levels, seed: int, step: int, rank: int, height: int, width: int) -> Mix:
    """Draws mixup or cutmix for one rank's batch; the share comes from a symmetric Beta distribution."""
    if levels.mixup == 0 and levels.cutmix == 0:
        return Mix(1.0)
    draws = rng.generator(seed, "mix", step, rank)
    use_cutmix = levels.cutmix > 0 and (levels.mixup == 0 or draws.random() < levels.mixup_switch)
    alpha = levels.cutmix if use_cutmix else levels.mixup
    lam = float(draws.beta(alpha, alpha))
    if not use_cutmix:
        return Mix(lam)
    return cut(height, width, lam, int(draws.integers(height)), int(draws.integers(width)))


def cut(height: int, width: int, lam: float, centre_y: int, centre_x: int) -> Mix:
    """Cutmix with a box that covers 1 - lam of the area, around a centre.

    The part of the box that lies inside the image decides the share.
    """
    side = np.sqrt(1 - lam)
    cut_h, cut_w = int(height * side), int(width * side)
    top, bottom = max(0, centre_y - cut_h // 2), min(height, centre_y + (cut_h + 1) // 2)
    left, right = max(0, centre_x - cut_w // 2), min(width, centre_x + (cut_w + 1) // 2)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def smooth_targets(labels_B: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
    """One-hot targets [batch, classes] with label smoothing s.

    The label gets 1 - s + s / classes, every other class s / classes.
    """
    return F.one_hot(labels_B, num_classes).float() * (1 - smoothing) + smoothing / num_classes
