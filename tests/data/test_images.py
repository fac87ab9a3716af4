"""How `data prepare` converts the kinds of files that ImageNet is known to contain."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from deit_ray.data.crop import decode
from deit_ray.data.decode import jpeg_header
from deit_ray.data.images import encode
from deit_ray.data.listing import Unreadable


def smooth(height: int = 120, width: int = 160) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (21, 21), 5), None, 0, 255, cv2.NORM_MINMAX)


def written(kind: str, pixels: np.ndarray, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def pil(content: bytes) -> np.ndarray:
    """Decodes as timm's loader does: Image.open(...).convert("RGB")."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def far(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b).mean())


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(written("JPEG", smooth(), "CMYK", quality=95), id="CMYK JPEG"),
        pytest.param(written("JPEG", smooth(), "L", quality=95), id="grey JPEG"),
        pytest.param(written("PNG", smooth()), id="PNG, whatever it is named"),
        pytest.param(written("PNG", smooth(), "P"), id="palette PNG"),
        pytest.param(written("PNG", smooth(), "LA"), id="grey PNG with transparency"),
        pytest.param(written("WEBP", smooth(), quality=95), id="WebP"),
        pytest.param(written("GIF", smooth()), id="GIF"),
        pytest.param(written("JPEG", smooth(), quality=95, progressive=True), id="progressive JPEG"),
        pytest.param(written("JPEG", smooth(), quality=95) + b"\0" * 100, id="JPEG with something behind it"),
    ],
)
@pytest.mark.parametrize("short_side", [0, 256])
def test_every_kind_becomes_the_rgb_that_timms_loader_sees(content, short_side):
    jpeg = encode(content, short_side, 95)
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.format == "JPEG"
        assert image.mode in (("RGB", "L") if short_side == 0 else ("RGB",))
    assert (
        far(pil(jpeg), pil(written("JPEG", pil(content), quality=95))) < 1
    )  # grey levels; PIL's own way, same quality and chroma


def test_original_bytes_are_kept_where_they_can_be():
    colour, grey, cmyk = (written("JPEG", smooth(), mode) for mode in ("RGB", "L", "CMYK"))
    assert [jpeg_header(content).channels for content in (colour, grey, cmyk)] == [3, 1, 4]
    assert encode(colour, 0, 92) == colour
    assert encode(grey, 0, 92) == grey
    assert encode(cmyk, 0, 92) != cmyk
    assert encode(colour, 256, 92) != colour


@pytest.mark.parametrize("short_side", [0, 256])
def test_exif_rotation_is_applied_only_where_it_is_asked_for(short_side):
    pixels, exif = smooth(120, 160), Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    content = written("JPEG", pixels, exif=exif, quality=95)
    as_stored, upright = (
        decode(encode(content, short_side, 95)),
        decode(encode(content, short_side, 95, exif=True)),
    )
    assert far(as_stored, pil(content)) < 2.5  # PIL's open does not rotate, nor may the training's decoder
    assert far(upright, np.rot90(pil(content), -1)) < 2.5


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file"),
        (b"no image at all", 'not an image: it begins with "no image"'),
        (written("JPEG", smooth())[:1500], "damaged: image file is truncated"),
        (written("PNG", smooth())[:9000], "damaged: image file is truncated"),
        (written("JPEG", smooth())[:300], "damaged: "),
    ],
    ids=["empty", "text", "truncated JPEG", "truncated PNG", "a JPEG's header"],
)
@pytest.mark.parametrize("short_side", [0, 256])
def test_an_unreadable_image_has_a_reason(content, reason, short_side):
    with pytest.raises(Unreadable, match=f"^{reason}"):
        encode(content, short_side, 92)


def test_the_short_side_is_bounded_and_the_shape_kept():
    assert decode(encode(smooth(500, 375), 256, 92)).shape == (341, 256, 3)  # 500 x 256 / 375 = 341.3
    assert decode(encode(smooth(375, 500), 256, 92)).shape == (256, 341, 3)
    assert decode(encode(smooth(100, 500), 256, 92)).shape == (100, 500, 3)  # small ones stay as they are
    assert decode(encode(smooth(257, 9000), 256, 92)).shape == (256, 8965, 3)


@pytest.mark.parametrize(
    ("chroma", "layers"), [("420", [(2, 2), (1, 1), (1, 1)]), ("444", [(1, 1), (1, 1), (1, 1)])]
)
def test_the_jpeg_has_the_quality_and_the_chroma_that_are_said(chroma, layers):
    with (
        Image.open(io.BytesIO(encode(smooth(), 256, 92, chroma=chroma))) as image,
        Image.open(io.BytesIO(written("JPEG", smooth(), quality=92))) as reference,
    ):
        assert image.quantization == reference.quantization
        assert [layer[1:3] for layer in image.layer] == layers


def test_the_resize_is_antialiased_as_pils():
    """Ours is closer to PIL's antialiased bicubic (timm's) than PIL's box filter and a plain resize are."""
    noise = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (500, 375), dtype=np.uint8), (9, 9), 1)
    pixels = np.repeat(
        cv2.normalize(noise, None, 0, 255, cv2.NORM_MINMAX)[:, :, None], 3, 2
    )  # grey: the JPEG halves chroma besides
    size = (200, 267)
    box, bicubic = (
        np.asarray(Image.fromarray(pixels).resize(size, f))
        for f in (Image.Resampling.BOX, Image.Resampling.BICUBIC)
    )
    ours = far(decode(encode(pixels, 200, 100)), bicubic)
    assert ours < 2.5  # grey levels, of noise with structures of two pixels
    assert ours < 0.5 * far(box, bicubic)
    assert ours < 0.5 * far(cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC), bicubic)
    # stripes one pixel wide become an even grey; without antialiasing they would become broad stripes
    stripes = np.zeros((600, 600, 3), np.uint8)
    stripes[:, ::2] = 255
    assert decode(encode(stripes, 200, 100)).std() < 45  # three pixels hold one or two white ones: 85 or 170
    assert decode(encode(stripes, 150, 100)).std() < 2
