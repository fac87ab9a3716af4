"""Mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899) of a batch with its own reverse.

The same as timm's Mixup in mode `batch`. The views of an image are in one batch; in the reference they are in
the batches of different ranks. So a batch is mixed view by view, each with a draw of its own: an image meets
as many partners as it has views, and none of them is a view of itself.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from deit_ray import rng
from deit_ray.augment.levels import Levels


@dataclass(frozen=True)
class Mix:
    """How images are mixed with their partners.

    Attributes:
        lam: an image's own share, from 0 to 1.
        box: (top, bottom, left, right) of the part pasted from the partner; None blends the two images.
    """

    lam: float
    box: tuple[int, int, int, int] | None = None

    def images(self, images_BCHW: torch.Tensor, partners_BCHW: torch.Tensor) -> torch.Tensor:
        """The mixed images. `partners_BCHW` may be overwritten."""
        if self.box is None:
            return partners_BCHW.lerp_(images_BCHW, self.lam)
        top, bottom, left, right = self.box
        mixed = images_BCHW.clone()
        mixed[:, :, top:bottom, left:right] = partners_BCHW[:, :, top:bottom, left:right]
        return mixed

    def targets(self, targets_BC: torch.Tensor, partners_BC: torch.Tensor) -> torch.Tensor:
        """The targets, mixed with the same shares as the images."""
        return targets_BC * self.lam + partners_BC * (1 - self.lam)


@dataclass(frozen=True)
class Group:
    """Samples of a batch that share a draw.

    Attributes:
        places: int64 [n], their places in the batch; None if they are the whole batch.
        partners: int64 [n], the places of their partners; None if each partner is at the mirrored place.
        mix: how each is mixed with its partner.
    """

    mix: Mix
    places: torch.Tensor | None = None
    partners: torch.Tensor | None = None


@dataclass(frozen=True)
class BatchMix:
    """How the images of a batch are mixed, group by group. Together the groups are the whole batch."""

    groups: tuple[Group, ...]

    def images(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """The mixed images: a new tensor, or the given one if nothing is mixed."""
        return self._apply(images_BCHW, Mix.images)

    def targets(self, targets_BC: torch.Tensor) -> torch.Tensor:
        """The targets, mixed with the same shares as the images."""
        return self._apply(targets_BC, Mix.targets)

    def _apply(self, values: torch.Tensor, mix_values) -> torch.Tensor:
        if all(group.mix.lam == 1 for group in self.groups):
            return values
        if self.groups[0].places is None:
            return mix_values(self.groups[0].mix, values, values.flip(0))
        mixed = torch.empty_like(values)
        for group in self.groups:
            mixed[group.places] = mix_values(group.mix, values[group.places], values[group.partners])
        return mixed


def draw_batch(
    levels: Levels,
    seed: int,
    step: int,
    rank: int,
    views: np.ndarray,
    valid: np.ndarray,
    height: int,
    width: int,
    device: torch.device,
) -> BatchMix:
    """Draws how one rank's batch is mixed: each view with its own reverse.

    The partner of a sample that is not valid, whose image shows nothing, stays unmixed, and so does the
    middle one of an odd number.

    Args:
        views: int64 [batch], the view of each sample.
        valid: bool [batch], False for samples that count nowhere.
        device: the device of the batch.
    """
    numbers = np.unique(views).tolist()
    mixes = {view: draw(levels, seed, step, rank, view, height, width) for view in numbers}
    if len(numbers) == 1 and valid.all():
        return BatchMix((Group(mixes[numbers[0]]),))
    groups = []
    for view, mix in mixes.items():
        places = np.flatnonzero(views == view)
        partners = np.where(valid[places[::-1]], places[::-1], places)
        on_device = (torch.from_numpy(p).to(device, non_blocking=True) for p in (places, partners))
        groups.append(Group(mix, *on_device))
    return BatchMix(tuple(groups))


def draw(levels: Levels, seed: int, step: int, rank: int, view: int, height: int, width: int) -> Mix:
    """Draws mixup or cutmix for one view of a rank; the share comes from a symmetric Beta distribution."""
    if levels.mixup == 0 and levels.cutmix == 0:
        return Mix(1.0)
    draws = rng.generator(seed, "mix", step, rank, *([view] if view else []))
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
