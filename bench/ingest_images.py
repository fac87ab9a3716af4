"""The images of bench/ingest.py: given or made, prepared in both forms, and written as files for the peers.

The files have the same JPEG bytes as the prepared shards.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq

from deit_ray.data.prepare import SHORT_SIDE, prepare

SHORT_SIDES = {"prepared": SHORT_SIDE, "original": 0}
MADE, MADE_BYTES = 1000, (80_000, 120_000)
COPIES = 8  # of each image in a peer's folder, so that an epoch takes longer than the start of an epoch


def lay_out(images: Path | None, cache: Path) -> dict:
    """Prepares the images in both forms, and writes the JPEG bytes of the shards to files for the peers.

    Args:
        images: a folder with JPEGs at any depth; None to make images.
        cache: folder for the results; images that it holds already are used.

    Returns:
        The number of images, their mean size in bytes, and whether they were made.
    """
    where = cache / "images.json"
    if where.exists():
        return json.loads(where.read_text())
    source = cache / "source"
    if images:
        contents = [
            path.read_bytes()
            for path in sorted(images.rglob("*"))
            if path.suffix.lower() in (".jpg", ".jpeg")
        ]
    else:
        contents = list(make_images())
    print(f"{len(contents)} images {f'of {images}' if images else 'made of scikit-image photographs'}, "
          f"{np.mean([len(c) for c in contents]) / 1000:.0f} KB on average", flush=True)  # fmt: skip
    for number, content in enumerate(contents):
        for split in ("train", "test") if number < 2 else ("train",):  # a data set has some test images
            folder = source / split / f"class-{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:05d}.jpg").write_bytes(content)
    for form, short_side in SHORT_SIDES.items():
        prepare(str(source), str(shards_of(cache, form)), short_side, max_bad=0.01)
        table = pq.read_table(shards_of(cache, form) / "train-00000.parquet", columns=["image", "label"])
        for number, (jpeg, label) in enumerate(zip(table["image"], table["label"], strict=True)):
            unique, folder = (
                cache / form / "unique" / f"{number:05d}.jpg",
                cache / form / "images" / f"class-{label}",
            )
            for parent in (unique.parent, folder):
                parent.mkdir(parents=True, exist_ok=True)
            unique.write_bytes(jpeg.as_py())
            for copy in range(COPIES):
                (folder / f"{number:05d}-{copy}.jpg").symlink_to(unique)
    made = {
        "images": len(contents),
        "bytes": float(np.mean([len(c) for c in contents])),
        "made": images is None,
    }
    where.write_text(json.dumps(made))
    return made


def shards_of(cache: Path, form: str) -> Path:
    return cache / form / "shards"


def make_images() -> Iterator[bytes]:
    """Makes JPEGs of 500x375 pixels with 4:2:0 chroma, and with noise until they have 80 to 120 KB."""
    from skimage import data

    pictures, rng = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()], np.random.default_rng(0)
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        95,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    ]
    made = 0
    while made < MADE:
        picture = pictures[made % len(pictures)]
        width = int(rng.integers(300, min(picture.shape[1], picture.shape[0] * 4 // 3)))
        height = width * 3 // 4
        top, left = (
            int(rng.integers(0, whole - part + 1))
            for whole, part in zip(picture.shape, (height, width), strict=False)
        )
        part = cv2.resize(
            picture[top : top + height, left : left + width, ::-1], (500, 375), interpolation=cv2.INTER_CUBIC
        )
        for deviation in range(0, 40, 3):
            noisy = np.clip(part + rng.normal(0, deviation, part.shape), 0, 255).astype(np.uint8)
            jpeg = cv2.imencode(".jpg", noisy, options)[1].tobytes()
            if MADE_BYTES[0] <= len(jpeg) <= MADE_BYTES[1]:
                made += 1
                yield jpeg
                break
