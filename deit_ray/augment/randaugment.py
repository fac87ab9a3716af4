"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719) as DeiT uses it: timm's `rand-m9-mstd0.5-inc1`.

Each of `num_ops` layers draws one operation, with replacement, and applies it with probability p. Its
magnitude comes from a normal distribution, clipped to [0, 10]; a coin gives the sign.
"""

import math

import numpy as np

from deit_ray.augment import normal, table

MAGNITUDE_STD = 0.5


def stages(draws, levels, canvas, operations=table.RANDAUGMENT) -> list[table.Stage]:
    """The policy. `operations` may be another list, such as a longer one (docs/augmentation.md)."""
    found = []
    for layer in range(math.ceil(levels.num_ops)):
        index, applied, magnitudes, signs = draw_layer(draws, levels, layer, len(operations))
        found += table.stages_of(operations, index, applied, magnitudes, signs, canvas)
    return found


def draw_layer(
    draws, levels, layer: int, operations: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draws one layer: (index of the operation, whether it is applied, magnitude, sign), each [batch].

    The strength changes how often and how strongly operations are applied. It does not change which
    operations are drawn: a sample keeps its operations, signs and deviations at every strength.
    """
    which, whether, deviation, coin = draws.uniform("randaugment", 4, layer).T
    p = levels.p * min(1.0, levels.num_ops - layer)
    magnitudes = np.clip(
        levels.magnitude + MAGNITUDE_STD * normal.from_uniform(deviation), 0, table.MAX_MAGNITUDE
    )
    return (which * operations).astype(int), whether < p, magnitudes, np.where(coin < 0.5, 1.0, -1.0)
