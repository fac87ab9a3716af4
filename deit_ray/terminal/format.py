"""Values as people write them."""

import math


def standard_error(fraction: float, images: float) -> float:
    """Of a fraction measured on so many images: sqrt(p (1 - p) / n)."""
    return math.sqrt(max(0.0, fraction * (1 - fraction)) / images)


def short(value) -> str:
    """A searched value as people write it."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def duration(seconds: float) -> str:
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
