"""Runs the three CIFAR-10 experiments for a few epochs, and measures how long they take.

This shows that the experiments run, not what accuracy they reach.

    python bench/cifar10.py DATA [--epochs N] [--trials N] [--set KEY=VALUE]

DATA is a folder in which `deit-ray data prepare` has prepared CIFAR-10, or a part of it.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import deit_ray
from bench.record import ROOT, record
from deit_ray.cluster import connect
from deit_ray.data.shards import read_manifest
from deit_ray.experiment.load import parse_override


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="folder of the prepared CIFAR-10")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    manifest = read_manifest(arguments.data)
    figures = {"epochs": arguments.epochs, "trials": arguments.trials, "train_images": manifest.rows("train")}
    with tempfile.TemporaryDirectory() as results, connect.connected("local", False, print):
        short = {
            "data.uri": arguments.data,
            "results.uri": results,
            "train.epochs": arguments.epochs,
            "train.eval_every": 1,
            "optim.warmup_epochs": 0,
            "search.trials": arguments.trials,
            "search.grace_epochs": 1,
            **dict(map(parse_override, arguments.set)),
        }
        for name in ("teacher", "student"):
            begin = time.perf_counter()
            run = deit_ray.train(
                deit_ray.load_experiment(ROOT / "experiments" / f"cifar10_{name}.yaml", short)
            )
            figures |= {
                f"{name}_s": round(time.perf_counter() - begin, 1),
                f"{name}_test_top1": run.metrics["test/top1"],
            }
        begin = time.perf_counter()
        study = deit_ray.tune(deit_ray.load_experiment(ROOT / "experiments" / "cifar10_search.yaml", short))
        figures |= {
            "search_s": round(time.perf_counter() - begin, 1),
            "search_best_val_top1": study.best().value,
        }
    record("cifar10", figures)


if __name__ == "__main__":
    main()
