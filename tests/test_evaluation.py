"""Evaluation sees images as timm's own evaluation transform does: a teacher says the same of both."""

import io

import cv2
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform

from deit_ray.data import crop
from deit_ray.models.teacher import TeacherWeights, build_teacher
from deit_ray.step import Normalise

CPU, SIZE, CROP = torch.device("cpu"), 224, 0.875
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TOLERANCE = 0.05  # mean absolute difference of an image's logits, in their standard deviation


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    model = timm.create_model("resnet18")
    return build_teacher(TeacherWeights("resnet18", {}, model.state_dict(), MEAN, STD), CPU)


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


def otherwise(jpeg: bytes) -> torch.Tensor:
    """What an evaluation without the resize to size / crop ratio sees: the whole image, squeezed."""
    return normalised(cv2.resize(crop.decode(jpeg), (SIZE, SIZE), interpolation=cv2.INTER_AREA))


def normalised(view: np.ndarray) -> torch.Tensor:
    return Normalise(MEAN, STD, CPU)(torch.from_numpy(view).permute(2, 0, 1)[None].float() / 255)[0]


@torch.no_grad()
def differences(teacher, jpegs, a, b) -> list[float]:
    """Of each image, in standard deviations of its logits."""
    first, second = (teacher(torch.stack([see(jpeg) for jpeg in jpegs])) for see in (a, b))
    return ((first - second).abs().mean(1) / first.std(1)).tolist()


def test_a_teacher_says_the_same_of_our_view_as_of_timms(teacher, jpegs):
    assert max(differences(teacher, jpegs, by_us, by_timm)) < TOLERANCE
    assert min(differences(teacher, jpegs, otherwise, by_timm)) > TOLERANCE  # and it would notice another view
