"""Converts one image of any format to the RGB JPEG that shards hold."""

import io

import cv2
import numpy as np
from PIL import Image, ImageOps

from deit_ray.data.crop import resize
from deit_ray.data.listing import Unreadable

ORIENTATION = 0x0112  # EXIF's tag
JPEG, EXIF = b"\xff\xd8", b"Exif\x00\x00"
FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the markers that begin a frame

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # callers report unreadable images


def encode(content: bytes | np.ndarray, short_side: int, quality: int, exif: bool = False) -> bytes:
    """Makes an RGB JPEG. Grey images become RGB, PIL converts CMYK, transparency is dropped.

    Args:
        content: an image file of any format that OpenCV or PIL reads, or RGB pixels uint8 [height, width, 3].
        short_side: an image with a longer short side is scaled down to this many pixels, antialiased. 0 keeps
            every size, and keeps JPEGs unchanged.
        quality: JPEG quality, 1 to 100. Chroma is 4:2:0.
        exif: whether to apply the rotation in EXIF. timm's loader does not, and published checkpoints were
            trained without it.

    Raises:
        Unreadable: the content is no image, or only a part of one.
    """
    if isinstance(content, np.ndarray):
        pixels = np.ascontiguousarray(content[:, :, ::-1])
    else:
        pixels = _decode_cv2(content, exif)
        if pixels is None:
            pixels = _decode_pil(content, exif)
        elif not short_side and (kept := _as_it_is(content, exif)):
            return kept
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
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    ]
    try:
        ok, jpeg = cv2.imencode(".jpg", pixels, parameters)
    except cv2.error as error:  # a side above 65,500 pixels
        raise Unreadable(f"{width}x{height} pixels cannot become a JPEG: {error.err}") from None
    if not ok:
        raise Unreadable(f"{width}x{height} pixels cannot become a JPEG")
    return jpeg.tobytes()


def _decode_cv2(content: bytes, exif: bool) -> np.ndarray | None:
    """BGR pixels, uint8 [height, width, 3]; None for CMYK, and for bytes that OpenCV cannot decode.

    OpenCV converts CMYK to other colours than PIL does.
    """
    if not content or (content.startswith(JPEG) and jpeg_channels(content) not in (1, 3)):
        return None
    flags = cv2.IMREAD_COLOR if exif else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:
        return None


def _decode_pil(content: bytes, exif: bool) -> np.ndarray:
    """BGR pixels, uint8 [height, width, 3], decoded by PIL.

    Raises:
        Unreadable: PIL cannot decode the bytes; the message has PIL's reason.
    """
    if not content:
        raise Unreadable("an empty file")
    try:
        with Image.open(io.BytesIO(content)) as image:
            upright = ImageOps.exif_transpose(image) if exif else image
            return np.ascontiguousarray(np.asarray(upright.convert("RGB"))[:, :, ::-1])
    except Image.UnidentifiedImageError:
        raise Unreadable(f"not an image: it begins with {content[:8]!r}") from None
    except Exception as error:  # whatever PIL's decoders raise on damaged files
        raise Unreadable(f"damaged: {error}") from None


def jpeg_channels(content: bytes) -> int | None:
    """The number of channels in a JPEG's frame header: 1, 3, or 4 for CMYK.

    None where there is no such header.
    """
    place = 2
    while place + 9 < len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker in FRAMES:
            return content[place + 9]
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            place += 2
        else:
            place += 2 + int.from_bytes(content[place + 2 : place + 4])
    return None


def _as_it_is(content: bytes, exif: bool) -> bytes | None:
    """The JPEG's own bytes, if every decoder makes the same RGB pixels of them; otherwise None.

    Not every decoder applies EXIF's rotation. So an EXIF segment that rotates is cut out; with `exif` the
    result is None instead.
    """
    if not content.startswith(JPEG) or jpeg_channels(content) not in (1, 3):
        return None
    if EXIF not in content[: 1 << 17]:
        return content
    with Image.open(io.BytesIO(content)) as image:
        orientation = image.getexif().get(ORIENTATION, 1)
    if orientation == 1:
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
