"""Evaluation sees images as timm's evaluation transform does: a teacher gives the same logits for both."""

import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform

from deit_ray.data import crop
from deit_ray.models.teacher import TeacherWeights, build_teacher
from deit_ray.training.step import Normalise

CPU, SIZE, CROP = torch.device("cpu"), 224, 0.875
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# mean absolute difference between an image's logits, in standard deviations of the logits of all photographs
TOLERANCE = 0.25


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    model = timm.create_model("efficientnet_lite0")
    return build_teacher(TeacherWeights("efficientnet_lite0", {}, model.state_dict(), MEAN, STD), CPU)


@pytest.fixture(scope="module")
def jpegs() -> list[bytes]:
    """Photographs that come with Python packages, whole: 300 x 451 to 512 x 512."""
    data = pytest.importorskip("skimage.data")
    pictures = [*load_sample_images().images, data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    files = [io.BytesIO() for _ in pictures]
    for picture, file in zip(pictures, files, strict=True):
        Image.fromarray(picture).save(file, "JPEG", quality=92)
    return [file.getvalue() for file in files]


def by_timm(jpeg: bytes) -> torch.Tensor:
    transform = create_transform((3, SIZE, SIZE), interpolation="bicubic", crop_pct=CROP, mean=MEAN, std=STD)
    return transform(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def by_us(jpeg: bytes) -> torch.Tensor:
    view = np.empty((SIZE, SIZE, 3), np.uint8)
    crop.crop_centre(crop.decode(jpeg), crop.Geometry(SIZE, (1.0, 1.0), (1.0, 1.0), 0.0, CROP, 0), view)
    return normalised(view)


def off_by_two(jpeg: bytes) -> torch.Tensor:
    """The same resize, but a crop two pixels off the centre."""
    image = crop.decode(jpeg)
    scale = int(SIZE / CROP) / min(image.shape[:2])
    resized = np.asarray(
        Image.fromarray(image).resize(
            [int(scale * side) for side in image.shape[1::-1]], Image.Resampling.BICUBIC
        )
    )
    top, left = ((side - SIZE) // 2 + 2 for side in resized.shape[:2])
    return normalised(resized[top : top + SIZE, left : left + SIZE].copy())


def normalised(view: np.ndarray) -> torch.Tensor:
    return Normalise(MEAN, STD, CPU)(torch.from_numpy(view).permute(2, 0, 1)[None].float() / 255)[0]


@torch.no_grad()
def differences(teacher, jpegs, a, b) -> list[float]:
    """The difference between the logits of two views, for each image; see TOLERANCE."""
    first, second = (teacher(torch.stack([see(jpeg) for jpeg in jpegs])) for see in (a, b))
    return ((first - second).abs().mean(1) / second.std(0).mean()).tolist()


def test_a_teacher_gives_the_same_logits_for_our_view_and_timms(teacher, jpegs):
    assert max(differences(teacher, jpegs, by_us, by_timm)) < TOLERANCE
    assert (
        min(differences(teacher, jpegs, off_by_two, by_timm)) > TOLERANCE
    )  # and it would notice another view
