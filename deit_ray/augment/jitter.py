"""Colour jitter: random factors of brightness, contrast and saturation, in random order.

The same as torchvision's ColorJitter.
"""

import numpy as np

from deit_ray.augment import table


def stages(draws, levels, canvas) -> list[table.Stage]:
    """The stages of a batch; none if `levels.color_jitter` is 0."""
    if levels.color_jitter == 0:
        return []
    factors, order = draw(draws, levels.color_jitter)
    found, everyone = [], np.ones(len(order), bool)
    for place in range(order.shape[1]):
        index = order[:, place]
        chosen = factors[np.arange(len(order)), index]
        found += table.stages_of(
            (brightness, contrast, saturation), index, everyone, chosen, everyone, canvas
        )
    return found


def draw(draws, color_jitter: float) -> tuple[np.ndarray, np.ndarray]:
    """Draws (the factor of each operation, [batch, 3]; the order of the operations, [batch, 3])."""
    uniform = draws.uniform("color jitter", 6)
    return 1 + color_jitter * (2 * uniform[:, :3] - 1), np.argsort(uniform[:, 3:], axis=1)


def brightness(factors, signs, canvas) -> table.Lookup:
    return table.brighten(factors)


def contrast(factors, signs, canvas) -> table.GreyBlend:
    return table.GreyBlend(factors, of_mean=True)


def saturation(factors, signs, canvas) -> table.GreyBlend:
    return table.GreyBlend(factors)
