"""Answers what a few minutes on a GPU must answer, the most valuable first.

    python bench/gpu.py [--data FOLDER] [--parts NAME...] [--all] [--tiny]

Each part runs in a process of its own, has its own time limit, and prints a line of JSON as soon as it has
figures. They are appended to bench/results/gpu.jsonl. All parts together take at most 8 minutes. The exit
status is 1 if a part failed or ran out of time.

- tests: the tests marked gpu. Both kernels of the augmentation agree, a step in bfloat16 is close to one in
  float32, a resumed step equals an uninterrupted one, and the host never waits for the device inside a step.
- study: a teacher and a study of four trials through Ray, two at a time on one GPU (train.gpus_per_worker
  0.5), on the CIFAR-10 images of FOLDER (by default .gpu/cifar10, 10,000 images). `lost` counts the points of
  the trials' journals that MLflow does not have; `ranked_differently` is 1 where MLflow ranks the trials in
  another order than the leaderboard.
- step: DeiT-S beside timm's train.py with and without --torchcompile (bench/step.py).
- augment: `gpu_share_of_step` (bench/augment.py).
- mfu: DeiT-B's share of the card's peak (bench/step.py).
- stream: JPEGs of 256 pixels through Ray Data to a DeiT-S that is distilled from a RegNetY-16GF.
  `data_wait_frac` is the share of the last evaluation's period in which the GPU waited for the stream.
- models: with --all, DeiT-Ti, -S and -B beside timm's, also with --channels-last, and ours not compiled; 10
  minutes more.

--tiny: the same parts, on any machine, with small models, images and numbers of steps, to see that everything
runs. Nothing is recorded. It takes about 3 minutes on 2 busy CPU cores.

FOLDER is what `deit-ray data prepare SOURCE --short-side 0 --out FOLDER` writes, where SOURCE has 1,000
training and 100 test images in each of CIFAR-10's class folders (11 MB).
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.measure import family  # noqa: E402
from bench.record import record  # noqa: E402

TOTAL_S = 480
GRACE_S = 10  # between SIGTERM and SIGKILL
PATIENCE = 4  # the limits with --tiny, on a machine that may be slow and busy, are so many times longer


@dataclasses.dataclass(frozen=True)
class Part:
    """A part: its name, the seconds that it may take, and the function that returns its figures."""

    name: str
    limit_s: float
    measure: Callable[[argparse.Namespace], dict]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=ROOT / ".gpu" / "cifar10", type=Path)
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in (*PARTS, MODELS)])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what each part's own process is called with
    arguments = parser.parse_args()
    if arguments.one:
        run_here(arguments)
        return
    parts = [*PARTS, MODELS] if arguments.all else list(PARTS)
    if arguments.parts:
        parts = [part for part in (*PARTS, MODELS) if part.name in arguments.parts]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if arguments.tiny:
        environment["OMP_NUM_THREADS"] = "1"  # the threads of a small operation only wait for each other
    ended_well = []
    for part, limit_s in with_time_left(parts, PATIENCE if arguments.tiny else 1):
        command = [sys.executable, __file__, "--one", part.name, *sys.argv[1:]]
        ended_well.append(run_apart(part.name, command, limit_s, environment))
    if not all(ended_well):
        sys.exit(1)


def with_time_left(parts: list[Part], patience: float) -> Iterator[tuple[Part, float]]:
    """Each part with the seconds that it has when its turn comes."""
    begin = time.monotonic()
    for part in parts:
        left_s = TOTAL_S * patience - (time.monotonic() - begin)
        limit_s = part.limit_s * patience
        yield part, limit_s if part is MODELS else min(limit_s, left_s)


def run_apart(name: str, command: list[str], limit_s: float, environment: dict[str, str]) -> bool:
    """Runs a part in its own process; prints how it ended. Returns whether it ended well and in time."""
    begin = time.monotonic()
    ended = "no time left"
    if limit_s > 0:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            status = process.wait(limit_s)
            ended = "well" if status == 0 else f"with exit status {status}"
        except subprocess.TimeoutExpired:
            ended = f"out of time after {limit_s:.0f} s"
            end(process)
    print(json.dumps({"part": name, "ended": ended, "s": round(time.monotonic() - begin, 1)}), flush=True)
    return ended == "well"


def end(process: subprocess.Popen) -> None:
    """Ends a process and all its descendants, Ray's included, so that they leave the GPU to the next part."""
    pids = family(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def run_here(arguments: argparse.Namespace) -> None:
    """Runs one part in this process, and records its figures."""
    (part,) = (part for part in (*PARTS, MODELS) if part.name == arguments.one)
    figures = part.measure(arguments)
    if arguments.tiny:
        print(json.dumps({"part": part.name, "figures": figures}), flush=True)
    else:
        record("gpu", figures)


# The parts


def run_tests(arguments: argparse.Namespace) -> dict:
    """Runs the tests marked gpu of one folder: other tests import packages that may be missing."""
    import pytest

    status = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests" / "training")])
    if status != pytest.ExitCode.OK:
        sys.exit(int(status))
    return {"tests_failed": 0}


def measure_study(arguments: argparse.Namespace) -> dict:
    import deit_ray
    from deit_ray.cluster import connect
    from deit_ray.trial.needs import MODULES

    kind = "digits" if arguments.tiny else "cifar10"
    with tempfile.TemporaryDirectory() as folder, connect.connected("local", False, print, MODULES):
        keys = study_keys(arguments, folder)
        begin = time.perf_counter()
        deit_ray.train(deit_ray.load_experiment(ROOT / "experiments" / f"{kind}_teacher.yaml", keys))
        teacher_s = time.perf_counter() - begin
        study = deit_ray.tune(deit_ray.load_experiment(ROOT / "experiments" / f"{kind}_search.yaml", keys))
        return {
            "teacher_s": round(teacher_s, 1),
            "study_s": round(time.perf_counter() - begin - teacher_s, 1),
            **read_back(study),
        }


def study_keys(arguments: argparse.Namespace, folder: str) -> dict:
    """The settings of the teacher and the study; results go to a folder."""
    keys = {
        "data.uri": str(arguments.data),
        "results.uri": f"{folder}/results",
        "optim.warmup_epochs": 1,
        "train.epochs": 4,
        "train.eval_every": 1,
        "train.gpus_per_worker": 0.5,
        "train.compile": "never",  # which would take longer than these epochs
        "data.cpus_per_worker": 4.0,
        "search.trials": 4,
        "search.max_concurrent": 2,
        "search.scheduler": "none",
        "search.grace_epochs": 1,
    }
    if arguments.tiny:
        import deit_ray

        deit_ray.prepare("digits", f"{folder}/digits")
        small = {"data.uri": f"{folder}/digits", "train.epochs": 2, "data.cpus_per_worker": 0.25}
        return keys | small | {"search.trials": 2}
    return keys


def read_back(study) -> dict:
    """Figures of a study, and what MLflow has of it."""
    from deit_ray.results.folders import JOURNAL
    from deit_ray.results.journal import iterate_points
    from deit_ray.tracking.address import tracking_uri
    from deit_ray.tracking.curves import is_curve
    from tests.support.tracked import history_of, ranked_by_mlflow, runs_below

    uri, metric = tracking_uri(study.experiment), study.experiment.search.metric
    runs = [run for run in runs_below(uri, study.folder) if "deit_ray.trial" in run.data.tags]
    delivered = {
        (int(run.data.tags["deit_ray.trial"]), point.key, point.step, point.value)
        for run in runs
        for point in history_of(uri, run)
    }
    board = study.leaderboard()
    numbers = [int(number) for number in board["trial"]]
    measured = {
        (number, point.name, point.step, point.value)
        for number in numbers
        for point in iterate_points(f"{study.trial_folder(number)}/{JOURNAL}")
        if is_curve(point.name)
    }
    finished = board[board["state"] == "finished"]
    ranked = dict(ranked_by_mlflow(uri, study.folder, metric))
    ranked = [value for number, value in ranked.items() if number in set(finished["trial"])]
    speeds = [value for _, name, _, value in measured if name == "perf/images_per_s"]
    return {
        "trials": len(numbers),
        "finished": int((board["state"] == "finished").sum()),
        "most_at_once": most_at_once([(run.info.start_time, run.info.end_time) for run in runs]),
        "points": len(measured),
        "lost": len(measured - delivered),
        "ranked_differently": int(ranked != finished["best"].tolist()),
        "best_val_top1": study.best().value,
        "fastest_images_per_s": round(max(speeds), 1),
        "gpu_hours": round(study.spent.gpu_s / 3600, 4),
    }


def most_at_once(spans: list[tuple[float, float]]) -> int:
    """The largest number of spans (begin, end) that have a moment in common."""
    return max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans)


def measure_step(arguments: argparse.Namespace) -> dict:
    from bench import step

    if arguments.tiny:
        with step.quick_compiler():
            return step.compare(step.TINY, "gpu", rounds=2, steps=1, compiled=True)
    return step.compare(step.gpu_setting("deit_s"), "gpu", rounds=7, steps=10, compiled=True)


def measure_augment(arguments: argparse.Namespace) -> dict:
    from bench import augment, step

    if arguments.tiny:
        keys = {"data.image_size": step.TINY.size, "student.model": step.TINY.student, "student.depth": 1}
        experiment = augment.EXPERIMENT.with_overrides(keys)
        figures = augment.measure_share(step.TINY.device, experiment, step.TINY.teacher, 4, 2)
    else:
        setting = step.gpu_setting("deit_s")
        figures = augment.measure_share(
            setting.device, augment.EXPERIMENT, setting.teacher, setting.batch, 30
        )
    return {name: round(value, 4) for name, value in figures.items()}


def measure_mfu(arguments: argparse.Namespace) -> dict:
    from bench import step

    return (
        step.measure_mfu(step.TINY, 1) if arguments.tiny else step.measure_mfu(step.gpu_setting("deit_b"), 20)
    )


def measure_stream(arguments: argparse.Namespace) -> dict:
    import deit_ray
    from bench import step

    images, epochs = (64, 2) if arguments.tiny else (4096, 10)
    setting = step.TINY if arguments.tiny else step.gpu_setting("deit_s")
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(f"{folder}/data", images)
        write_teacher(f"{folder}/teacher.safetensors", setting)
        experiment = setting.experiment.with_overrides(
            {
                "data.uri": f"{folder}/data",
                "data.cpus_per_worker": max(1.0, (os.cpu_count() or 1) - 2.0),
                "distillation.teacher": {"weights": f"{folder}/teacher.safetensors"},
                "optim.warmup_epochs": 0,
                "train.epochs": epochs,
                "train.eval_every": epochs // 2,
                "results.uri": f"{folder}/results",
            }
        )
        run = deit_ray.train(experiment)
    shares = {
        name: run.metrics[f"perf/{name}"] for name in ("data_wait_frac", "step_frac", "evaluation_frac")
    }
    return {
        **{name: round(value, 4) for name, value in shares.items()},
        "stream_images_per_s": round(run.metrics["perf/images_per_s"], 1),
        "stream_cpus": experiment.data.cpus_per_worker,
    }


def write_photographs(uri: str, count: int) -> None:
    """Prepares a data set of JPEGs of about 30 KB: parts, 341 x 256 pixels, of two photographs."""
    import numpy as np
    from sklearn.datasets import load_sample_images

    from bench.step import CLASSES
    from deit_ray.data import shards
    from deit_ray.data.images import encode

    pictures, draws = load_sample_images().images, np.random.default_rng(0)

    def rows(number: int):
        for i in range(number):
            y, x = draws.integers(0, (427 - 256, 640 - 341))
            yield encode(pictures[i % 2][y : y + 256, x : x + 341], 0, 92), i % CLASSES, f"{i}"

    splits, counts = {}, {}
    for split, number in (("train", count), ("test", count // 8)):
        splits[split], found = shards.write_split(uri, split, rows(number))
        counts[split] = found + [0] * (CLASSES - len(found))
    shards.write_manifest(uri, [f"class {i}" for i in range(CLASSES)], splits, counts, {})


def write_teacher(path: str, setting) -> None:
    """Writes random weights of a setting's teacher."""
    import timm

    from bench.step import CLASSES
    from deit_ray.models.student import save_model

    model = timm.create_model(setting.teacher, num_classes=CLASSES)
    description = {
        "model": setting.teacher,
        "arguments": {"num_classes": CLASSES},
        "classes": [f"class {i}" for i in range(CLASSES)],
        "mean": list(model.pretrained_cfg["mean"]),
        "std": list(model.pretrained_cfg["std"]),
    }
    save_model(Path(path), model.state_dict(), description)


def measure_models(arguments: argparse.Namespace) -> dict:
    from bench import step

    if arguments.tiny:
        with step.quick_compiler():
            return step.compare(step.TINY, "gpu", 2, 1, compiled=True, more=True)
    figures = {}
    for name in step.STUDENTS:
        measured = step.compare(step.gpu_setting(name), "gpu", 5, 5, compiled=True, more=True)
        figures |= {f"{key}_{name}": value for key, value in measured.items()}
        print(json.dumps(measured), flush=True)
    return figures


PARTS = (
    Part("tests", 100, run_tests),
    Part("study", 120, measure_study),
    Part("step", 180, measure_step),
    Part("augment", 40, measure_augment),
    Part("mfu", 60, measure_mfu),
    Part("stream", 100, measure_stream),
)
MODELS = Part("models", 600, measure_models)


if __name__ == "__main__":
    main()
