"""Random erasing (Zhong et al. 2017, arXiv:1708.04896) with normal noise: timm's RandomErasing, mode `pixel`.

The host draws the boxes. The noise is made on the images' device. Each value is a hash of the sample's
coordinates and the pixel, so the noise depends on neither the batch nor the device.
"""

import functools
import math

import numpy as np
import torch

from deit_ray import rng
from deit_ray.augment import normal

AREA = (0.02, 1 / 3)
LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
ATTEMPTS = 10
CHANNEL_BITS = 16  # bits of a pixel's hash that each channel uses


def erase(
    images_BCHW: torch.Tensor,
    seed: int,
    epoch: int,
    ids: np.ndarray,
    views: np.ndarray,
    probability: float,
    mean,
    std,
) -> None:
    """Replaces one rectangle of each chosen image by noise, in place.

    Args:
        images_BCHW: float images in [0, 1].
        seed, epoch, ids, views: the samples' coordinates.
        probability: probability that an image is chosen.
        mean, std: tensors [3, 1, 1], the student's normalisation. The noise is standard normal after it.
    """
    places, boxes = draw_boxes(*images_BCHW.shape[-2:], seed, epoch, ids, views, probability)
    if len(places) == 0:
        return
    states = rng.bits(seed, "erase noise", epoch, ids[places], views[places]).view(np.int64)
    rows = np.column_stack([places, boxes, states])
    quantiles = _quantiles(images_BCHW.device)
    # a GPU is fast with all boxes at once, the CPU with one that fits into its cache
    together = len(rows) if images_BCHW.is_cuda else 1
    images_BHWC = images_BCHW.permute(0, 2, 3, 1)
    for first in range(0, len(rows), together):
        _fill(images_BHWC, rows[first : first + together], quantiles, mean.view(3), std.view(3))


@functools.cache
def _quantiles(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(normal.quantiles()).to(device)


def _fill(
    images_BHWC: torch.Tensor,
    rows: np.ndarray,
    quantiles: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
) -> None:
    """Fills boxes with noise. The host does not wait for the device.

    Args:
        rows: int64 [n, 6]: place in the batch, top, left, height, width, and the sample's hash.
    """
    device, areas = images_BHWC.device, rows[:, 3] * rows[:, 4]
    rows = torch.from_numpy(np.column_stack([rows, areas.cumsum() - areas])).to(device, non_blocking=True)
    box = torch.repeat_interleave(
        torch.arange(len(rows), device=device), rows[:, 3] * rows[:, 4], output_size=int(areas.sum())
    )
    place, top, left, _, width, state, start = rows[box].unbind(1)
    within = torch.arange(len(box), device=device) - start
    y, x = top + within // width, left + within % width
    noise = pixel_noise(state, y * images_BHWC.shape[2] + x, quantiles)
    images_BHWC[place, y, x] = noise.to(images_BHWC) * std + mean


def draw_boxes(
    height: int, width: int, seed: int, epoch: int, ids, views, probability: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draws which images are erased, and where.

    Returns:
        (places in the batch, int64 [n]; boxes (top, left, height, width), int64 [n, 4]).
    """
    draws = rng.uniform(seed, "erase", epoch, ids[:, None], views[:, None], np.arange(2 * ATTEMPTS + 3))
    boxes = {i: erase_box(height, width, draws[i]) for i in np.flatnonzero(draws[:, -1] < probability)}
    fitting = {i: box for i, box in boxes.items() if box}
    return np.array(list(fitting), np.int64), np.array(list(fitting.values()), np.int64).reshape(-1, 4)


def erase_box(height: int, width: int, draws) -> tuple[int, int, int, int] | None:
    """One box (top, left, height, width), as timm draws it, or None where no attempt fits."""
    for k in range(ATTEMPTS):
        area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * draws[2 * k])
        aspect = math.exp(LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * draws[2 * k + 1])
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w < width and h < height:
            return int(draws[-3] * (height - h + 1)), int(draws[-2] * (width - w + 1)), h, w
    return None


def pixel_noise(states: torch.Tensor, pixels: torch.Tensor, quantiles: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers, float32 [n, 3], one for each channel of each pixel.

    This is `rng.bits` in torch, with the pixel as one more coordinate: int64 multiplication wraps as uint64
    does. Each channel looks up 16 bits of the hash among the `quantiles` of the normal distribution.

    Args:
        states: int64 [n], the hash of each pixel's sample.
        pixels: int64 [n], the number of each pixel in its image.
        quantiles: see `normal.quantiles`.
    """
    bits = _mix((states ^ pixels) + _signed(rng.GAMMA))
    shifts = torch.arange(3, device=states.device) * CHANNEL_BITS
    return quantiles[(bits[:, None] >> shifts) & (normal.QUANTILES - 1)]


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _shift_right(z: torch.Tensor, by: int) -> torch.Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)  # int64 shifts copy the sign bit


def _signed(word) -> int:
    return int(np.uint64(word).view(np.int64))
