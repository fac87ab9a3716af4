"""Standard normal numbers by table: a lookup has the same bits on every device, in any batch; a logarithm has not."""

import functools
from statistics import NormalDist

import numpy as np

QUANTILES = 1 << 16


@functools.cache
def quantiles() -> np.ndarray:
    """The normal distribution's quantiles at (i + 1/2) / 65536, float32, for uniform i: within 4.3, standard deviation 0.9999."""
    inverse = NormalDist().inv_cdf
    upper = np.array([inverse((i + 0.5) / QUANTILES) for i in range(QUANTILES // 2, QUANTILES)], np.float32)
    return np.concatenate([-upper[::-1], upper])


def from_uniform(draws: np.ndarray) -> np.ndarray:
    """Standard normal float64 numbers from uniform ones in [0, 1)."""
    return quantiles()[(draws * QUANTILES).astype(np.int64)].astype(np.float64)
