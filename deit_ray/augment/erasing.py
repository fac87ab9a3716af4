"""Random erasing (Zhong et al. 2017, arXiv:1708.04896) with normal noise, as timm's RandomErasing in mode `pixel`."""

import math

import numpy as np
import torch

from deit_ray import rng

AREA = (0.02, 1 / 3)
LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
ATTEMPTS = 10


def erase(images_BCHW: torch.Tensor, seed: int, epoch: int, ids: np.ndarray, views: np.ndarray, probability: float, mean, std) -> None:
    """Replaces one rectangle of each chosen image by noise, in place.

    Args:
        images_BCHW: float images in [0, 1].
        seed, epoch, ids, views: the samples' coordinates.
        probability: of an image being chosen.
        mean, std: [3, 1, 1] tensors of the student's normalisation, after which the noise is standard normal.
    """
    if probability == 0:
        return
    _, channels, height, width = images_BCHW.shape
    draws = rng.uniform(seed, "erase", epoch, ids[:, None], views[:, None], np.arange(2 * ATTEMPTS + 3))
    for i in np.flatnonzero(draws[:, -1] < probability):
        box = erase_box(height, width, draws[i])
        if box is None:
            continue
        top, left, h, w = box
        generator = rng.generator(seed, "erase noise", epoch, int(ids[i]), int(views[i]))
        noise = torch.from_numpy(generator.standard_normal((channels, h, w), dtype=np.float32))
        images_BCHW[i, :, top : top + h, left : left + w] = noise.to(images_BCHW) * std + mean


def erase_box(height: int, width: int, draws) -> tuple[int, int, int, int] | None:
    """(top, left, height, width) as timm draws it, or None where no attempt fits."""
    for k in range(ATTEMPTS):
        area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * draws[2 * k])
        aspect = math.exp(LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * draws[2 * k + 1])
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w < width and h < height:
            return int(draws[-3] * (height - h + 1)), int(draws[-2] * (width - w + 1)), h, w
    return None
