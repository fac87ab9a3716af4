"""JPEG bytes become uint8 pixels: decoded once, then cut at random for each view, or at the centre.

Every draw is a hash of the sample's coordinates. So a crop is the same wherever and whenever it is cut.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from deit_ray import rng
from deit_ray.data.decode import decode_file, decode_jpeg
from deit_ray.data.listing import Unreadable

BUFFER = 4 << 20  # bytes, enough for the pixels of most photographs
ATTEMPTS = 10  # as in torchvision's RandomResizedCrop
# Factors by which an axis shrinks. Up to WIDEST, a filter of three taps comes before bicubic interpolation.
# Beyond WIDEST, averaging to twice the final size comes first. It smooths, so the axis is then filtered as if
# it shrank by AVERAGED.
WIDEST = 2.5
AVERAGED = 1.8
# Long side / short side. Beyond it, the middle is cut out before the evaluation's resize, which would make
# 400 million pixels of 1x6000
THIN = 16
MARGIN = 16  # pixels kept on both sides together, for the filters

cv2.setNumThreads(1)  # a task has one CPU


@dataclass(frozen=True)
class Geometry:
    """How images become squares.

    Attributes:
        size: pixels of a side.
        scale: least and largest part of an image's area that a random crop covers.
        ratio: least and largest width / height of a random crop.
        flip: probability of a horizontal flip.
        eval_crop: evaluation resizes the short side to size / eval_crop, then cuts the centre.
        seed: the experiment's.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    eval_crop: float
    seed: int


def decode(image: np.ndarray | bytes, buffer: np.ndarray | None = None) -> np.ndarray | None:
    """Decodes RGB pixels, uint8 [height, width, 3]; None if the bytes are no image, or only a part of one.

    The pixels are those that `data prepare` sees: see `decode.decode_file`.

    Args:
        image: the bytes of an image file.
        buffer: uint8 memory for the pixels, used if they fit. Fresh memory costs time.
    """
    pixels = decode_jpeg(image, buffer)
    if pixels is not None:
        return pixels
    try:
        return decode_file(bytes(image)).pixels
    except Unreadable:
        return None


def draw(geometry: Geometry, epoch: int, ids: np.ndarray, views: np.ndarray) -> np.ndarray:
    """The random numbers of each sample's crop and flip, float64 [samples, 2 x ATTEMPTS + 3] in [0, 1)."""
    return rng.uniform(
        geometry.seed, "crop", epoch, ids[:, None], views[:, None], np.arange(2 * ATTEMPTS + 3)
    )


def crop_view(image: np.ndarray, geometry: Geometry, draws: list[float], out: np.ndarray) -> None:
    """Cuts one random crop into `out`, uint8 [size, size, 3].

    Args:
        draws: one row of the array that `draw` returns, as Python floats, which are faster here.
    """
    top, left, height, width = crop_box(image.shape[0], image.shape[1], geometry.scale, geometry.ratio, draws)
    resize(image[top : top + height, left : left + width], out)
    if draws[-1] < geometry.flip:
        cv2.flip(out, 1, dst=out)


def crop_box(height: int, width: int, scale, ratio, draws) -> tuple[int, int, int, int]:
    """(top, left, height, width), distributed as in torchvision's RandomResizedCrop, with its fallback."""
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for k in range(ATTEMPTS):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[2 * k])
        aspect = math.exp(log_low + (log_high - log_low) * draws[2 * k + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[-3] * (height - h + 1)), int(draws[-2] * (width - w + 1)), h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def crop_centre(image: np.ndarray, geometry: Geometry, out: np.ndarray) -> None:
    """Cuts the view for evaluation into `out`, uint8 [size, size, 3].

    The short side becomes size / eval_crop, then the centre is cut, as in timm's evaluation transform.
    """
    size, image = geometry.size, _without_ends(image, geometry)
    height, width = image.shape[:2]
    new_height = new_width = math.floor(size / geometry.eval_crop)
    if height <= width:
        new_width = int(new_width * width / height)
    else:
        new_height = int(new_height * height / width)
    resized = np.empty((new_height, new_width, 3), np.uint8)
    resize(image, resized)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    out[:] = resized[top : top + size, left : left + size]


def _without_ends(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The middle of a thin image, with all pixels that its centre crop needs; other images as they are."""
    height, width = image.shape[:2]
    short, long = sorted((height, width))
    if long <= THIN * short:
        return image
    scale = math.floor(geometry.size / geometry.eval_crop) / short
    kept = max(short, math.ceil(geometry.size / scale) + MARGIN)
    begin = (long - kept) // 2
    if begin <= 0:
        return image
    # the same number of pixels goes at both ends, so the middle stays where it is
    return image[:, begin : width - begin] if width > height else image[begin : height - begin]


def resize(image: np.ndarray, out: np.ndarray) -> None:
    """Resizes into `out`. The result is close to PIL's antialiased bicubic, in a quarter of its time.

    OpenCV's bicubic reads four pixels along an axis, however much the axis shrinks. So where an axis shrinks,
    a filter of three taps comes first. Its strength was fitted to PIL's result on photographs. INTER_AREA is
    further from PIL's result, and slower.

    Raises:
        TypeError: an array is not of uint8. OpenCV would leave `out` as it was.
    """
    if image.dtype != np.uint8 or out.dtype != np.uint8:
        raise TypeError(f"pixels must be uint8, not {image.dtype} and {out.dtype}")
    size = out.shape[:2]
    shrink = [old / new for old, new in zip(image.shape[:2], size, strict=True)]
    if max(shrink) > WIDEST:
        axes = zip(shrink, size, image.shape[:2], strict=True)
        halfway = [2 * new if s > WIDEST else old for s, new, old in axes]
        image = cv2.resize(image, halfway[::-1], interpolation=cv2.INTER_AREA)
        shrink = [AVERAGED if s > WIDEST else s for s in shrink]
    if max(shrink) > 1:
        rows, columns = (smoothing(s) for s in shrink)
        image = cv2.sepFilter2D(image, -1, columns, rows, borderType=cv2.BORDER_REPLICATE)
    cv2.resize(image, size[::-1], dst=out, interpolation=cv2.INTER_CUBIC)


def smoothing(shrink: float) -> np.ndarray:
    """The filter, float64 [3], to apply before bicubic interpolation along an axis that shrinks."""
    side = 0.02 + 0.22 * (shrink - 1) if shrink > 1 else 0.0
    return np.array([side, 1 - 2 * side, side])  # always three taps: OpenCV is slow with one
