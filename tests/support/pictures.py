"""Image files of every kind that people have, made here, and what PIL makes of them."""

import io
import struct
import warnings
import zlib

import cv2
import numpy as np
from PIL import Image

MODES = {  # the modes that PIL writes in a format
    "JPEG": ("RGB", "L", "CMYK", "YCbCr"),
    "PNG": ("RGB", "L", "1", "P", "LA", "RGBA"),
    "GIF": ("P", "L", "1", "RGB", "RGBA"),
    "BMP": ("RGB", "L", "1", "P"),
    "WEBP": ("RGB", "RGBA", "L"),
    "TIFF": ("RGB", "L", "1", "P", "LA", "RGBA", "CMYK"),
    "PPM": ("RGB", "L", "1"),
    "TGA": ("RGB", "L", "P", "RGBA"),
    "PCX": ("RGB", "L", "1", "P"),
    "ICO": ("RGBA", "RGB"),
    "JPEG2000": ("RGB", "L", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
    "SGI": ("RGB", "L"),
}


def smooth(height: int = 40, width: int = 52, seed: int = 0) -> np.ndarray:
    """A smooth colour picture, uint8 [height, width, 3], with corners that differ, so that turns are seen."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def image_file(format: str, pixels: np.ndarray | None = None, mode: str | None = None, **options) -> bytes:
    """The bytes of an image file.

    Args:
        mode: PIL's mode to convert to; by default the pixels' own.
        options: of PIL's save.
    """
    image = Image.fromarray(smooth() if pixels is None else pixels)
    if mode == "P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
    elif mode in ("LA", "RGBA"):
        image = image.convert(mode)
        alpha = Image.fromarray(
            np.linspace(0, 255, image.width, dtype=np.uint8)[None].repeat(image.height, 0)
        )
        image.putalpha(alpha)
    elif mode:
        image = image.convert(mode, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned(format: str, orientation: int, pixels: np.ndarray | None = None) -> bytes:
    """An image file whose EXIF asks for a rotation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image_file(format, pixels, exif=exif, **({"quality": 95} if format in ("JPEG", "WEBP") else {}))


def as_pil(content: bytes) -> np.ndarray:
    """What PIL makes of an image file: Image.open(...).convert("RGB")."""
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def deep_png(pixels: np.ndarray) -> bytes:
    """A PNG of uint16 pixels, grey or colour, by OpenCV."""
    return cv2.imencode(".png", pixels)[1].tobytes()


def bomb_png(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that declares a large size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bomb_jpeg(width: int, height: int) -> bytes:
    """A JPEG of a few hundred bytes that declares a large size."""
    content = image_file("JPEG", smooth(8, 8))
    place = content.find(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", height, width) + content[place + 4 :]
