"""Where images come from, before they are shards: each source lists its splits, classes and images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deit_ray import rng
from deit_ray.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
TEST_FOLDERS = ("test", "val", "valid", "validation")
TEST_FRACTION = 0.2  # of a source that has no test images of its own
SPLIT_SEED = 0  # the split belongs to the data set, not to an experiment
DIGIT_SIZE = 16  # pixels


@dataclass(frozen=True)
class Image:
    """An image to be read: its name, its label and where its bytes or pixels come from."""

    name: str
    label: int
    read: Callable[[], bytes | np.ndarray]  # an encoded file, or RGB pixels uint8 [height, width, 3]


@dataclass(frozen=True)
class Source:
    classes: list[str]
    splits: dict[str, list[Image]]


def open_source(source: str) -> Source:
    """The source that a name or a folder stands for.

    Raises:
        UserError: it is none that is known.
    """
    return digits() if source == "digits" else class_folders(Path(source))


def digits() -> Source:
    """scikit-learn's load_digits: 1,797 scans of handwritten digits, 8x8, here scaled to RGB 16x16."""
    import cv2
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    grey = np.clip(scans.reshape(-1, 8, 8) * (255 / 16), 0, 255).astype(np.uint8)

    def pixels(i):
        large = cv2.resize(grey[i], (DIGIT_SIZE, DIGIT_SIZE), interpolation=cv2.INTER_CUBIC)
        return np.repeat(large[:, :, None], 3, axis=2)

    images = [Image(f"digit-{i:04d}", int(label), lambda i=i: pixels(i)) for i, label in enumerate(labels)]
    return Source([str(digit) for digit in range(10)], split_by_class(images))


def class_folders(folder: Path) -> Source:
    """A folder per class, either straight in `folder` or in train/ and test/ (or val/) below it; classes in sorted order."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; SOURCE is a folder with one folder of images per class, or the word digits")
    names = {entry.name.lower(): entry for entry in sorted(folder.iterdir()) if entry.is_dir()}
    test = next((names[name] for name in TEST_FOLDERS if name in names), None)
    if "train" in names and test:
        classes, train_images = _read_classes(names["train"])
        test_classes, test_images = _read_classes(test, least=1)
        if strange := sorted(set(test_classes) - set(classes)):
            raise UserError(f"{test}: has the class {strange[0]!r}, which {names['train']} has not")
        renumbered = [Image(i.name, classes.index(test_classes[i.label]), i.read) for i in test_images]
        return Source(classes, {"train": train_images, "test": renumbered})
    classes, images = _read_classes(folder)
    return Source(classes, split_by_class(images))


def split_by_class(images: list[Image]) -> dict[str, list[Image]]:
    """`train` and `test`: of every class the same fraction, at least one image of each where it has two."""
    by_label: dict[int, list[Image]] = {}
    for image in images:
        by_label.setdefault(image.label, []).append(image)
    train, test = [], []
    for label, members in sorted(by_label.items()):
        order = rng.permutation(SPLIT_SEED, "test split", len(members), label)
        count = max(1, round(TEST_FRACTION * len(members))) if len(members) > 1 else 0
        test += [members[i] for i in order[:count]]
        train += [members[i] for i in order[count:]]
    return {"train": train, "test": test}


def _read_classes(folder: Path, least: int = 2) -> tuple[list[str], list[Image]]:
    folders = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    images = [
        Image(str(path.relative_to(folder)), label, path.read_bytes)
        for label, entry in enumerate(folders)
        for path in sorted(entry.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    if len(folders) < least:
        raise UserError(f"{folder}: holds {len(folders)} class folders; at least {least} are needed, each with its images")
    empty = sorted({entry.name for entry in folders} - {folders[image.label].name for image in images})
    if empty:
        raise UserError(f"{folder / empty[0]}: holds no images; known are {', '.join(SUFFIXES)}")
    return [entry.name for entry in folders], images
