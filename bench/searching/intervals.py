"""Ratios of mean epochs over paired seeds, with bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Ratio:
    """A ratio of two means over the same seeds, and its 95% interval."""

    value: float
    low: float
    high: float

    def meets(self, most: float) -> bool:
        """Whether the upper end of the interval is at most `most`."""
        return self.high <= most

    def figures(self, name: str) -> dict[str, float]:
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio_of_means(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """The ratio of two means, `above` over `below`, element i of both from seed i.

    The interval is the bootstrap's percentile interval (Efron and Tibshirani 1993, section 13.3): seeds are
    drawn with replacement, both values of a seed together.
    """
    above, below = np.asarray(above, float), np.asarray(below, float)
    drawn = np.random.default_rng(0).integers(len(above), size=(RESAMPLES, len(above)))
    ratios = above[drawn].mean(axis=1) / below[drawn].mean(axis=1)
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Ratio(float(above.mean() / below.mean()), float(low), float(high))
