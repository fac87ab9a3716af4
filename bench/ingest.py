"""Compares our stream, from JPEG bytes through Ray Data to torch batches, with other loaders.

All contenders read the same JPEG bytes, either of short side 256 (`prepared`) or as they came (`original`).
Each may use as many processes as this machine has CPU cores, plus the one that takes the batches. Contenders
run one after the other, each once in every round, in processes of its own. The fastest round of a contender
counts, with the CPU time and memory of that round.

- ours_3views, ours_1view: crop and flip in the stream. Photometric work is left to the device, so compared
  with timm_full the stream does less work, and compared with timm_crop it does equal work.
- timm_full: timm's loader with DeiT's transform; erasing and normalisation are left to the device.
- timm_crop: the same without RandAugment. The other peers also crop and flip only. The peers are in
  bench/ingest_peers.py; bench/peers.txt installs their packages; missing ones are left out.
- bare_3views, bare_1view: the function of the stream's tasks, without Ray.
- raw_decode: cv2.imdecode at full size, and nothing else.

Figures, with the least value that each must reach, or the largest that it may have ("at most"):

    prepared_3views_vs_timm        4.5   ours_3views / timm_full in samples per second
    prepared_3views_vs_timm_crop   2.5   ours_3views / timm_crop
    original_1view_vs_timm_crop    1.4   ours_1view / timm_crop, both from original JPEGs
    vs_best_peer                   1.2   ours_3views / the fastest peer that crops and flips only, timm_crop
                                         excepted
    ray_cpu_ratio                  1.3   at most: CPU time per sample through Ray (tasks, raylet, store,
                                         consumer) / CPU time per sample of the bare function, on the same
                                         tasks in as many processes
    share_of_decode                0.75  CPU time of cv2.imdecode at full size / CPU time of the bare
                                         function with 1 view, on prepared images, measured in turns
    startup_s                      2.5   at most: seconds from a worker's first request to its first batch,
                                         in the first run of a fresh Ray; startup_warm_s is that of later
                                         runs
    startup_growth                 1.1   at most: startup of a run of 300 epochs of ImageNet / startup of a
                                         run of 1 epoch; medians of later runs
    window_share                   0.99  throughput over many windows of the default length / throughput
                                         inside one window that is a run of its own (median of runs before
                                         and after), with tasks of 64 tiny images; gap_max is the longest
                                         wait at a border between windows / the median wait
    two_trials_share               0.90  throughput of two trials at the same time, each with half of the
                                         CPUs / throughput of one trial with all CPUs

    python bench/ingest.py [--images FOLDER] [--only FIGURE] [--rounds N] [--windows N]

Without --images it makes images from scikit-image's photographs. It takes about 15 minutes on 2 CPU cores,
most of them for the contenders.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cv2
import ingest_peers as peers
import numpy as np
import pyarrow.parquet as pq
from ingest_images import lay_out, shards_of
from ingest_ours import Way, local_ray, measure
from measure import PeakMemory, cpu_seconds
from record import record

from deit_ray.data.blocks import make_samples
from deit_ray.data.prepare import prepare
from deit_ray.data.shards import ROW_GROUP

CORES = len(os.sched_getaffinity(0))
WARM_S, MEASURE_S = 3.0, 8.0  # for peers
PAIRS = 3  # pairs of runs for startup_growth and window_share, and number of fresh Rays for startup_s
IMAGENET_EPOCHS = 300
TINY = 32  # pixels

TARGETS = {  # negative: at most
    "prepared_3views_vs_timm": 4.5,
    "prepared_3views_vs_timm_crop": 2.5,
    "original_1view_vs_timm_crop": 1.4,
    "vs_best_peer": 1.2,
    "ray_cpu_ratio": -1.3,
    "share_of_decode": 0.75,
    "startup_s": -2.5,
    "startup_growth": -1.1,
    "window_share": 0.99,
    "two_trials_share": 0.9,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of JPEGs, or of class folders of them")
    parser.add_argument("--only", action="append", choices=sorted([*TARGETS, "table"]), help="only these")
    parser.add_argument(
        "--rounds", type=int, default=1, help="how often each contender runs; its fastest run counts"
    )
    parser.add_argument("--samples", type=int, default=60_000, help="least number of samples of ours")
    parser.add_argument("--windows", type=int, default=30, help="number of windows for window_share")
    parser.add_argument("--cache", type=Path, help="folder in which to keep the prepared images")
    parser.add_argument("--contender", nargs=2, metavar=("NAME", "FORM"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        print(json.dumps(contend(*arguments.contender, arguments.cache, arguments.samples)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        cache = (arguments.cache or Path(folder)).resolve()
        made = lay_out(arguments.images, cache)
        wanted = set(arguments.only or ["table", *TARGETS])
        figures = {
            "images": made["images"],
            "image_bytes": made["bytes"],
            "made": made["made"],
            "processes": CORES,
        }
        figures |= compare(cache, wanted, arguments.rounds, arguments.samples)
        if wanted & {"startup_s", "startup_growth"}:
            figures |= startups(cache)
        if "window_share" in wanted:
            figures |= windows(cache, arguments.windows)
        if "two_trials_share" in wanted:
            figures |= two_trials(cache, arguments.samples)
    for name, target in TARGETS.items():
        if name in figures:
            holds = figures[name] <= -target if target < 0 else figures[name] >= target
            bound = f"{'at most' if target < 0 else 'at least'} {abs(target)}"
            print(f"{name:30} {figures[name]:8.3f}  {bound}{'' if holds else '  MISSED'}")
    record(
        "ingest",
        {name: round(value, 5) if isinstance(value, float) else value for name, value in figures.items()},
    )


# Contenders, each in a process of its own


def compare(cache: Path, wanted: set[str], rounds: int, samples: int) -> dict:
    """Runs the contenders that the wanted figures need, prints the table, and computes the figures."""
    needs = {
        "prepared_3views_vs_timm": [("ours_3views", "prepared"), ("timm_full", "prepared")],
        "prepared_3views_vs_timm_crop": [("ours_3views", "prepared"), ("timm_crop", "prepared")],
        "original_1view_vs_timm_crop": [("ours_1view", "original"), ("timm_crop", "original")],
        "vs_best_peer": [
            ("ours_3views", "prepared"),
            *((name, "prepared") for name in peers.CROP_ONLY if name != "timm_crop"),
        ],
        "ray_cpu_ratio": [("ours_3views", "prepared"), ("bare_3views", "prepared")],
        "share_of_decode": [("bare_1view", "prepared")],
        "table": [
            ("raw_decode", "prepared"),
            ("raw_decode", "original"),
            ("ours_1view", "prepared"),
            ("timm_full", "original"),
        ],
    }
    contenders = list(
        dict.fromkeys(contender for name, needed in needs.items() if name in wanted for contender in needed)
    )
    missing = sorted({name for name, _ in contenders if not peers.installed(name)})
    contenders = [(name, form) for name, form in contenders if name not in missing]
    if missing:
        print(f"left out, not installed: {', '.join(missing)}; see bench/peers.txt")
    found: dict = {}
    for turn in range(rounds):
        for contender in contenders:
            result = start(*contender, cache, samples)
            print(f"round {turn + 1}: {' '.join(contender)}: {json.dumps(result)}", flush=True)
            if contender not in found or result["samples_per_s"] > found[contender]["samples_per_s"]:
                found[contender] = result
    show(found)
    ratios = {
        "prepared_3views_vs_timm": lambda: speed(found, "ours_3views") / speed(found, "timm_full"),
        "prepared_3views_vs_timm_crop": lambda: speed(found, "ours_3views") / speed(found, "timm_crop"),
        "original_1view_vs_timm_crop": lambda: (
            speed(found, "ours_1view", "original") / speed(found, "timm_crop", "original")
        ),
        "vs_best_peer": lambda: speed(found, "ours_3views") / speed(found, best_peer(found)),
        "ray_cpu_ratio": lambda: cpu(found, "ours_3views") / cpu(found, "bare_3views"),
        "share_of_decode": lambda: found["bare_1view", "prepared"]["share_of_decode"],
    }  # fmt: skip
    figures = {name: ratio() for name, ratio in ratios.items() if name in wanted}
    if "vs_best_peer" in wanted:
        figures["best_peer"] = best_peer(found)
    for (name, form), result in found.items():
        figures |= {f"{name}_{form}_{key}": value for key, value in result.items()}
    return figures | {"left_out": ", ".join(missing)}


def speed(found: dict, name: str, form: str = "prepared") -> float:
    return found[name, form]["samples_per_s"]


def cpu(found: dict, name: str) -> float:
    return found[name, "prepared"]["cpu_s_per_sample"]


def best_peer(found: dict) -> str:
    others = peers.CROP_ONLY.keys() - {"timm_crop"}
    return max(
        (name for name, form in found if form == "prepared" and name in others),
        key=lambda name: speed(found, name),
    )


def show(found: dict) -> None:
    """Prints a table of all contenders."""
    if not found:
        return

    def over(result: dict, name: str, form: str) -> str:
        return (
            f"{result['samples_per_s'] / speed(found, name, form):11.2f}"
            if (name, form) in found
            else f"{'':11}"
        )

    print(f"\n{'':16} {'form':9} {'samples/s':>10} {'x timm full':>11} {'x timm crop':>11} {'of decode':>11} "
          f"{'peak MB':>8} {'CPU ms/sample':>13} {'seconds':>8}")  # fmt: skip
    for (name, form), result in sorted(
        found.items(), key=lambda item: (item[0][1], -item[1]["samples_per_s"])
    ):
        ratios = " ".join(over(result, other, form) for other in ("timm_full", "timm_crop", "raw_decode"))
        print(f"{name:16} {form:9} {result['samples_per_s']:10.0f} {ratios} {result['peak_mb']:8.0f} "
              f"{1000 * result['cpu_s_per_sample']:13.3f} {result['seconds']:8.1f}")  # fmt: skip
    print("ours: photometric work left to the device\n", flush=True)


def start(name: str, form: str, cache: Path, samples: int) -> dict:
    """Runs a contender in a process of its own; returns its figures and peak memory."""
    command = [
        sys.executable,
        __file__,
        "--contender",
        name,
        form,
        "--cache",
        str(cache),
        "--samples",
        str(samples),
    ]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
        # measured in this process, so that it does not count as the contender's CPU time
        PeakMemory(process.pid, every_s=1.0) as memory,
    ):
        output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{name} {form} failed:\n{errors[-5000:]}")
    return json.loads(output.strip().splitlines()[-1]) | {"peak_mb": memory.peak / 1e6}


def contend(name: str, form: str, cache: Path, samples: int) -> dict:
    """Runs a contender in this process; returns its samples/s, CPU seconds per sample, and seconds."""
    views = 3 if name.endswith("_3views") else 1
    if name.startswith("ours_"):
        with local_ray(CORES):
            (found,) = measure([Way(str(shards_of(cache, form)), CORES, views, samples=samples)])
        return {key: found[key] for key in ("samples_per_s", "cpu_s_per_sample", "seconds")}
    if name.startswith("bare_"):
        return bare(Way(str(shards_of(cache, form)), CORES, views, samples=samples))
    if name == "raw_decode":
        return raw_decode(cache / form / "unique")
    return take(peers.LOADERS[name](peers.Place(cache / form, CORES)))


def take(batches: Iterator) -> dict:
    """Takes batches as fast as they come: WARM_S seconds unmeasured, then MEASURE_S seconds."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM_S:  # the first batch may compile or start processes
        next(batches)
    for _ in range(CORES * peers.READ_AHEAD):  # batches that were made ahead
        next(batches)
    begin, cpu_before, samples = time.perf_counter(), cpu_seconds(), 0
    while (seconds := time.perf_counter() - begin) < MEASURE_S:
        for _ in range(CORES):  # processes give batches in turn
            samples += len(next(batches))
    return {
        "samples_per_s": samples / seconds,
        "cpu_s_per_sample": (cpu_seconds() - cpu_before) / samples,
        "seconds": seconds,
    }


def bare(way: Way) -> dict:
    """Runs the stream's tasks without Ray, in as many processes as the stream has."""
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        found = np.array(pool.starmap(bare_tasks, [(way, number) for number in range(CORES)], chunksize=1))
    samples, cpu_s, seconds, images, decode_s = found.sum(axis=0).tolist()
    return {
        "samples_per_s": float((found[:, 0] / found[:, 2]).sum()),
        "cpu_s_per_sample": cpu_s / samples,
        "seconds": seconds / CORES,
        "share_of_decode": (decode_s / images) / (cpu_s / samples),
    }


def bare_tasks(way: Way, number: int) -> list[float]:
    """Runs every CORES-th task from number `number` on; after each task, decodes its images only.

    Returns:
        [samples, CPU seconds, seconds, images, CPU seconds of decoding the images], without the first task.
    """
    worklist, recipe = way.worklist(), way.recipe()
    stored = pq.read_table(f"{way.data}/train-00000.parquet", columns=["image"])["image"]
    jpegs = [np.frombuffer(jpeg.as_buffer(), np.uint8) for jpeg in stored]
    tasks = itertools.islice(worklist.tasks_between(0, worklist.steps), number, None, CORES)
    measured = []
    for task in itertools.islice(tasks, 1 + way.rounds(worklist)):
        ids = []
        made = spent(
            lambda task=task, ids=ids: ids.extend(s.ids for s in make_samples(task, recipe, way.batch, 1))
        )
        ids = np.concatenate(ids)
        used = [jpegs[i % len(jpegs)] for i in np.unique(ids)]  # the shard is listed again and again
        decode_s, _ = spent(partial(decode, used))
        measured.append([len(ids), *made, len(used), decode_s])
    return np.sum(measured[1:], axis=0).tolist()


def decode(jpegs: list[np.ndarray]) -> None:
    """Decodes at full size, and keeps no image: kept images would need fresh memory, which takes time."""
    for jpeg in jpegs:
        cv2.imdecode(jpeg, cv2.IMREAD_COLOR_RGB)


def spent(run: Callable) -> tuple[float, float]:
    """Runs a function; returns the CPU seconds of this process, and the seconds, that it took."""
    begin, cpu_before = time.perf_counter(), time.process_time()
    run()
    return time.process_time() - cpu_before, time.perf_counter() - begin


def raw_decode(folder: Path) -> dict:
    """Decodes at full size in CORES processes at the same time."""
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        found = pool.map(decode_for_a_while, [str(folder)] * CORES, chunksize=1)
    images, cpu_s, seconds = (sum(values) for values in zip(*found, strict=True))
    return {
        "samples_per_s": sum(n / s for n, _, s in found),
        "cpu_s_per_sample": cpu_s / images,
        "seconds": seconds / CORES,
    }


def decode_for_a_while(folder: str) -> tuple[int, float, float]:
    """Runs cv2.imdecode for MEASURE_S seconds; returns (images, CPU seconds, seconds)."""
    cv2.setNumThreads(1)
    jpegs = [np.frombuffer(path.read_bytes(), np.uint8) for path in sorted(Path(folder).iterdir())]
    images, begin, cpu_before = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < MEASURE_S:
        decode(jpegs[:100])
        images, jpegs = images + len(jpegs[:100]), jpegs[100:] + jpegs[:100]
    return images, time.process_time() - cpu_before, time.perf_counter() - begin


# The stream alone


def startups(cache: Path) -> dict:
    """Measures the time to the first batch: on a fresh Ray, then for 1 and for 300 epochs of ImageNet."""
    short = Way(str(shards_of(cache, "prepared")), CORES, first_only=True)
    long = Way(str(shards_of(cache, "prepared")), CORES, epochs=IMAGENET_EPOCHS, first_only=True)

    def first_batches(*ways: Way) -> list[float]:
        with local_ray(CORES):
            return [measure([way])[0]["startup_s"] for way in ways]

    cold, *warm_s = first_batches(short, *(short, long) * PAIRS)
    cold_s = [cold, *(first_batches(short)[0] for _ in range(PAIRS - 1))]
    cold, one, many = (statistics.median(times_s) for times_s in (cold_s, warm_s[::2], warm_s[1::2]))
    print(f"first batch: cold {' '.join(f'{s:.2f}' for s in cold_s)} s; "
          f"warm, with 1 and {IMAGENET_EPOCHS} epochs in turns, {' '.join(f'{s:.2f}' for s in warm_s)} s",
          flush=True)  # fmt: skip
    return {
        "startup_s": cold,
        "startup_warm_s": one,
        "startup_300_epochs_s": many,
        "startup_growth": many / one,
    }


def windows(cache: Path, count: int) -> dict:
    """Compares many windows with one. A task is an epoch of 64 tiny images, so that borders show most."""
    tiny = cache / "tiny"
    if not tiny.exists():
        folder = cache / "tiny-source"
        for number in range(ROW_GROUP + 2):
            split = "train" if number < ROW_GROUP else "test"
            place = folder / split / f"class-{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (TINY, TINY, 3), dtype=np.uint8)
            cv2.imwrite(str(place / f"{number}.jpg"), pixels)
        prepare(str(folder), str(tiny))
        shutil.rmtree(folder)
    way = Way(str(tiny), CORES, views=1, size=TINY, batch=ROW_GROUP, images=ROW_GROUP, epochs=1, samples=0)
    length = way.worklist().window  # tasks; each is an epoch of one step
    one, many = (Way(**{**vars(way), "epochs": n * length}) for n in (1, count))
    with local_ray(CORES):
        # without the start of the run
        alone = [np.diff(measure([one])[0]["times"])[length // 10 :].mean() for _ in range(PAIRS)]
        (found,) = measure([many])
        alone += [np.diff(measure([one])[0]["times"])[length // 10 :].mean() for _ in range(PAIRS)]
    times = np.array(found["times"])
    waits, step = np.diff(times), np.arange(2, len(times) + 1)  # before the third step and later ones
    border = step % length == 0
    share = np.median(alone) / waits[step >= length].mean()  # without the first window
    memory = np.array(found["memory_bytes"])
    print(f"{count} windows of {length} tasks in {found['seconds']:.0f} s; "
          f"longest waits at borders: {np.sort(waits[border])[-5:].round(3)} s, "
          f"median wait {np.median(waits) * 1000:.1f} ms", flush=True)  # fmt: skip
    return {
        "windows": count,
        "window_tasks": length,
        "window_share": float(share),
        "gap_max": float(waits[border].max() / np.median(waits)),
        "gap_max_s": float(waits[border].max()),
        "window_memory_growth": float(memory[-1] / memory[(len(memory) - 1) // count]),
    }


def two_trials(cache: Path, samples: int) -> dict:
    """Compares the samples/s of two trials at the same time with one trial that has the CPUs of both."""
    shards, half = str(shards_of(cache, "prepared")), max(1, CORES // 2)
    with local_ray(2 * half, consumers=2):
        (alone,) = measure([Way(shards, 2 * half, samples=samples)])
        pair = measure([Way(shards, half, samples=samples)] * 2)
    # counts only the time in which both take batches
    begin, end = max(found["begin"] for found in pair), min(found["times"][-1] for found in pair)
    batches = sum(sum(begin < t <= end for t in found["times"]) for found in pair)
    together = batches * Way(shards, half).batch / (end - begin)
    print(f"one trial {alone['samples_per_s']:.0f} samples/s, two together {together:.0f}", flush=True)
    return {"one_trial_per_s": alone["samples_per_s"], "two_trials_per_s": together,
            "two_trials_share": together / alone["samples_per_s"]}  # fmt: skip


if __name__ == "__main__":
    main()
