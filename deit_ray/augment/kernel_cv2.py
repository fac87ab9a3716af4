"""The CPU's kernel: OpenCV, image by image."""

import cv2
import numpy as np

from deit_ray.augment import table


def augment_images(images_BHWC: np.ndarray, seed: int, epoch: int, ids, views, color_jitter: float) -> None:
    """Jitters uint8 images [batch, height, width, 3] in place; factors are drawn from 1 +- color_jitter."""
    if color_jitter == 0:
        return
    factors, order = table.draw(seed, epoch, ids, views, color_jitter)
    for image, factor, sequence in zip(images_BHWC, factors, order, strict=True):
        for operation in sequence:
            _apply(image, table.OPERATIONS[operation], factor[operation])


def _apply(image: np.ndarray, operation: str, factor: float) -> None:
    if operation == "brightness":
        other = np.zeros_like(image)
    elif operation == "contrast":
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        other = np.full_like(image, int(cv2.sumElems(grey)[0] / grey.size + 0.5))
    else:
        other = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    cv2.addWeighted(image, factor, other, 1 - factor, 0, dst=image)
