"""The pixels of an image are PIL's, whatever the file; deeper images are scaled by their declared range."""

import io
import resource
import time

import numpy as np
import pytest
from PIL import Image, ImageOps

from deit_ray.data import decode
from deit_ray.data.decode import DEEP, PAGES, ROTATED, SEEN_THROUGH, SMALL, decode_array, decode_file
from deit_ray.data.images import convert, encode
from deit_ray.data.listing import Unreadable
from tests.support import pictures
from tests.support.pictures import MODES, as_pil, deep_png, image_file, smooth, turned

BIG_ENDIAN_TIFF = b"MM\x00\x2a"


def adobe_inverted() -> bytes:
    """A CMYK JPEG as Adobe writes it: inverted, which its APP14 marker says."""
    content = image_file("JPEG", mode="CMYK", quality=95)
    assert b"Adobe" in content
    return content


def animated(format: str) -> bytes:
    buffer, frames = io.BytesIO(), [Image.fromarray(smooth(seed=seed)) for seed in range(3)]
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def palette_with_transparency() -> bytes:
    image = Image.fromarray(smooth()).convert("P", palette=Image.Palette.ADAPTIVE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes(range(0, 256)))
    return buffer.getvalue()


KINDS = {
    f"{format} {mode}": image_file(format, mode=mode) for format, modes in MODES.items() for mode in modes
}
KINDS |= {
    "RGBA without a transparent pixel": image_file(
        "PNG", np.dstack([smooth(), np.full((40, 52), 255, np.uint8)])
    ),
    "palette with transparency": palette_with_transparency(),
    "progressive JPEG": image_file("JPEG", progressive=True),
    "JPEG 4:4:4 as RGB": image_file("JPEG", keep_rgb=True),
    "Adobe's CMYK": adobe_inverted(),
    "JPEG with a profile": image_file("JPEG", icc_profile=bytes(3000)),
    "JPEG with bytes behind it": image_file("JPEG") + bytes(99),
    "compressed TIFF": image_file("TIFF", compression="tiff_lzw"),
    "TIFF as JPEG": image_file("TIFF", compression="jpeg"),
    "1 pixel": image_file("PNG", smooth(1, 1)),
}


@pytest.mark.parametrize("name", KINDS)
def test_pixels_are_pils(name):
    decoded = decode_file(KINDS[name])
    np.testing.assert_array_equal(decoded.pixels, as_pil(KINDS[name]))
    with Image.open(io.BytesIO(KINDS[name])) as image:
        is_opaque = image.convert("RGBA").getchannel("A").getextrema() == (255, 255)
    assert decoded.remarks == (() if is_opaque else (SEEN_THROUGH,))
    for short_side in (0, 24):
        made = decode_file(encode(KINDS[name], short_side, 95)).pixels
        wanted = Image.fromarray(as_pil(KINDS[name]))
        if short_side and min(wanted.size) > short_side:
            wanted = wanted.resize((made.shape[1], made.shape[0]), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        wanted.save(buffer, "JPEG", quality=95)
        assert np.abs(made.astype(int) - as_pil(buffer.getvalue())).mean() < 2  # grey levels: JPEG, resize


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_or_page_is_taken_and_counted(format):
    decoded = decode_file(animated(format))
    np.testing.assert_array_equal(decoded.pixels, as_pil(animated(format)))
    assert decoded.remarks == (PAGES,)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_exif_turns_an_image_only_where_it_is_asked_for(format):
    for orientation in range(1, 9):
        content = turned(format, orientation)
        with Image.open(io.BytesIO(content)) as image:
            upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        asked = (ROTATED,) if orientation > 1 else ()
        for exif, wanted in ((False, as_pil(content)), (True, upright)):
            decoded = decode_file(content, exif)
            np.testing.assert_array_equal(decoded.pixels, wanted)
            assert decoded.remarks == asked
            kept = convert(content, 0, 95, exif)
            np.testing.assert_allclose(decode_file(kept.jpeg).pixels.mean(), wanted.mean(), atol=1)
            assert decode_file(kept.jpeg).pixels.shape == wanted.shape
            assert decode_file(kept.jpeg).orientation == 1  # no decoder turns it again


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_tiff_is_turned_as_pil_turns_it(orientation):
    content = turned("TIFF", orientation)
    for exif in (False, True):
        np.testing.assert_array_equal(decode_file(content, exif).pixels, as_pil(content))


def test_damaged_exif_costs_no_image():
    content = image_file("JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode_file(content, True).pixels, as_pil(content))


def big_endian_tiff(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes()).save(buffer, "TIFF")
    assert buffer.getvalue().startswith(BIG_ENDIAN_TIFF)
    return buffer.getvalue()


def white_is_zero(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", tiffinfo={262: 0})
    return buffer.getvalue()


def pgm(values: np.ndarray, top: int) -> bytes:
    return b"P5 %d %d %d\n" % (*values.shape[::-1], top) + values.astype(">u2").tobytes()


GREY = smooth()[..., 0].astype(np.uint16)
COLOUR = smooth().astype(np.uint16)
DEEP_FILES = {  # (file, the 8-bit pixels that it must become)
    "grey PNG": (deep_png(GREY * 257), GREY),
    "grey TIFF": (image_file("TIFF", GREY * 257), GREY),
    "big-endian TIFF": (big_endian_tiff(GREY * 257), GREY),
    "TIFF, 0 is white": (white_is_zero(GREY * 257), 255 - GREY),
    "PGM of 16 bits": (pgm(GREY * 257, 65535), GREY),
    "PGM of 10 bits": (pgm(GREY * 4, 1020), GREY),
    "colour PNG": (deep_png(COLOUR[..., ::-1] * 257), COLOUR),
}


@pytest.mark.parametrize("name", DEEP_FILES)
def test_deep_images_are_scaled_from_their_declared_range(name):
    content, wanted = DEEP_FILES[name]
    decoded = decode_file(content)
    grey = np.broadcast_to(wanted if wanted.ndim == 3 else wanted[..., None], decoded.pixels.shape)
    np.testing.assert_array_equal(decoded.pixels, grey)
    assert decoded.remarks == (DEEP,)


@pytest.mark.parametrize(
    "content", [deep_png(GREY * 16), deep_png(COLOUR * 16), image_file("TIFF", GREY * 16)]
)
def test_twelve_bits_in_sixteen_are_remarked(content):
    assert decode_file(content).remarks == (DEEP, SMALL)


@pytest.mark.parametrize("dtype", ["uint8", "bool", "uint16", ">u2"])
def test_arrays_are_scaled_from_their_types_range(dtype):
    top = {"uint8": 1, "bool": 0}.get(dtype, 257)
    array = (smooth() > 127) if dtype == "bool" else (smooth().astype(np.uint16) * top).astype(dtype)
    wanted = (smooth() > 127) * 255 if dtype == "bool" else smooth()
    np.testing.assert_array_equal(decode_array(array).pixels, wanted)
    assert decode_array(array).remarks == ((DEEP,) if array.dtype.itemsize == 2 else ())


REFUSED = {
    "an empty file": (b"", "an empty file"),
    "text": (b"no image at all", 'not an image: it begins with "no image"'),
    "an unknown kind": (b"\x00\x01\x02\x03\x04\x05\x06\x07\x08", "not an image: it begins with 00 01 02"),
    "PostScript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        'not an image: it begins with "%!PS',
    ),
    "half a JPEG": (image_file("JPEG")[:900], "damaged: image file is truncated"),
    "half a PNG": (image_file("PNG")[:1500], "damaged: "),
    "half a GIF": (image_file("GIF")[:900], "damaged: "),
    "half a WebP": (image_file("WEBP")[:200], "damaged: |not an image: "),
    "half a TIFF": (image_file("TIFF")[:3000], "damaged: "),
    "floats": (image_file("TIFF", smooth()[..., 0] / np.float32(255)), "floating-point pixels, whose range"),
    "32 bits": (image_file("TIFF", GREY.astype(np.int32)), "signed or 32-bit pixels, whose range"),
    "a PNG of 10 GB": (pictures.bomb_png(60000, 60000), "too large: it declares more than 178,956,970"),
    "a JPEG of 12 GB": (pictures.bomb_jpeg(65500, 65500), "too large: it declares more than 178,956,970"),
    "a JPEG of 500 MB": (pictures.bomb_jpeg(13000, 13000), "damaged: .* too few for 13000x13000 pixels"),
    "a PNG of 500 MB": (pictures.bomb_png(13000, 13000), "damaged: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_has_a_reason_and_takes_neither_memory_nor_time(name, capfd):
    content, reason = REFUSED[name]
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for short_side in (0, 256):
        with pytest.raises(Unreadable, match=f"^({reason})"):
            encode(content, short_side, 92)
    assert decode.decode_jpeg(content) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert time.monotonic() - started < 2
    assert "".join(capfd.readouterr()) == ""  # libraries' own lines name no file


def test_harmless_damage_prints_nothing_and_has_pils_pixels(capfd):
    content = image_file("JPEG")
    damaged = content[:-2] + bytes(7) + content[-2:]
    np.testing.assert_array_equal(decode_file(damaged).pixels, as_pil(damaged))
    text = image_file("PNG")
    corrupt = (
        text[:8] + text[8:33] + b"\x00\x00\x00\x04tEXtabcd\x00\x00\x00\x00" + text[33:]
    )  # a wrong checksum
    with pytest.raises(Unreadable, match=r"^damaged, or of an unusual kind: it begins as PNG does"):
        decode_file(corrupt)
    assert "".join(capfd.readouterr()) == ""
