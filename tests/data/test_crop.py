"""Crops are distributed as torchvision's, resizing is close to PIL's, and damaged images are noticed."""

import math
import resource
import time

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_image, load_sample_images
from torchvision.transforms import RandomResizedCrop

from deit_ray.data import crop
from deit_ray.data.crop import Geometry

IMAGENET = Geometry(224, (0.08, 1.0), (3 / 4, 4 / 3), 0.5, 0.875, seed=3)


def boxes(scale, ratio, height=375, width=500, count=4000) -> np.ndarray:
    geometry = Geometry(224, scale, ratio, 0.5, 0.875, seed=3)
    draws = crop.draw(geometry, 0, np.arange(count), np.zeros(count, int))
    return np.array([crop.crop_box(height, width, scale, ratio, d) for d in draws])


def torchvision_boxes(scale, ratio, height=375, width=500, count=4000) -> np.ndarray:
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    return np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)])


def smallest_p(a: np.ndarray, b: np.ndarray) -> float:
    """The smallest p-value of Kolmogorov-Smirnov tests on top, left, height, width, area and aspect."""
    columns = [(x[:, 0], x[:, 1], x[:, 2], x[:, 3], x[:, 2] * x[:, 3], x[:, 3] / x[:, 2]) for x in (a, b)]
    return min(ks_2samp(p, q).pvalue for p, q in zip(*columns, strict=True))


def test_crop_boxes_are_distributed_as_torchvisions():
    assert (
        smallest_p(boxes((0.08, 1.0), (3 / 4, 4 / 3)), torchvision_boxes((0.08, 1.0), (3 / 4, 4 / 3))) > 0.001
    )
    # the fallback: an image so narrow that most attempts fail
    assert (
        smallest_p(
            boxes((0.5, 1.0), (3 / 4, 4 / 3), 400, 90), torchvision_boxes((0.5, 1.0), (3 / 4, 4 / 3), 400, 90)
        )
        > 0.001
    )


def test_the_statistical_test_sees_a_wrong_distribution():
    assert (
        smallest_p(boxes((0.12, 1.0), (3 / 4, 4 / 3)), torchvision_boxes((0.08, 1.0), (3 / 4, 4 / 3))) < 0.001
    )


def test_half_of_the_crops_are_flipped():
    ramp = np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 1, 3))
    draws = crop.draw(IMAGENET, 0, np.arange(400), np.zeros(400, int))
    out, flipped = np.empty((224, 224, 3), np.uint8), 0
    for d in draws:
        crop.crop_view(ramp, IMAGENET, d, out)
        flipped += int(out[0, 0, 0]) > int(out[0, -1, 0])
    assert 150 < flipped < 250  # five standard deviations of a fair coin are 50


@pytest.mark.parametrize("size", [224, 96])
def test_resizing_is_close_to_pils_antialiased_bicubic(size):
    """Differences in grey levels over crops of six photographs; a shift by one pixel gives 10 and more."""
    data = pytest.importorskip("skimage.data")
    photos = [*load_sample_images().images, data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    down, up = [], []
    for number, photo in enumerate(photos):
        for draws in crop.draw(IMAGENET, 0, np.full(40, number), np.arange(40)):
            top, left, height, width = crop.crop_box(*photo.shape[:2], IMAGENET.scale, IMAGENET.ratio, draws)
            box = photo[top : top + height, left : left + width]
            ours = np.empty((size, size, 3), np.uint8)
            crop.resize(box, ours)
            theirs = np.asarray(Image.fromarray(box).resize((size, size), Image.Resampling.BICUBIC))
            (up if max(height, width) <= size else down).append(np.abs(ours.astype(int) - theirs).mean())
    assert np.mean(down) <= 1.0
    assert max(down) <= 4
    if size == 224:  # at 96 pixels hardly any crop is enlarged
        assert len(up) > 20
        assert np.mean(up) <= 0.7
        assert max(up) <= 4


def test_a_crop_that_shrinks_a_little_is_as_close_to_pils_as_others():
    """On noise with structures of two pixels: 0.6 to 0.7 grey levels, and 1.1 to 1.4 without the filter."""
    noise = np.random.default_rng(0).integers(0, 256, (260, 260, 3), dtype=np.uint8)
    photo = cv2.GaussianBlur(noise, (0, 0), 0.8)
    for side in (230, 238, 246):
        ours = np.empty((224, 224, 3), np.uint8)
        crop.resize(photo[:side, :side], ours)
        theirs = np.asarray(Image.fromarray(photo[:side, :side]).resize((224, 224), Image.Resampling.BICUBIC))
        plain = cv2.resize(photo[:side, :side], (224, 224), interpolation=cv2.INTER_CUBIC)
        assert far(ours, theirs) < 0.75 * far(plain, theirs) < 1.1


def far(a: np.ndarray, b: np.ndarray) -> float:
    return np.abs(a.astype(int) - b).mean()


def test_a_buffer_is_used_where_pixels_fit_into_it_and_changes_none(sound):
    pixels = crop.decode(sound)
    buffer = np.zeros(crop.BUFFER, np.uint8)
    np.testing.assert_array_equal(crop.decode(sound, buffer), pixels)
    assert np.shares_memory(crop.decode(sound, buffer), buffer)
    np.testing.assert_array_equal(crop.decode(sound, np.zeros(1000, np.uint8)), pixels)


def test_a_jpeg_is_refused_where_opencv_refuses_it_and_has_the_same_pixels_otherwise(sound):
    scan = len(sound) // 2
    harmless = sound[:-2] + bytes(7) + sound[-2:]  # bytes before the end that belong to nothing
    for jpeg in (
        sound,
        harmless,
        sound + b"more",
        sound[:scan],
        sound[:-40],
        sound[:scan] + bytes(len(sound) - scan),
    ):
        ours, theirs = crop.decode(jpeg), cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert (ours is None) == (theirs is None)
        np.testing.assert_array_equal(ours, theirs)
    assert crop.decode(sound[:scan]) is None
    assert crop.decode(harmless) is not None


@pytest.fixture(scope="module")
def sound() -> bytes:
    """A photograph as a JPEG."""
    return cv2.imencode(".jpg", load_sample_image("china.jpg"), [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def test_the_centre_crop_is_timms():
    from timm.data import create_transform

    photo = load_sample_image("flower.jpg")
    geometry = Geometry(224, (0.08, 1.0), (3 / 4, 4 / 3), 0.5, 0.875, 0)
    ours = np.empty((224, 224, 3), np.uint8)
    crop.crop_centre(photo, geometry, ours)
    transform = create_transform(
        (3, 224, 224), interpolation="bicubic", crop_pct=0.875, mean=(0, 0, 0), std=(1, 1, 1)
    )
    theirs = (transform(Image.fromarray(photo)).permute(1, 2, 0).numpy() * 255).round()
    assert np.abs(ours - theirs).mean() < 2


def test_bytes_that_are_no_image_decode_to_none():
    assert crop.decode(b"") is None
    assert crop.decode(b"no image") is None
    assert crop.decode(cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()).shape == (8, 8, 3)


@pytest.mark.parametrize("shape", [(1, 6000), (6000, 1), (2, 65000), (3, 900), (900, 30), (30, 900)])
@pytest.mark.parametrize("size", [32, 224])
def test_a_thin_image_is_cut_before_it_is_resized(shape, size):
    """The middle is the same as that of the whole image's resize, in neither a gigabyte nor a second."""
    height, width = shape
    noise = np.random.default_rng(0).integers(0, 256, (1, 70000, 3), dtype=np.uint8)
    row = cv2.GaussianBlur(noise, (0, 1), 0.2 * min(shape))  # the crop shows about five waves
    row = cv2.normalize(row, None, 0, 255, cv2.NORM_MINMAX)
    image = np.repeat(row[:, : max(shape)], min(shape), 0)
    image = np.ascontiguousarray(image if width > height else image.swapaxes(0, 1))
    geometry = Geometry(size, (0.08, 1.0), (3 / 4, 4 / 3), 0.5, 0.875, 0)
    centre, views = np.zeros((size, size, 3), np.uint8), np.zeros((20, size, size, 3), np.uint8)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    crop.crop_centre(image, geometry, centre)
    for view, draws in zip(views, crop.draw(geometry, 0, np.arange(20), np.zeros(20, int)), strict=True):
        crop.crop_view(image, geometry, draws, view)
    assert time.monotonic() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    short = math.floor(size / 0.875)
    long = int(short * max(shape) / min(shape))
    if short * long < 20e6:  # the whole resize fits into memory
        whole = np.empty((short, long, 3) if width > height else (long, short, 3), np.uint8)
        crop.resize(image, whole)
        top, left = (round((side - size) / 2) for side in whole.shape[:2])
        expected = whole[top : top + size, left : left + size]
        # in grey levels; the middle may move by half a pixel
        assert np.abs(centre.astype(int) - expected).mean() < 4
        assert np.abs(centre.astype(int) - expected[::-1, ::-1]).mean() > 12


def test_other_types_than_uint8_are_refused_instead_of_leaving_the_memory_as_it_was():
    with pytest.raises(TypeError, match="pixels must be uint8, not float32 and uint8"):
        crop.resize(np.ones((9, 9, 3), np.float32), np.empty((4, 4, 3), np.uint8))
