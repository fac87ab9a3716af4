"""Photometric operations on uint8 images: what is drawn for each sample. The kernels apply it.

Colour jitter: brightness, contrast and saturation by random factors, in random order. kernel_cv2 (for the CPU) and
kernel_torch (for a GPU) are within one grey level of one another. On the CPU kernel_cv2 serves both places of
`augment.place`, so the place changes no bit.
"""

import numpy as np

from deit_ray import rng

OPERATIONS = ("brightness", "contrast", "saturation")
GREY = (0.299, 0.587, 0.114)  # ITU-R 601-2 luma, as PIL's convert("L")


def draw(seed: int, epoch: int, ids, views, color_jitter: float) -> tuple[np.ndarray, np.ndarray]:
    """Factors [batch, 3] by operation, and the order [batch, 3] in which the operations come."""
    draws = rng.uniform(seed, "color jitter", epoch, ids[:, None], views[:, None], np.arange(6))
    return 1 + color_jitter * (2 * draws[:, :3] - 1), np.argsort(draws[:, 3:], axis=1)
