"""Small prepared data sets."""

from collections.abc import Callable

import numpy as np

from deit_ray.data import shards
from deit_ray.data.images import encode

TINTS = ("reddish", "greenish", "bluish")
TINT, NOISE = 10, 60  # grey levels: how far a class is from grey, and the deviation of its pixels


def write_colours(uri: str, rows: dict[str, int], size: int = 40, classes: int = 3) -> shards.Manifest:
    """Writes noise images from which nothing can be learnt; labels count 0, 1, 2, 0, ...

    Args:
        rows: number of images of each split.
    """

    def draw(generator: np.random.Generator, i: int) -> np.ndarray:
        return generator.integers(0, 256, (size, size + i % 7, 3), dtype=np.uint8)

    return _write(uri, list("abcdefghij"[:classes]), rows, draw)


def write_tints(uri: str, rows: dict[str, int]) -> shards.Manifest:
    """Writes noise images of three tints, which a small model learns in about ten steps.

    Labels count 0, 1, 2, 0, ...

    Args:
        rows: number of images of each split.
    """

    def draw(generator: np.random.Generator, i: int) -> np.ndarray:
        centre = np.full(3, 120)
        centre[i % 3] += TINT
        return generator.normal(centre, NOISE, (20, 20 + i % 3, 3)).clip(0, 255).astype(np.uint8)

    return _write(uri, list(TINTS), rows, draw)


def _write(
    uri: str, classes: list[str], rows: dict[str, int], draw: Callable[[np.random.Generator, int], np.ndarray]
) -> shards.Manifest:
    splits, counts = {}, {}
    for split, count in rows.items():
        generator = np.random.default_rng(len(split))
        images = ((encode(draw(generator, i), 0, 95), i % len(classes), f"{split}-{i}") for i in range(count))
        splits[split], counts[split] = shards.write_split(uri, split, images)
    return shards.write_manifest(uri, classes, splits, counts, {})
