"""Three-Augment (Touvron et al. 2022, DeiT III, arXiv:2204.07118): one of grey, solarize and Gaussian blur.

Colour jitter follows. Below strength 1, an image gets its operation with a probability equal to the strength.
Above 1, it gets a second operation with probability strength - 1.
"""

import math

import numpy as np

from deit_ray.augment import table

SIGMA = (0.1, 2.0)
MAX_TAPS = 13  # length of the filter for the largest sigma


def stages(draws, levels, canvas) -> list[table.Stage]:
    """The policy. The magnitude of an operation is a uniform number here; only the blur uses it."""
    found = []
    for layer in range(math.ceil(levels.strength)):
        which, whether, amount = draws.uniform("three_augment", 3, layer).T
        applied = whether < min(1.0, levels.strength - layer)
        found += table.stages_of(
            (solarize_half, grey, blur),
            (which * 3).astype(int),
            applied,
            amount,
            np.ones_like(amount),
            canvas,
        )
    return found


def solarize_half(amounts, signs, canvas) -> table.Lookup:
    return table.solarize(np.full(len(amounts), 5.0), signs, canvas)  # a threshold of 128


def grey(amounts, signs, canvas) -> table.GreyBlend:
    return table.GreyBlend(np.zeros(len(amounts)))


def blur(amounts, signs, canvas) -> table.Filter:
    sigmas = SIGMA[0] + (SIGMA[1] - SIGMA[0]) * amounts
    return table.Filter(np.stack([gaussian_taps(sigma) for sigma in sigmas]), np.zeros(len(sigmas)))


def gaussian_taps(sigma: float, passes: int = 3) -> np.ndarray:
    """One filter, float64 [13], for PIL's Gaussian blur: three passes of a box with fractional ends.

    Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering",
    equations 7, 11 and 14.
    """
    variance = sigma**2 / passes
    radius = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    ends = (2 * radius + 1) * (radius * (radius + 1) - 3 * variance) / (6 * (variance - (radius + 1) ** 2))
    box = np.array([ends, *[1.0] * (2 * radius + 1), ends]) / (2 * radius + 1 + 2 * ends)
    taps = np.ones(1)
    for _ in range(passes):
        taps = np.convolve(taps, box)
    return np.pad(taps, (MAX_TAPS - len(taps)) // 2)
