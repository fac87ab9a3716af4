"""Photographs that come with Python packages."""

import functools

import numpy as np
import pytest

SOURCES = ("scikit-learn", "scikit-image")


@functools.cache
def photographs(source: str = "scikit-learn") -> np.ndarray:
    """China and a flower, or an astronaut, a cat and a cup of coffee: uint8 [n, 224, 224, 3]."""
    if source == "scikit-learn":
        from sklearn.datasets import load_sample_images

        pictures = load_sample_images().images
    else:
        data = pytest.importorskip("skimage.data")
        pictures = [data.astronaut(), data.chelsea(), data.coffee()]
    return np.stack([picture[40:264, 60:284] for picture in pictures])
