"""What a preparation's short side, JPEG quality and chroma cost: top-1 of real weights, and bytes and speed.

    python bench/preparation.py IMAGES WEIGHTS [--model tf_efficientnet_lite0] [--sides 0 256]

IMAGES and WEIGHTS are those of bench/evaluation.py. Each image is converted as `deit-ray data prepare` does,
decoded, cut as an evaluation does, and classified. For every short side (0 keeps the original bytes) and
for quality 92 with chroma 4:2:0 and quality 95 with 4:4:4, a line has, under names such as top1_256_92_420:

- top1;
- kb: mean size of an image in kilobytes;
- images_per_s: decode and one random crop, by seconds of one core.

One model takes about 6 minutes of one slow core; --sides runs a part of the table.
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from evaluation import CPU, synset_of
from record import record

from deit_ray.data import crop
from deit_ray.data.images import convert
from deit_ray.experiment.config import Teacher
from deit_ray.models.teacher import build_teacher, read_teacher
from deit_ray.training.step import Normalise

FORMS = ("92_420", "95_444")  # quality and chroma
BATCH = 8  # fits into a core's cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("weights")
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--sides", type=int, nargs="*", default=[0, 256, 320, 384, 448])
    parser.add_argument("--forms", nargs="*", default=FORMS, help="of quality and chroma")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(p for p in arguments.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    synsets = sorted({synset_of(path) for path in files})
    labels = torch.tensor([synsets.index(synset_of(path)) for path in files])
    section = Teacher(weights=arguments.weights, model=arguments.model, mean=[0.5] * 3, std=[0.5] * 3)
    cfg = timm.get_pretrained_cfg(arguments.model)
    size = cfg.input_size[-1]
    teacher = read_teacher(section, section.weights, size, len(synsets))
    network = build_teacher(teacher, CPU).to(memory_format=torch.channels_last)
    normalise = Normalise(teacher.mean, teacher.std, CPU)
    geometry = crop.Geometry(size, (0.08, 1.0), (0.75, 4 / 3), 0.5, cfg.crop_pct, 0)
    contents = [path.read_bytes() for path in files]
    for name, images in forms_of(contents, arguments.sides, arguments.forms):
        right = classify([cut(image, geometry) for image in images], network, normalise) == labels
        figures = {
            f"top1_{name}": round(right.float().mean().item(), 4),
            f"kb_{name}": round(float(np.mean([len(image) for image in images])) / 1000, 1),
            f"images_per_s_{name}": round(speed(images, geometry)),
        }
        record("preparation", figures)


def forms_of(
    contents: list[bytes], sides: list[int], forms: Iterable[str]
) -> Iterator[tuple[str, list[bytes]]]:
    """The images in each form, with the form's name. Side 0 has one form: as they are."""
    if 0 in sides:
        yield "original", contents
    for side in filter(None, sides):
        for form in forms:
            quality, chroma = form.split("_")
            jpegs = [convert(content, side, int(quality), chroma=chroma).jpeg for content in contents]
            yield f"{side}_{form}", jpegs


def cut(image: bytes, geometry: crop.Geometry) -> torch.Tensor:
    """The evaluation's view of an image, uint8 [size, size, 3]."""
    view = np.empty((geometry.size, geometry.size, 3), np.uint8)
    crop.crop_centre(crop.decode(image), geometry, view)
    return torch.from_numpy(view)


@torch.no_grad()
def classify(views: list[torch.Tensor], network: torch.nn.Module, normalise: Normalise) -> torch.Tensor:
    """The class of each view, int64 [views]."""
    answers = []
    for first in range(0, len(views), BATCH):
        batch = torch.stack(views[first : first + BATCH]).permute(0, 3, 1, 2).float() / 255
        answers.append(network(normalise(batch)).argmax(1))
    return torch.cat(answers)


def speed(images: list[bytes], geometry: crop.Geometry) -> float:
    """Images a second of this core that are decoded and cut at random once."""
    draws = crop.draw(geometry, 0, np.arange(len(images)), np.zeros(len(images), int)).tolist()
    view, buffer = np.empty((geometry.size, geometry.size, 3), np.uint8), np.empty(crop.BUFFER, np.uint8)
    began = time.process_time()
    for image, draw in zip(images, draws, strict=True):
        crop.crop_view(crop.decode(image, buffer), geometry, draw, view)
    return len(images) / (time.process_time() - began)


if __name__ == "__main__":
    main()
