"""The photometric operations. The kernels, kernel_cv2 and kernel_torch, apply them to images.

Every operation reduces to one of five primitives: a lookup, a lookup made from the image's histogram, a blend
with grey, an affine map, a small filter. An operation is a function `(magnitudes, signs, canvas) ->
primitive` for n images at once: magnitudes are float64 [n] in [0, 10], signs are +1 or -1 [n]. The fifteen
operations here are RandAugment's (Cubuk et al. 2020, arXiv:1909.13719) in timm's "increasing" variant, which
DeiT uses: a higher magnitude is stronger.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MAX_MAGNITUDE = 10.0
VALUES = np.arange(256)


@dataclass(frozen=True)
class Canvas:
    """The images' size in pixels, and the colour of the pixels that a geometric operation leaves empty."""

    height: int
    width: int
    fill: tuple[int, int, int]


@dataclass(frozen=True)
class Lookup:
    """A new value for each value of a pixel, the same in all three channels: tables, uint8 [n, 256]."""

    tables: np.ndarray


@dataclass(frozen=True)
class HistogramLookup:
    """A lookup made from the image: `rule(histograms, xp)` gives the tables.

    The rule takes float64 counts [n, 3, 256], which are whole numbers, and their module (numpy or torch). It
    returns new values [n, 3, 256].
    """

    rule: Callable


@dataclass(frozen=True)
class GreyBlend:
    """grey + factor x (image - grey), factors [n]. Grey is each pixel's own, or the mean over the image."""

    factors: np.ndarray
    of_mean: bool = False


@dataclass(frozen=True)
class Affine:
    """A bicubic affine map: output pixel (x, y) comes from matrix @ (x, y, 1), counted in pixel centres.

    matrices is [n, 2, 3].
    """

    matrices: np.ndarray
    fill: tuple[int, int, int]


@dataclass(frozen=True)
class Filter:
    """filtered + factor x (image - filtered): taps [n, k] along both axes, factors [n].

    Edges are replicated.
    """

    taps: np.ndarray
    factors: np.ndarray
    keep_rim: bool = False  # whether the outermost pixels stay unchanged


@dataclass(frozen=True)
class Stage:
    """A primitive for the images at the places `chosen` of a batch, int64 [n].

    A policy returns a list of stages.
    """

    chosen: np.ndarray
    primitive: Lookup | HistogramLookup | GreyBlend | Affine | Filter


def stages_of(
    operations,
    index: np.ndarray,
    applied: np.ndarray,
    magnitudes: np.ndarray,
    signs: np.ndarray,
    canvas: Canvas,
) -> list[Stage]:
    """The stages of one layer, in which image b gets operations[index[b]] if applied[b].

    All arrays are [batch].
    """
    stages = []
    for k, operation in enumerate(operations):
        chosen = np.flatnonzero(applied & (index == k))
        if len(chosen):
            stages.append(Stage(chosen, operation(magnitudes[chosen], signs[chosen], canvas)))
    return _merge(stages)


def _merge(stages: list[Stage]) -> list[Stage]:
    """Joins stages of the same primitive, so that a GPU gets few large pieces of work.

    Stages may be joined because no image is in two of them.
    """
    groups = {}
    for stage in stages:
        fields = [getattr(stage.primitive, field.name) for field in dataclasses.fields(stage.primitive)]
        key = (type(stage.primitive), *(f.shape[1:] if isinstance(f, np.ndarray) else f for f in fields))
        groups.setdefault(key, []).append((stage.chosen, fields))
    return [
        Stage(
            np.concatenate([c for c, _ in group]),
            kind(*(_join(values) for values in zip(*(f for _, f in group), strict=True))),
        )
        for (kind, *_), group in groups.items()
    ]


def _join(values):
    return np.concatenate(values) if isinstance(values[0], np.ndarray) else values[0]


def autocontrast(magnitudes, signs, canvas) -> HistogramLookup:
    return HistogramLookup(stretch_rule)


def equalize(magnitudes, signs, canvas) -> HistogramLookup:
    return HistogramLookup(equalize_rule)


def invert(magnitudes, signs, canvas) -> Lookup:
    return _lookup(np.broadcast_to(255 - VALUES, (len(magnitudes), 256)))


def rotate(magnitudes, signs, canvas) -> Affine:
    """Rotates around the centre, by up to 30 degrees."""
    angle = -np.radians(signs * magnitudes / MAX_MAGNITUDE * 30)
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = canvas.width / 2, canvas.height / 2
    return affine([[cos, sin, x - cos * x - sin * y], [-sin, cos, y + sin * x - cos * y]], canvas)


def posterize(magnitudes, signs, canvas) -> Lookup:
    """Keeps the 4 to 0 highest bits."""
    bits = 4 - (magnitudes / MAX_MAGNITUDE * 4).astype(int)
    return _lookup(VALUES & ~((1 << (8 - bits[:, None])) - 1))


def solarize(magnitudes, signs, canvas) -> Lookup:
    """Inverts the values from a threshold up. The threshold falls from 256 to 0 with the magnitude."""
    threshold = 256 - np.minimum(256, (magnitudes / MAX_MAGNITUDE * 256).astype(int))
    return _lookup(np.where(threshold[:, None] <= VALUES, 255 - VALUES, VALUES))


def solarize_add(magnitudes, signs, canvas) -> Lookup:
    """Adds up to 110 to the values below 128."""
    added = (magnitudes / MAX_MAGNITUDE * 110).astype(int)
    return _lookup(np.where(VALUES < 128, VALUES + added[:, None], VALUES))


def color(magnitudes, signs, canvas) -> GreyBlend:
    return GreyBlend(_factors(magnitudes, signs))


def contrast(magnitudes, signs, canvas) -> GreyBlend:
    return GreyBlend(_factors(magnitudes, signs), of_mean=True)


def brightness(magnitudes, signs, canvas) -> Lookup:
    return brighten(_factors(magnitudes, signs))


def sharpness(magnitudes, signs, canvas) -> Filter:
    # PIL blends with (ones(3, 3) + 4 x the centre) / 13: 9/13 of the mean of nine pixels, 4/13 of the pixel
    factors = 1 - (1 - _factors(magnitudes, signs)) * 9 / 13
    return Filter(np.full((len(factors), 3), 1 / 3), factors, keep_rim=True)


def shear_x(magnitudes, signs, canvas) -> Affine:
    return affine([[1, signs * magnitudes / MAX_MAGNITUDE * 0.3, 0], [0, 1, 0]], canvas)


def shear_y(magnitudes, signs, canvas) -> Affine:
    return affine([[1, 0, 0], [signs * magnitudes / MAX_MAGNITUDE * 0.3, 1, 0]], canvas)


def translate_x(magnitudes, signs, canvas) -> Affine:
    return affine([[1, 0, signs * magnitudes / MAX_MAGNITUDE * 0.45 * canvas.width], [0, 1, 0]], canvas)


def translate_y(magnitudes, signs, canvas) -> Affine:
    return affine([[1, 0, 0], [0, 1, signs * magnitudes / MAX_MAGNITUDE * 0.45 * canvas.height]], canvas)


RANDAUGMENT = (
    autocontrast,
    equalize,
    invert,
    rotate,
    posterize,
    solarize,
    solarize_add,
    color,
    contrast,
    brightness,
    sharpness,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
)


def affine(rows, canvas: Canvas) -> Affine:
    """The map from a position in the output to the position in the source.

    Args:
        rows: 2 rows of 3 numbers or arrays [n], counted in pixel corners.
    """
    a, b, c, d, e, f = np.broadcast_arrays(*(np.asarray(value, float) for row in rows for value in row))
    c, f = c + (a + b - 1) / 2, f + (d + e - 1) / 2  # from pixel corners, as PIL counts, to centres
    return Affine(np.stack([a, b, c, d, e, f], axis=1).reshape(-1, 2, 3), canvas.fill)


def brighten(factors: np.ndarray) -> Lookup:
    """A blend with black; factors [n]."""
    return _lookup(blend(np.float32(0), VALUES.astype(np.float32), factors.astype(np.float32)[:, None]))


def blend(base, image, factor):
    """base + factor x (image - base), clipped to [0, 255]; float32 arrays or tensors.

    PIL then rounds down.
    """
    return (base + factor * (image - base)).clip(0, 255)


def stretch_rule(histograms, xp):
    """The darkest level present becomes 0 and the brightest 255, in floating point as PIL computes it."""
    values = xp.cumsum(xp.ones_like(histograms), axis=-1) - 1
    low = xp.amin(xp.where(histograms > 0, values, 255.0), axis=-1)[..., None]
    high = xp.amax(xp.where(histograms > 0, values, 0.0), axis=-1)[..., None]
    span = xp.where(high > low, high - low, 1.0)
    scale = xp.full_like(low, 255) / span  # with a plain 255 torch would multiply by a reciprocal
    return xp.where(high > low, xp.trunc(values * scale + -low * scale).clip(0, 255), values)


def equalize_rule(histograms, xp):
    """Makes the cumulative counts of the values a straight line, in whole numbers as PIL does."""
    values = xp.cumsum(xp.ones_like(histograms), axis=-1) - 1
    cumulated = xp.cumsum(histograms, axis=-1)
    total = cumulated[..., -1:]
    below_last = xp.amax(xp.where(cumulated < total, cumulated, 0.0), axis=-1)[..., None]
    step = xp.floor(below_last / xp.full_like(below_last, 255))
    level = xp.floor((xp.floor(step / 2) + cumulated - histograms) / xp.where(step > 0, step, 1.0))
    return xp.where(step > 0, level.clip(0, 255), values)


def _factors(magnitudes, signs) -> np.ndarray:
    """Factors of a blend, 0.1 to 1.9; 1 changes nothing."""
    return np.maximum(0.1, 1 + signs * (magnitudes / MAX_MAGNITUDE * 0.9))


def _lookup(tables: np.ndarray) -> Lookup:
    return Lookup(tables.astype(np.uint8))
