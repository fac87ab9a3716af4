"""Measures the time that tracking takes in a study, and the points that a server takes from many writers.

- overhead: runs digits_search.yaml on a Ray that runs already. overhead_share = (seconds inside logging calls
  of the training loop + CPU seconds of the delivery thread) / wall seconds of the study. The logging calls
  (`JournalWriter.add` and `flushing`) are measured in the trials' workers. The CPU seconds include
  startup_cpu_s: importing MLflow and opening its database, once for each study of any length.
- writers: the journals of 100 runs grow at the same time. Each has a tracker of its own, and all deliver to
  one MLflow server with PostgreSQL behind it. Every run's history is read back from the server and compared
  with the run's journal.

The study takes about 4 minutes on 2 CPU cores, the writers 2.

    python bench/tracking.py [--part overhead|writers] [--trials N] [--epochs N]
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

from record import ROOT, record

sys.path.insert(0, str(ROOT))  # for tests.support

from deit_ray.outcome import Outcome
from deit_ray.results.journal import JournalWriter, Point, iterate_points
from tests.support.servers import MlflowServer, Postgres

PROCESSES, TRACKERS = 4, 25  # trackers of each process
SEGMENTS, STEPS = 10, 20
METRICS = ("train/loss", "train/loss_cls", "train/loss_dist", "train/lr", "val/top1")
PAUSE_S = 0.5  # between the segments of a writer
LIMIT_S = 600.0
QUIET = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["overhead", "writers"], help="run this part only")
    parser.add_argument("--trials", type=int, default=10, help="number of trials of the study")
    parser.add_argument("--epochs", type=int, default=30, help="epochs of each trial at most")
    arguments = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        if arguments.part != "writers":
            figures |= measure_overhead(Path(folder), arguments.trials, arguments.epochs)
        if arguments.part != "overhead":
            figures |= measure_writers(Path(folder))
    record("tracking", {name: round(value, 5) for name, value in figures.items()})


def measure_overhead(folder: Path, trials: int, epochs: int) -> dict[str, float]:
    """Runs the digits study as `deit-ray tune` does, and adds up the time that its tracking takes."""
    import ray

    import deit_ray
    from deit_ray.study import driver
    from deit_ray.tracking.server import Server
    from deit_ray.tracking.tracker import Tracker

    notes, delivery_cpu_s, startup_cpu_s = folder / "notes", [], []
    notes.mkdir()
    deliver, connect = Tracker._deliver, Server.connect

    make_noted = partial(driver.make_trial, loop=NotedLoop(notes))

    def timed_deliver(tracker):
        deliver(tracker)
        delivery_cpu_s.append(time.thread_time())  # of the delivery thread, which ends here

    def timed_connect(server):
        connect(server)
        startup_cpu_s.append(time.thread_time())  # MLflow is imported by now

    deit_ray.prepare("digits", str(folder / "digits"))
    where = {"data.uri": str(folder / "digits"), "results.uri": str(folder / "results")}
    train = [sys.executable, "-m", "deit_ray", "train", str(ROOT / "experiments" / "digits_teacher.yaml")]
    settings = [
        word for key, value in (where | {"train.epochs": 5}).items() for word in ("--set", f"{key}={value}")
    ]
    # in a process of its own, as a person trains it
    subprocess.run(train + settings, check=True, stdout=subprocess.DEVNULL)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=f"{folder}/ray",
    )
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    try:
        shape = {"train.log_every": 10, "train.epochs": epochs, "search.trials": trials}
        experiment = deit_ray.load_experiment(ROOT / "experiments" / "digits_search.yaml", where | shape)
        with (
            mock.patch.object(driver, "make_trial", make_noted),
            mock.patch.object(Tracker, "_deliver", timed_deliver),
            mock.patch.object(Server, "connect", timed_connect),
            mock.patch.dict(os.environ, QUIET),
            contextlib.redirect_stdout(None),
        ):
            begin = time.perf_counter()
            deit_ray.tune(experiment)
            wall_s = time.perf_counter() - begin
    finally:
        ray.shutdown()
    workers = [json.loads(path.read_text()) for path in notes.iterdir()]
    logging_s, (delivery_s,) = sum(worker["inside_s"] for worker in workers), delivery_cpu_s
    if len(workers) < trials:
        raise RuntimeError(f"{len(workers)} workers noted the time of their logging, not {trials}")
    return {
        "overhead_share": (logging_s + delivery_s) / wall_s,
        "wall_s": wall_s,
        "logging_s": logging_s,
        "logging_calls": sum(worker["calls"] for worker in workers),
        "delivery_cpu_s": delivery_s,
        "startup_cpu_s": startup_cpu_s[0],
        "trials": trials,
    }


class NotedLoop:
    """The loop of each worker: trains, and writes the time inside its logging calls to a file.

    It writes after each call, since a trial may be stopped after any of them.

    Args:
        notes: folder of the files.
    """

    def __init__(self, notes: Path):
        self.notes = notes

    def __call__(self, worker: str, config: dict) -> None:
        from deit_ray.trial.assemble import run_worker

        note, inside_s, calls = self.notes / f"{os.getpid()}-{time.time_ns()}.json", 0.0, 0

        @contextlib.contextmanager
        def timed():
            nonlocal inside_s, calls
            begin = time.perf_counter()
            yield
            inside_s += time.perf_counter() - begin
            calls += 1
            note.write_text(json.dumps({"inside_s": inside_s, "calls": calls}))

        def timed_add(journal, *given):
            with timed():
                add(journal, *given)

        @contextlib.contextmanager
        def timed_flushing(journal):  # the checkpoint is saved in between; its time is not the journal's
            context = flushing(journal)
            with timed():
                context.__enter__()
            yield
            with timed():
                context.__exit__(None, None, None)

        add, flushing = JournalWriter.add, JournalWriter.flushing
        with mock.patch.multiple(JournalWriter, add=timed_add, flushing=timed_flushing):
            run_worker(worker, config)


def measure_writers(folder: Path) -> dict[str, float]:
    """Lets 100 journals grow and delivers them at the same time to one server."""
    with Postgres() as postgres, MlflowServer(folder / "mlflow", postgres.uri, workers=2) as server:
        context = multiprocessing.get_context("spawn")
        barrier, spans = context.Barrier(PROCESSES), context.Queue()
        processes = [
            context.Process(target=write_and_deliver, args=(server.uri, folder, n, barrier, spans))
            for n in range(PROCESSES)
        ]
        for process in processes:
            process.start()
        begins, ends = zip(*(spans.get(timeout=LIMIT_S) for _ in processes), strict=True)
        for process in processes:
            process.join()
        lost, doubled, total = compare(server.uri, folder)
    seconds = max(ends) - min(begins)
    return {
        "writers": PROCESSES * TRACKERS,
        "points": total,
        "points_lost": lost,
        "points_doubled": doubled,
        "points_per_s": total / seconds,
        "seconds": seconds,
    }


def write_and_deliver(uri: str, folder: Path, process: int, barrier, spans) -> None:
    """A process with TRACKERS journals that grow, and a tracker for each that delivers it."""
    from mlflow.tracking import MlflowClient

    from deit_ray.tracking.delivery import quiet_mlflow
    from deit_ray.tracking.tracker import Tracker

    quiet_mlflow()
    MlflowClient(uri).search_experiments()  # importing MLflow is not measured here

    folders = [str(folder / "writers" / f"{process}-{number}") for number in range(TRACKERS)]
    journals = [JournalWriter(f"{one}/journal") for one in folders]
    barrier.wait()
    begin = time.time()
    trackers = [Tracker(uri, "writers", None, lambda text: print(text, file=sys.stderr)) for _ in folders]
    runs = [
        tracker.start_run(one, {"kind": "trial"}, {"process": process}, one)
        for tracker, one in zip(trackers, folders, strict=True)
    ]
    for segment in range(SEGMENTS):
        for journal in journals:
            for step in range(segment * STEPS, (segment + 1) * STEPS):
                journal.add(dict.fromkeys(METRICS, 1 / (step + 1)), step)
            journal.flush()
        time.sleep(PAUSE_S)
    for tracker, run, one in zip(trackers, runs, folders, strict=True):
        tracker.end_run(run, Outcome.finished(), one)
        tracker.closing.set()  # all trackers finish at the same time
    left = [run for tracker in trackers for run in tracker.finish(LIMIT_S, LIMIT_S)]
    spans.put((begin, time.time()))
    if left:
        raise RuntimeError(f"{len(left)} runs were not delivered")


def compare(uri: str, folder: Path) -> tuple[int, int, int]:
    """Numbers of points lost, doubled and written, by comparing each journal with the server's history."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("writers").experiment_id
    runs = client.search_runs([experiment], max_results=1000)
    lost = doubled = total = 0
    for one in (folder / "writers").iterdir():
        written = set(iterate_points(f"{one}/journal"))
        same = [run for run in runs if run.data.tags["deit_ray.folder"] == str(one)]
        history = [
            Point(p.key, p.value, p.step, p.timestamp)
            for run in same
            for name in METRICS
            for p in client.get_metric_history(run.info.run_id, name)
        ]
        total += len(written)
        lost += len(written - set(history))
        doubled += len(history) - len(set(history))
    return lost, doubled, total


if __name__ == "__main__":
    main()
