"""From JPEG bytes to uint8 pixels: decode once, then a random crop for each view, or the centre for evaluation.

Every draw is a hash of the sample's coordinates, so a crop is the same wherever and whenever it is cut.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg

from deit_ray import rng

BUFFER = 4 << 20  # bytes that hold the pixels of most photographs
ATTEMPTS = 10  # as in torchvision's RandomResizedCrop
MILD = 1.1  # times that bicubic alone shrinks an axis as well as area averaging does; so do 15% of the crops of short side 256 to 224
WIDEST = (
    2.5  # times that three taps and bicubic can shrink an axis; more is averaged to twice the size first,
)
AVERAGED = 1.8  # which, having been smoothed, goes on as if it shrank by less than 2

cv2.setNumThreads(1)  # a task uses the one CPU it was given


@dataclass(frozen=True)
class Geometry:
    """How images become squares of `size` pixels."""

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    eval_crop: float
    seed: int


def decode(image: np.ndarray | bytes, buffer: np.ndarray | None = None) -> np.ndarray | None:
    """RGB pixels, uint8 [height, width, 3], or None where the bytes are no image, or only a part of one.

    simplejpeg decodes a sound JPEG to OpenCV's pixels in nine tenths of its time. About anything else OpenCV decides, as in
    `data prepare`: it forgives what does not touch the pixels.

    Args:
        buffer: uint8, where pixels may be put that fit into it, since fresh memory costs time.
    """
    try:
        return simplejpeg.decode_jpeg(image, "RGB", buffer=buffer)
    except ValueError:
        pass
    try:
        return cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:
        return None


def draw(geometry: Geometry, epoch: int, ids: np.ndarray, views: np.ndarray) -> np.ndarray:
    """The random numbers of each sample's crop and flip, float64 [samples, 2 x ATTEMPTS + 3] in [0, 1)."""
    return rng.uniform(
        geometry.seed, "crop", epoch, ids[:, None], views[:, None], np.arange(2 * ATTEMPTS + 3)
    )


def crop_view(image: np.ndarray, geometry: Geometry, draws: list[float], out: np.ndarray) -> None:
    """Cuts one random crop into `out`, uint8 [size, size, 3]. `draws` is one row of `draw`; Python's floats are quicker here."""
    top, left, height, width = crop_box(image.shape[0], image.shape[1], geometry.scale, geometry.ratio, draws)
    resize(image[top : top + height, left : left + width], out)
    if draws[-1] < geometry.flip:
        cv2.flip(out, 1, dst=out)


def crop_box(height: int, width: int, scale, ratio, draws) -> tuple[int, int, int, int]:
    """(top, left, height, width) distributed as torchvision's RandomResizedCrop.get_params, fallback included."""
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
    """The evaluation's view: the short side to size / eval_crop, then the centre, as timm's evaluation transform."""
    size, (height, width) = geometry.size, image.shape[:2]
    short = math.floor(size / geometry.eval_crop)
    new_height, new_width = (
        (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
    )
    resized = np.empty((new_height, new_width, 3), np.uint8)
    resize(image, resized)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    out[:] = resized[top : top + size, left : left + size]


def resize(image: np.ndarray, out: np.ndarray) -> None:
    """Resizes into `out`, close to PIL's antialiased bicubic, in a quarter of its time.

    OpenCV's bicubic looks at four pixels, however many there are to one of the result. So where an axis shrinks by more than a
    tenth, a filter of three taps comes first; its strength was fitted to PIL's result on photographs. INTER_AREA is further from
    PIL's and slower.
    """
    size, shrink = (
        out.shape[:2],
        [old / new for old, new in zip(image.shape[:2], out.shape[:2], strict=False)],
    )
    if max(shrink) > WIDEST:
        halfway = [
            2 * new if s > WIDEST else old for s, new, old in zip(shrink, size, image.shape, strict=False)
        ]
        image = cv2.resize(image, halfway[::-1], interpolation=cv2.INTER_AREA)
        shrink = [AVERAGED if s > WIDEST else s for s in shrink]
    if max(shrink) > MILD:
        rows, columns = (smoothing(s) for s in shrink)
        image = cv2.sepFilter2D(image, -1, columns, rows, borderType=cv2.BORDER_REPLICATE)
    cv2.resize(image, size[::-1], dst=out, interpolation=cv2.INTER_CUBIC)


def smoothing(shrink: float) -> np.ndarray:
    """The filter for an axis that becomes this many times shorter, before bicubic interpolation."""
    side = 0.02 + 0.22 * (shrink - 1) if shrink > 1 else 0.0
    return np.array([side, 1 - 2 * side, side])  # three taps always: OpenCV is slow with one
