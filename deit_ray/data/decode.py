"""Any image file, or array of pixels, becomes 8-bit RGB pixels, those that PIL makes; or a reason why not.

The rule is written in docs/data.md, "The pixels of an image". `data prepare`, training and `predict` all call
this file.
"""

import io
import logging
import warnings
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from deit_ray.data.listing import Unreadable

# PIL refuses larger images too. Such a size is a decompression bomb, or takes gigabytes
MOST_PIXELS = 2 * 89_478_485
JPEG_BLOCK = 512  # pixels that a byte of a JPEG can stand for at most: 64 for each bit of its first scan
ORIENTATION = 0x0112  # EXIF's tag
JPEG, EXIF, XMP = b"\xff\xd8", b"Exif\x00\x00", b"http://ns.adobe.com/xap/"
FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the markers that begin a frame
ARITHMETIC = 0xC9  # the first marker of arithmetic coding
PROGRAMS = {
    "EPS",
    "WMF",
    "BUFR",
    "GRIB",
    "HDF5",
    "MPEG",
}  # PIL runs other programs for them, or reads no pixels
# Formats in which PIL's modes I;16 and I hold unsigned pixels of 16 bits, or of as many as are declared
DECLARED = {"PNG", "TIFF", "JPEG2000", "PPM"}
SMALL_RANGE = 4  # a deep image that uses less than 1/4 of its range has a small range
# Remarks about an image, which `data prepare` counts
ROTATED, DEEP, SMALL, PAGES, SEEN_THROUGH = "rotated", "deep", "small range", "pages", "transparent"

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # callers report unreadable images, and name them


@dataclass(frozen=True)
class Decoded:
    """A decoded image.

    Attributes:
        pixels: uint8 [height, width, 3], RGB.
        orientation: EXIF's number, 1 to 8; 1 where the image asks for no rotation.
        remarks: what a person should know: some of ROTATED, DEEP, SMALL, PAGES, SEEN_THROUGH.
    """

    pixels: np.ndarray
    orientation: int = 1
    remarks: tuple[str, ...] = ()


def decode_file(content: bytes, exif: bool = False) -> Decoded:
    """Decodes an image file of any format.

    Args:
        content: the file's bytes.
        exif: whether to apply the rotation in EXIF.

    Raises:
        Unreadable: the content is no image, or only a part of one, or does not declare its pixels' range.
    """
    pixels = decode_jpeg(content)
    if pixels is not None:
        orientation, remarks = _jpeg_orientation(content), []
    else:
        pixels, orientation, remarks = _decode_pil(content)
    if orientation != 1:
        remarks.append(ROTATED)
    return Decoded(_upright(pixels, orientation) if exif else pixels, orientation, tuple(remarks))


def decode_image(image: Image.Image, exif: bool = False) -> Decoded:
    """Converts an image that PIL has opened or made; it becomes the same pixels as the file it came from.

    Raises:
        Unreadable: it is damaged, or does not declare its pixels' range.
    """
    try:
        with _quiet():
            pixels, orientation, remarks = _read_image(image)
    except Unreadable:
        raise
    except Exception as error:  # as in `_decode_pil`
        raise Unreadable(f"damaged: {_sentence(error)}") from None
    if orientation != 1:
        remarks.append(ROTATED)
    return Decoded(_upright(pixels, orientation) if exif else pixels, orientation, tuple(remarks))


def decode_array(pixels: np.ndarray) -> Decoded:
    """Converts an RGB array [height, width, 3] of uint8, bool or uint16 to 8 bits.

    Raises:
        Unreadable: another dtype; its range is not declared.
    """
    if pixels.dtype == np.uint8:
        return Decoded(pixels)
    if pixels.dtype == bool:
        return Decoded(pixels.astype(np.uint8) * 255)
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        return Decoded(_eight_bits(pixels, 65535), 1, _deep_remarks(pixels, 65535))
    raise Unreadable(f"pixels of the type {pixels.dtype.name}, whose range is not declared")


def decode_jpeg(content: bytes | np.ndarray, buffer: np.ndarray | None = None) -> np.ndarray | None:
    """Decodes a sound grey or colour JPEG, uint8 [height, width, 3], RGB; None for all other content.

    Takes nine tenths of PIL's time, and makes the same pixels: both are libjpeg-turbo.

    Args:
        content: the bytes of an image file.
        buffer: uint8 memory for the pixels, used if they fit. Fresh memory costs time.
    """
    header = jpeg_header(content)
    if header is None or header.channels not in (1, 3) or header.pixels > MOST_PIXELS:
        return None
    if not header.fits(len(content)):  # libjpeg would fill all memory with grey
        return None
    if buffer is not None and 3 * header.pixels > len(buffer):
        buffer = None
    try:
        return simplejpeg.decode_jpeg(content, "RGB", buffer=buffer)
    except ValueError:
        return None


class JpegHeader(NamedTuple):
    """The frame header of a JPEG.

    Attributes:
        height, width: in pixels.
        channels: 1 (grey), 3 (colour) or 4 (CMYK).
        marker: the byte that begins the header, and names the kind of compression.
        end: place behind the header.
    """

    height: int
    width: int
    channels: int
    marker: int
    end: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def fits(self, length: int) -> bool:
        """Whether so many bytes can hold the declared pixels. Arithmetic coding has no such bound."""
        return self.marker >= ARITHMETIC or self.pixels <= JPEG_BLOCK * length


def jpeg_header(content: bytes | np.ndarray) -> JpegHeader | None:
    """The frame header of a JPEG; None where there is none."""
    content, place = memoryview(content), 2
    if content[:2] != JPEG:
        return None
    while place + 9 < len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker in FRAMES:
            height, width = (int.from_bytes(content[place + at : place + at + 2]) for at in (5, 7))
            return JpegHeader(height, width, content[place + 9], marker, place + 10)
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            place += 2
        else:
            place += 2 + int.from_bytes(content[place + 2 : place + 4])
    return None


def _jpeg_orientation(content: bytes) -> int:
    """EXIF's orientation of a sound JPEG."""
    head = content[: jpeg_header(content).end]
    if EXIF not in head and XMP not in head:
        return 1
    with _quiet(), Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
        return _orientation(image)


def _orientation(image: Image.Image) -> int:
    """The orientation that an image's EXIF asks for; 1 where it has none, or one that cannot be read."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # PIL's parsers raise many kinds on damaged EXIF. The pixels are sound, and are used
        return 1
    return found if found in range(1, 9) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels, turned as EXIF's orientation says; see PIL's `ImageOps.exif_transpose`."""
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels)


def _decode_pil(content: bytes) -> tuple[np.ndarray, int, list[str]]:
    """(RGB pixels, EXIF's orientation, remarks), decoded by PIL.

    Raises:
        Unreadable: PIL cannot decode the bytes; the message says why.
    """
    if not content:
        raise Unreadable("an empty file")
    header = jpeg_header(content)
    if header and header.pixels <= MOST_PIXELS and not header.fits(len(content)):
        raise Unreadable(
            f"damaged: {len(content)} bytes are too few for {header.width}x{header.height} pixels"
        )
    try:
        with _quiet(), Image.open(io.BytesIO(content), formats=_formats()) as image:
            return _read_image(image)
    except Image.UnidentifiedImageError:
        if kind := _kind_of(content):
            raise Unreadable(f"damaged, or of an unusual kind: it begins as {kind} does") from None
        raise Unreadable(f"not an image: it begins with {_beginning(content)}") from None
    except Image.DecompressionBombError:
        raise Unreadable(f"too large: it declares more than {MOST_PIXELS:,} pixels") from None
    except Unreadable:
        raise
    except Exception as error:  # PIL's decoders raise any kind on damaged files: OSError, struct.error, ...
        raise Unreadable(f"damaged: {_sentence(error)}") from None


def _read_image(image: Image.Image) -> tuple[np.ndarray, int, list[str]]:
    """(RGB pixels, EXIF's orientation, remarks) of an image that PIL has opened."""
    deep = _is_deep(image)
    image.load()
    if image.mode[0] in "IF":
        pixels, remarks = _deep_grey(image)
    else:
        pixels = np.asarray(image.convert("RGB"))
        remarks = list(_deep_remarks(pixels, 255)) if deep else []
        if _is_seen_through(image):
            remarks.append(SEEN_THROUGH)
    if getattr(image, "is_animated", False):
        remarks.append(PAGES)
    return pixels, _orientation(image), remarks


def _sentence(error: Exception) -> str:
    """Why PIL cannot decode an image, in words."""
    is_sentence = isinstance(error, OSError) and "'" not in str(error) and str(error).strip()
    return str(error) if is_sentence else "its parts do not fit together"


def _quiet() -> warnings.catch_warnings:
    """Keeps PIL's warnings off the screen: they name no file."""
    return warnings.catch_warnings(action="ignore")


@cache
def _formats() -> list[str]:
    """The formats that PIL decodes by itself."""
    Image.init()
    return [name for name in Image.ID if name not in PROGRAMS]


def _is_deep(image: Image.Image) -> bool:
    """Whether the file of an opened, not yet loaded image holds more than 8 bits for a colour."""
    if image.mode[0] in "IF":
        return True
    for decoder, _, _, arguments in getattr(image, "tile", ()):  # an image that was not opened has none
        if ";16" in str(arguments) or (decoder.startswith("ppm") and arguments[-1] > 255):
            return True
    return False


def _is_seen_through(image: Image.Image) -> bool:
    """Whether a loaded image has a pixel that is not opaque."""
    if not image.has_transparency_data:
        return False
    with_alpha = image if image.getbands()[-1] == "A" else image.convert("RGBA")
    return with_alpha.getchannel("A").getextrema()[0] < 255


def _deep_grey(image: Image.Image) -> tuple[np.ndarray, list[str]]:
    """(RGB pixels, remarks) of a loaded grey image of more than 8 bits."""
    values, bits = np.asarray(image), 16
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if tags:
        bits = tags.get(258, (1,))[0]
    is_signed = tags.get(339, (1,))[0] != 1
    if image.mode == "F" or image.format not in DECLARED or bits > 16 or is_signed:
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
        raise Unreadable(f"{kind} pixels, whose range is not declared; save it with 8 or 16 bits")
    top = 2**bits - 1
    if tags.get(262) == 0:  # 0 is white
        values = top - values
    return np.repeat(_eight_bits(values, top)[:, :, None], 3, 2), list(_deep_remarks(values, top))


def _eight_bits(values: np.ndarray, top: int) -> np.ndarray:
    """Scales values from 0 to `top` to uint8 from 0 to 255, rounded."""
    return ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)


def _deep_remarks(values: np.ndarray, top: int) -> tuple[str, ...]:
    """The remarks about a deep image whose values could be 0 to `top`."""
    is_small = int(values.max()) - int(values.min()) < (top + 1) // SMALL_RANGE
    return (DEEP, SMALL) if is_small else (DEEP,)


def _kind_of(content: bytes) -> str | None:
    """The format that the first bytes are of; None where they are of none."""
    accepts = {name: Image.OPEN[name][1] for name in _formats()}
    first = content[:16].ljust(16, b"\0")  # some of PIL's checks need so many bytes
    return next((name for name, accept in accepts.items() if accept and accept(first) is True), None)


def _beginning(content: bytes) -> str:
    """The first bytes of a file, as text if they are text, else as hexadecimal numbers."""
    first = content[:8]
    return f'"{first.decode()}"' if all(32 <= byte < 127 for byte in first) else first.hex(" ")


def describe_remarks(remarks: dict[str, list], rotation: str) -> list[str]:
    """A sentence about each remark about images, with their number.

    Args:
        remarks: [number of images, name of the first] of each remark.
        rotation: what became of the rotation in EXIF: applied, or not applied.
    """
    texts = {
        ROTATED: (f"asks for a rotation in EXIF, which was {rotation}",
                  f"ask for a rotation in EXIF, which was {rotation}"),
        DEEP: ("has more than 8 bits; its declared range became 0 to 255",
               "have more than 8 bits; their declared range became 0 to 255"),
        SMALL: ("uses less than a quarter of its declared range: it is nearly even, perhaps black",
                "use less than a quarter of their declared range: they are nearly even, perhaps black"),
        PAGES: ("has several pages or frames, of which the first was taken",
                "have several pages or frames, of which the first was taken"),
        SEEN_THROUGH: ("has transparency, which was dropped",
                       "have transparency, which was dropped"),
    }  # fmt: skip
    notes = []
    for remark, (one, many) in texts.items():
        count, name = remarks.get(remark, (0, ""))
        if count == 1:
            notes.append(f"1 image {one}; it is {name}")
        elif count:
            notes.append(f"{count} images {many}; the first is {name}")
    return notes
