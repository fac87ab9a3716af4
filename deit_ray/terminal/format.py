"""Values as people write them."""

import sys

from deit_ray.experiment.yaml_text import show
from deit_ray.outcome import Kind

STATE_COLOURS = {  # by the state's text
    "running": "cyan",
    Kind.FINISHED: "green",
    Kind.STOPPED_EARLY: "yellow",
    Kind.FAILED: "red",
    Kind.CANCELLED: "magenta",
}


def short(value) -> str:
    """A searched value with three digits."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return in_full(value)


def in_full(value) -> str:
    """A value as text; lists and sections as YAML writes them."""
    if isinstance(value, tuple):
        value = list(value)
    return show(value, most=sys.maxsize) if isinstance(value, (dict, list)) else str(value)


def short_key(key: str, keys: list[str]) -> str:
    """The last part of a dotted key, or the whole key if another key has the same last part."""
    leaf = key.rpartition(".")[2]
    return leaf if sum(k.rpartition(".")[2] == leaf for k in keys) == 1 else key


def assignments(params: dict) -> str:
    """The searched values of a trial in one line, such as lr=0.002 strength=1."""
    return " ".join(f"{short_key(key, list(params))}={short(value)}" for key, value in params.items())


def counted(count: float, noun: str, plural: str = "") -> str:
    """A number and its noun, such as 1 image, 2 images, 3 classes, 0.5 CPUs."""
    shown = f"{count:g}" if isinstance(count, float) else str(count)
    return f"{shown} {noun if count == 1 else plural or noun + 's'}"


def size(count: float) -> str:
    """A number of bytes with about three digits, such as 1.72 GB."""
    unit, factor = next(((unit, f) for unit, f in UNITS if count >= f), UNITS[-1])
    value = count / factor
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def duration(seconds: float) -> str:
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
