"""From a source to shards: images become RGB JPEG of a bounded size, in random order over the whole data set."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

import deit_ray
from deit_ray import rng, storage
from deit_ray.data import shards, sources
from deit_ray.data.crop import resize
from deit_ray.errors import UserError

SHORT_SIDE = 256  # pixels
QUALITY = 92
ORDER_SEED = 0


@dataclass(frozen=True)
class Prepared:
    """What was made: the manifest, and the names of images that could not be read, by split."""

    manifest: shards.Manifest
    unreadable: dict[str, list[str]]


def prepare(
    source: str,
    out: str,
    short_side: int = SHORT_SIDE,
    quality: int = QUALITY,
    command: str = "",
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Writes the shards and the manifest of a source.

    Args:
        source: `digits`, or a folder with a folder per class.
        out: URI of the folder to write; a data set that is there already is replaced.
        short_side: images with a longer short side are scaled down to it; 0 keeps every size.
        quality: of the JPEGs.
        command: recorded in the manifest.
        on_image: called with the number of images done and in all.

    Raises:
        UserError: the source cannot be read, or nothing in it.
    """
    opened = sources.open_source(source)
    total, done = sum(len(images) for images in opened.splits.values()), 0
    written, counts, unreadable = {}, {}, {}

    def rows(split: str, images: list[sources.Image]) -> Iterator[tuple[bytes, int, str]]:
        nonlocal done
        unreadable[split] = []
        for index in rng.permutation(ORDER_SEED, f"order of {split}", len(images)):
            image = images[index]
            jpeg = encode(image.read(), short_side, quality)
            done += 1
            on_image(done, total)
            if jpeg is None:
                unreadable[split].append(image.name)
            else:
                yield jpeg, image.label, image.name

    storage.remove(storage.join(storage.absolute(out), shards.MANIFEST))  # until the end the folder is unfinished
    for split, images in opened.splits.items():
        written[split], counts[split] = shards.write_split(storage.absolute(out), split, rows(split, images))
    for split, found in written.items():
        if not found:
            raise UserError(f"{source}: holds no readable image for {split}")
    made_by = {"command": command, "version": deit_ray.__version__, "short_side": short_side, "quality": quality}
    manifest = shards.write_manifest(storage.absolute(out), opened.classes, written, counts, made_by)
    return Prepared(manifest, unreadable)


def encode(content: bytes | np.ndarray, short_side: int, quality: int) -> bytes | None:
    """An RGB JPEG with a bounded short side, or None where the content is no image.

    Grey images become RGB; transparency is dropped; the rotation that EXIF asks for is not applied, as in timm's loader.
    """
    pixels = content
    if isinstance(content, bytes):
        try:
            flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
            pixels = cv2.cvtColor(cv2.imdecode(np.frombuffer(content, np.uint8), flags), cv2.COLOR_BGR2RGB)
        except cv2.error:
            return None
    height, width = pixels.shape[:2]
    if short_side and min(height, width) > short_side:
        scale = short_side / min(height, width)
        smaller = np.empty((max(1, round(height * scale)), max(1, round(width * scale)), 3), np.uint8)
        resize(pixels, smaller)
        pixels = smaller
    ok, jpeg = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return jpeg.tobytes() if ok else None
