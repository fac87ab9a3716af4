"""Draws a picture of what a policy does at several strengths."""

import numpy as np
import torch
from PIL import Image, ImageDraw

from deit_ray.augment import erasing, kernel_cv2
from deit_ray.augment.lettering import fit_font
from deit_ray.augment.policy import Photometric

STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)
GAP, TITLE = 4, 24  # pixels
LEAST_WIDTH = 90  # pixels, which a column's title needs


def draw_strengths(
    images_BHWC: np.ndarray, augment, mean: list[float], std: list[float], seed: int = 0, strengths=STRENGTHS
):
    """Draws each image as a row and each strength as a column.

    The picture shows the policy, colour jitter and random erasing, but no mixing. Small images
    are drawn larger, by whole pixels.

    Args:
        images_BHWC: uint8 crops [n, height, width, 3].
        augment: the `augment` section; its strength is replaced.
        mean, std: the `data` section's, for the fill and the noise.
        seed: seed of the draws. An image has the same draws in every column.
        strengths: from 0 to 2, one for each column.

    Returns:
        A PIL image in RGB.
    """
    larger = -(-LEAST_WIDTH // images_BHWC.shape[2])
    count, height, width = len(images_BHWC), larger * images_BHWC.shape[1], larger * images_BHWC.shape[2]
    size = len(strengths) * (width + GAP) - GAP, TITLE + count * (height + GAP) - GAP
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for column, strength in enumerate(strengths):
        left = column * (width + GAP)
        font, title = fit_font(f"strength {strength:g}", 14)
        pen.text((left + width / 2, TITLE / 2), title, "black", font, anchor="mm")
        section = augment.model_copy(update={"strength": strength})
        for row, image in enumerate(augment_at(section, images_BHWC, mean, std, seed)):
            drawn = image.repeat(larger, 0).repeat(larger, 1)
            picture.paste(Image.fromarray(drawn), (left, TITLE + row * (height + GAP)))
    return picture


def augment_at(
    augment, images_BHWC: np.ndarray, mean: list[float], std: list[float], seed: int
) -> np.ndarray:
    """Copies of the images as the student sees them before mixing, uint8 [n, height, width, 3].

    Image i has the coordinates epoch 0, id i, view 0.
    """
    ids, views = np.arange(len(images_BHWC)), np.zeros(len(images_BHWC), np.int64)
    photometric, images = Photometric.of(augment, mean, seed), images_BHWC.copy()
    kernel_cv2.augment_images(images, photometric.stages(0, ids, views, *images.shape[1:3]))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    erasing.erase(
        pixels, seed, 0, ids, views, photometric.levels.random_erasing, torch.tensor(mean), torch.tensor(std)
    )
    return (pixels * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
