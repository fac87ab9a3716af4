"""Measures the driver's CPU time for each trial, and whether the thousandth trial costs more than the first.

The study has trials that do not train, 64 at a time, under ASHA. The same driver as for every study
(`driver.Driver`) runs them on a real local Ray, with the study's database and a real MLflow on SQLite. Only
the class that Tune runs for each trial is replaced: it writes a journal, saves checkpoints and reports, but
trains nothing. CPU time is that of the driver's process with all threads: Tune, Optuna, Ray and the delivery
to MLflow.

late_over_early compares two windows of 100 trials. In both, 64 trials run all the time: the early window
begins when 64 trials have ended (before that, 64 start at once), and the late one ends when 64 trials are
left (after that, none start).

1,000 trials take about 25 minutes on 2 CPU cores, since Ray starts a process for each. With fewer trials the
windows are smaller (`window`), so that no trial is in both.

With --s3 the study runs a second time, with all results on an S3 API server, moto in a process of its own.
`s3_over_sqlite` is the wall time for each result of that study over the first one's. No trial of the two is
stopped early, so that both have equally many results.

    python bench/many_trials.py [--trials N] [--concurrent N] [--sampler random|tpe] [--s3]
"""

import argparse
import json
import math
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import ray.tune

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.metrics import EVALUATION, TRAIN  # noqa: E402
from bench.record import record  # noqa: E402
from deit_ray import storage  # noqa: E402
from deit_ray.results.folders import JOURNAL, SNAPSHOT  # noqa: E402
from deit_ray.results.journal import JournalWriter, checkpoint_name  # noqa: E402
from tests.support.data import write_colours  # noqa: E402
from tests.support.servers import s3_process  # noqa: E402

WINDOW = 100  # trials at most
EPOCHS, STEPS_PER_EPOCH, LOG_EVERY = 3, 20, 10
MODEL_BYTES = 1 << 10


class Idle(ray.tune.Trainable):
    """Writes and reports everything that a trial writes and reports, without training."""

    epochs = EPOCHS

    def setup(self, config: dict):
        self.folder, self.epoch, self.last, self.saved = config["folder"], 0, {}, []
        self.journal = JournalWriter(storage.join(self.folder, JOURNAL))

    def top1(self) -> float:
        """The accuracy after `self.epoch` epochs."""
        lr, strength = self.config["optim.lr"], self.config["augment.strength"]
        skill = math.exp(-(math.log10(lr / 2e-3) ** 2)) * (1 - abs(strength - 1) / 4)
        return skill * self.epoch / self.epochs

    def step(self) -> dict:
        if self.epoch == self.epochs:
            return {**self.last, "done": True}
        self.epoch += 1
        top1, step = self.top1(), self.epoch * STEPS_PER_EPOCH
        for logged in range(step - STEPS_PER_EPOCH + LOG_EVERY, step + 1, LOG_EVERY):
            self.journal.add(dict.fromkeys(TRAIN, 1 / logged), logged)
        metrics = dict.fromkeys(EVALUATION, top1) | {"val/images": 1000, "epoch": self.epoch}
        self.journal.add(metrics, step)
        self.journal.flush()
        self.keep_checkpoint(step, top1)
        self.last = metrics | {"step": step}
        return self.last

    def keep_checkpoint(self, step: int, top1: float) -> None:
        """Saves a checkpoint, and Ray Train's list of kept checkpoints: all, so that none is deleted."""
        name = checkpoint_name(step)
        for file in ("model.safetensors", "ema.safetensors"):
            storage.write_bytes(storage.join(self.folder, name, file), bytes(MODEL_BYTES))
        self.saved.append({"checkpoint_dir_name": name, "metrics": {"val/top1": top1}})
        best_last = sorted(self.saved, key=lambda result: result["metrics"]["val/top1"])
        state = {"checkpoint_results": best_last, "latest_checkpoint_result": self.saved[-1]}
        storage.write_bytes(storage.join(self.folder, SNAPSHOT), json.dumps(state).encode())

    def save_checkpoint(self, checkpoint_dir: str) -> dict:
        return {}

    def load_checkpoint(self, checkpoint) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000, help="number of trials")
    parser.add_argument("--concurrent", type=int, default=64, help="trials at a time")
    parser.add_argument("--sampler", choices=["random", "tpe"], default="random")
    parser.add_argument("--s3", action="store_true", help="compare with results on S3")
    arguments = parser.parse_args()
    if arguments.trials < 2 * arguments.concurrent + 2:
        parser.error(
            f"--trials: at least {2 * arguments.concurrent + 2} with {arguments.concurrent} at a time"
        )
    search = {
        "trials": arguments.trials,
        "max_concurrent": arguments.concurrent,
        "sampler": arguments.sampler,
        "scheduler": "none" if arguments.s3 else "asha",
    }
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        figures = measure(Path(folder), f"{folder}/results", search)
    if arguments.s3:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder, s3_process() as bucket:
            on_s3 = measure(Path(folder), f"{bucket}/results", search)
        figures |= {f"s3_{name}": on_s3[name] for name in ("wall_ms_per_result", "driver_ms_per_trial")}
        figures["s3_over_sqlite"] = on_s3["wall_ms_per_result"] / figures["wall_ms_per_result"]
    record("many_trials", {name: round(value, 3) for name, value in figures.items()})


def measure(folder: Path, results: str, search: dict) -> dict[str, float]:
    """Runs the study, checks that nothing is missing, and returns the figures.

    Args:
        folder: an empty one.
        results: URI of the results.
        search: the keys of the experiment's `search` that are not fixed.
    """
    from deit_ray.cluster import connect
    from deit_ray.study.observers import Observer
    from deit_ray.study.study import Study
    from deit_ray.terminal.console import Console

    class Ends(Observer):
        def trial_ended(self, end) -> None:
            ends.append((time.process_time(), time.monotonic()))

        def trial_reported(self, number: int, result: dict) -> None:
            reports.append(number)

    reports: list[int] = []
    trials, concurrent = search["trials"], search["max_concurrent"]
    experiment = make_experiment(folder, results, search)
    data = write_colours(str(folder), {"train": 20}, classes=2)  # no trial reads it
    os.environ.pop("RAY_ADDRESS", None)
    console = Console()
    with connect.connected("local", False, console.warn):
        ends = [(time.process_time(), time.monotonic())]
        study = Study.create(experiment)
        with study.driving():
            driver = make_driver(study, data, Idle, concurrent, console)
            driver.observers.append(Ends())
            driver.run()
        ended = (time.process_time(), time.monotonic())
    check(study, trials)
    window = min(WINDOW, (trials - 2 * concurrent) // 2)
    early = difference(ends[concurrent], ends[concurrent + window])
    late = difference(ends[trials - concurrent - window], ends[trials - concurrent])
    total = difference(ends[0], ended)
    return {
        "trials": trials,
        "concurrent": driver.concurrent,
        "window": window,
        "driver_ms_per_trial": 1000 * total[0] / trials,
        "wall_ms_per_trial": 1000 * total[1] / trials,
        "wall_ms_per_result": 1000 * total[1] / len(reports),
        "early_driver_ms_per_trial": 1000 * early[0] / window,
        "late_driver_ms_per_trial": 1000 * late[0] / window,
        "late_over_early": late[0] / early[0],
        "late_over_early_wall": late[1] / early[1],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


def make_driver(study, data, trial: type, concurrent: int, console):
    """The driver of every study, for trials of another class, which can have any values.

    Args:
        data: manifest of the study's data set.
        trial: what Tune runs for each trial.
        concurrent: trials at a time.
    """
    from deit_ray.study.driver import Driver
    from deit_ray.trial.resolve import Resolved

    class IdleDriver(Driver):
        def trainable(self) -> type:
            return trial

    class AnyValues(Resolved):
        def refusal(self, params: dict) -> None:
            return None

    resolved = AnyValues(study.experiment, data, study.experiment.data.uri, None, None)
    return IdleDriver(study, resolved, "cpu", {"CPU": 2.0 * concurrent}, console)


def make_experiment(folder: Path, results: str, search: dict):
    from deit_ray.experiment.load import load_experiment

    overrides = {
        "name": "idle",
        "data.uri": str(folder),
        "results.uri": results,
        "results.keep": "all",  # what the end of a study removes is no part of its trials' cost
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "train.epochs": EPOCHS,
        "optim.warmup_epochs": 1,
        "search": {
            "grace_epochs": 1,
            "reduction_factor": 2,
            "space": {"augment.strength": {"float": [0, 2]}, "optim.lr": {"log": [3e-4, 1e-2]}},
            **search,
        },
    }
    return load_experiment(ROOT / "experiments/digits_student.yaml", overrides)


def check(study, trials: int) -> None:
    """Checks that every trial has finished or was stopped early, and that MLflow shows it as ended.

    Raises:
        RuntimeError: a trial failed or is missing.
    """
    from mlflow.tracking import MlflowClient

    from deit_ray.tracking.address import tracking_uri

    states = [trial.state.name for trial in study.optuna.get_trials(deepcopy=False)]
    client = MlflowClient(tracking_uri(study.experiment))
    experiment = client.get_experiment_by_name(study.experiment.tracking.experiment).experiment_id
    runs = found = client.search_runs([experiment], max_results=1000)
    while found.token:
        found = client.search_runs([experiment], max_results=1000, page_token=found.token)
        runs = runs + found
    statuses = [run.info.status for run in runs]
    seen = {name: states.count(name) for name in sorted(set(states))} | {
        name: statuses.count(name) for name in sorted(set(statuses))
    }
    print(seen)
    if set(states) - {"COMPLETE", "PRUNED"} or len(states) != trials:
        raise RuntimeError(f"not all {trials} trials have finished or were stopped early: {seen}")
    if len(runs) != trials + 1 or "RUNNING" in statuses:
        raise RuntimeError(f"MLflow does not show all {trials} trials and their study as ended: {seen}")


def difference(begin: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    """CPU and wall seconds between two moments (CPU seconds, wall seconds)."""
    return end[0] - begin[0], end[1] - begin[1]


if __name__ == "__main__":
    main()
