"""Converts one image of any format to the RGB JPEG that shards hold."""

from dataclasses import dataclass

import cv2
import numpy as np

from deit_ray.data.crop import resize
from deit_ray.data.decode import EXIF, Decoded, decode_array, decode_file, jpeg_header
from deit_ray.data.listing import Unreadable

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # callers report unreadable images

CHROMAS = {"420": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420, "444": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444}


@dataclass(frozen=True)
class Converted:
    """A JPEG, and the remarks of `decode.Decoded` about the image that it was made from."""

    jpeg: bytes
    remarks: tuple[str, ...]


def encode(
    content: bytes | np.ndarray, short_side: int, quality: int, exif: bool = False, chroma: str = "420"
) -> bytes:
    """The JPEG alone of `convert`."""
    return convert(content, short_side, quality, exif, chroma).jpeg


def convert(
    content: bytes | np.ndarray, short_side: int, quality: int, exif: bool = False, chroma: str = "420"
) -> Converted:
    """Makes an RGB JPEG of the pixels that `decode` makes of an image.

    Args:
        content: an image file of any format that PIL reads, or RGB pixels [height, width, 3] of uint8, uint16
            or bool.
        short_side: an image with a longer short side is scaled down to this many pixels, antialiased. 0 keeps
            every size, and keeps JPEGs unchanged.
        quality: JPEG quality, 1 to 100.
        exif: whether to apply the rotation in EXIF. timm's loader does not, and published checkpoints were
            trained without it.
        chroma: 444 keeps the colours of every pixel, 420 one for four pixels.

    Raises:
        Unreadable: the content is no image, or only a part of one, or its range of values is not declared.
    """
    if isinstance(content, np.ndarray):
        decoded = decode_array(content)
    else:
        decoded = decode_file(content, exif)
        if not short_side and (kept := _as_it_is(content, decoded, exif)):
            return Converted(kept, decoded.remarks)
    pixels = decoded.pixels
    height, width = pixels.shape[:2]
    if short_side and min(height, width) > short_side:
        scale = short_side / min(height, width)
        smaller = np.empty((max(1, round(height * scale)), max(1, round(width * scale)), 3), np.uint8)
        resize(pixels, smaller)
        pixels = smaller
    parameters = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        CHROMAS[chroma],
    ]
    try:
        ok, jpeg = cv2.imencode(".jpg", np.ascontiguousarray(pixels[:, :, ::-1]), parameters)
    except cv2.error:
        ok = False
    if not ok:
        raise Unreadable(f"{width}x{height} pixels cannot become a JPEG, whose sides have at most 65,500")
    return Converted(jpeg.tobytes(), decoded.remarks)


def _as_it_is(content: bytes, decoded: Decoded, exif: bool) -> bytes | None:
    """The JPEG's own bytes, if every decoder makes the same RGB pixels of them; otherwise None.

    Not every decoder applies EXIF's rotation. So an EXIF segment that rotates is cut out; with `exif` the
    result is None instead.
    """
    header = jpeg_header(content)
    if header is None or header.channels not in (1, 3):
        return None
    if decoded.orientation == 1:
        return content
    return None if exif else _without_exif(content)


def _without_exif(jpeg: bytes) -> bytes:
    """The JPEG without its EXIF segment, so that every decoder leaves the pixels unrotated."""
    kept, place = bytearray(jpeg[:2]), 2
    while place + 4 <= len(jpeg) and jpeg[place] == 0xFF and jpeg[place + 1] != 0xDA:  # up to the scan
        length = 2 + int.from_bytes(jpeg[place + 2 : place + 4])
        if not (jpeg[place + 1] == 0xE1 and jpeg[place + 4 : place + 10] == EXIF):
            kept += jpeg[place : place + length]
        place += length
    return bytes(kept + jpeg[place:])
