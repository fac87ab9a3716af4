"""How sure an accuracy is: the error of a fraction of images that were answered correctly.

docs/reliability.md ("How sure a value is") explains the rules of this file.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

CONFIDENCE = 0.95
FEW_IMAGES = 200  # with fewer, a person is told how many images a difference needs
UNEVEN = 1.5  # largest class over smallest class, above which the balanced accuracy is measured too
DIFFERENCES = (0.1, 0.05, 0.02)  # the differences for which a person is told the number of images


def interval(fraction: float, images: float, choices: int = 1) -> tuple[float, float]:
    """Wilson's score interval of a fraction, which also holds at 0 and 1 (Wilson 1927, equation 4).

    Args:
        fraction: fraction of the images that were answered correctly.
        images: number of images that were counted.
        choices: number of evaluations from which this one was chosen as the best. The interval is widened by
            Bonferroni's correction, so that it would hold for all of them at once.

    Returns:
        (lowest, highest) accuracy that agrees with the measured one at a confidence of 95%.
    """
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * max(1, choices)))
    scale = 1 + z**2 / images
    centre = (fraction + z**2 / (2 * images)) / scale
    half = z / scale * math.sqrt(max(0.0, fraction * (1 - fraction)) / images + z**2 / (4 * images**2))
    # at 0 and 1 an end is the fraction itself; rounding must not put the fraction outside
    return max(0.0, min(centre - half, fraction)), min(1.0, max(centre + half, fraction))


def show_accuracy(fraction: float, images: float | None, choices: int = 1, digits: int = 4) -> str:
    """A fraction with its interval, such as 0.9792 (0.940-0.993); alone if `images` is not known."""
    shown = f"{fraction:.{digits}f}"
    if not images or not math.isfinite(fraction):
        return shown
    low, high = interval(fraction, images, choices)
    return f"{shown} ({low:.3f}-{high:.3f})"


def is_clearly_better(best: float, of_best: tuple[float, float], other: float, of_other: tuple) -> bool:
    """Whether `best` exceeds `other` by more than their error.

    The error of the difference follows from both intervals (Newcombe 1998, method 10).

    Args:
        of_best, of_other: intervals of both fractions.
    """
    return best - other > math.hypot(best - of_best[0], of_other[1] - other)


def images_for(difference: float, fraction: float) -> int:
    """The number of images on which two models must be compared to tell apart accuracies this far apart.

    Args:
        fraction: approximate accuracy of both models.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    variance = 2 * fraction * (1 - fraction)
    return math.ceil(z**2 * variance / difference**2)


def few_images_warning(split: str, images: int, fraction: float = 0.9) -> str | None:
    """What to tell a person about a split with few images; None if it has enough.

    Args:
        fraction: the accuracy for which the needed images are told.
    """
    if not 0 < images < FEW_IMAGES:
        return None
    low, high = interval(fraction, images)
    needed = ", ".join(
        f"{images_for(d, fraction):,} images to see a difference of {d:g}" for d in DIFFERENCES
    )
    return (
        f"{split} has only {images} images: where {fraction:g} is measured, the accuracy lies between "
        f"{low:.2f} and {high:.2f}; two models need {needed}"
    )


def is_uneven(counts: Sequence[int]) -> bool:
    """Whether the largest class has more than `UNEVEN` times the images of the smallest one.

    Args:
        counts: number of images of each class; classes without an image are not looked at.
    """
    present = [count for count in counts if count]
    return len(present) > 1 and max(present) > UNEVEN * min(present)


def largest_share(counts: Sequence[int]) -> float:
    """The accuracy of always answering the largest class; 0 without images."""
    return max(counts, default=0) / max(1, sum(counts))


def chance_remark(name: str, fraction: float, images: float | None, share: float | None) -> str | None:
    """Says that an accuracy is not better than always answering the largest class; None if it is better.

    Args:
        name: name of the metric.
        share: accuracy of always answering the largest class; None if it is not known.
    """
    if share is None or not images or not math.isfinite(fraction):
        return None
    if interval(fraction, images)[0] > share:
        return None
    within = "" if fraction <= share else ", within its error"
    return f"{name} is not better than always answering the largest class ({share:.4f}){within}"
