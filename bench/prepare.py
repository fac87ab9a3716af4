"""Compares `data prepare` with the bare work on the pixels, and measures whether its memory grows.

    python bench/prepare.py IMAGES

IMAGES is a folder of JPEGs, or of class folders of JPEGs. The source that is prepared repeats them, since the
data set must be larger than the shuffle's buffer. Prints

- images_per_s: a whole preparation on all cores of this machine, on a Ray that runs already;
- bare_images_per_s: the same images only decoded, resized and encoded, by the same functions in as many
  processes;
- share_of_bare: images_per_s / bare_images_per_s, at least 0.8;
- peak_growth: the peak memory (proportional set size of all processes, Ray's included) for 100 shards divided
  by the peak memory for 10 shards, at most 1.2;
- peak_growth_without_ray: the same after subtracting the memory of an idle Ray.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.measure import PeakMemory, memory_bytes
from bench.record import record
from deit_ray.cluster import connect
from deit_ray.data.crop import resize
from deit_ray.data.prepare import QUALITY, SHORT_SIDE, prepare

SHARD = 512  # images: shards are small, so that 100 of them take only some minutes
CLASSES = 10
LOOK_S = 0.05  # seconds for each shard between measurements of memory, which take 0.1 s of a core each
WARM_UP = 64  # images before the clock starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument(
        "--shards", type=int, nargs=2, default=(10, 100), help="shards of the smaller and the larger data set"
    )
    arguments = parser.parse_args()
    paths = sorted(p for p in arguments.images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    cores = len(os.sched_getaffinity(0))
    few, many = arguments.shards
    before = bare(paths, cores)
    with tempfile.TemporaryDirectory() as folder, connect.connected("local", False, print):
        idle = memory_bytes()
        small, large = (measure(paths, shards, Path(folder)) for shards in (few, many))
    after = bare(paths, cores)
    per_s, bare_per_s = large["images"] / large["seconds"], (before + after) / 2
    record("prepare", {
        "images": large["images"],
        "images_per_s": round(per_s, 1),
        "bare_images_per_s": round(bare_per_s, 1),
        "bare_before_images_per_s": round(before, 1),
        "bare_after_images_per_s": round(after, 1),
        "share_of_bare": round(per_s / bare_per_s, 3),
        "idle_ray_mb": round(idle / 1e6),
        "peak_small_mb": round(small["peak"] / 1e6),
        "peak_large_mb": round(large["peak"] / 1e6),
        "peak_growth": round(large["peak"] / small["peak"], 3),
        "peak_growth_without_ray": round((large["peak"] - idle) / (small["peak"] - idle), 3),
        "source_bytes_per_image": round(large["source_bytes"] / large["images"]),
        "shard_bytes_per_image": round(large["shard_bytes"] / large["images"]),
        "small_shards": few,
        "large_shards": many,
        "shard_images": SHARD,
    })  # fmt: skip


def measure(paths: list[Path], shards: int, folder: Path) -> dict:
    """Prepares so many shards over Ray; returns images, seconds, peak memory, and sizes in bytes."""
    place, out = folder / f"source-{shards}", folder / f"out-{shards}"
    count = link_images(place / "train", paths, shards * SHARD) + link_images(place / "test", paths, SHARD)
    with PeakMemory(every_s=LOOK_S * shards) as memory:  # equally often for both data sets
        begin = time.perf_counter()
        manifest = prepare(str(place), str(out), address="local", shard_images=SHARD).manifest
        seconds = time.perf_counter() - begin
    sizes = sum(shard.bytes for found in manifest.splits.values() for shard in found)
    source_bytes = sum(path.stat().st_size for path in place.rglob("*.jpg"))
    return {
        "images": count,
        "seconds": seconds,
        "peak": memory.peak,
        "shard_bytes": sizes,
        "source_bytes": source_bytes,
    }


def link_images(folder: Path, images: list[Path], count: int) -> int:
    """Fills class folders with `count` links to the images, taken in turn; returns `count`."""
    for label in range(CLASSES):
        (folder / f"class-{label}").mkdir(parents=True)
    for i in range(count):
        (folder / f"class-{i % CLASSES}" / f"{i:07d}.jpg").symlink_to(images[i % len(images)].resolve())
    return count


def bare(paths: list[Path], processes: int) -> float:
    """Images/s of decode, resize and encode alone, summed over processes that run at the same time."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return sum(pool.map(_bare, [[str(path) for path in paths]] * processes, chunksize=1))


def _bare(paths: list[str]) -> float:
    cv2.setNumThreads(1)
    contents = [Path(path).read_bytes() for path in paths]
    options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    for number, content in enumerate(contents[:WARM_UP] + contents):
        if number == WARM_UP:
            begin = time.perf_counter()
        pixels = cv2.imdecode(
            np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        )
        height, width = pixels.shape[:2]
        scale = SHORT_SIDE / min(height, width)
        if scale < 1:
            smaller = np.empty((round(height * scale), round(width * scale), 3), np.uint8)
            resize(pixels, smaller)
            pixels = smaller
        cv2.imencode(".jpg", pixels, options)
    return len(contents) / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
