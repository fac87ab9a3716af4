"""Measures whether 64 trials at once on many nodes start as fast as 8, and what the driver takes.

The cluster is real, and all its nodes are on this machine: each is a raylet of its own with 4 CPUs by name
(`ray.cluster_utils.Cluster`). The same driver as for every study runs trials that do not train (those of
many_trials.py), with the study's database and a real MLflow on SQLite. Each trial has its process on the
head, as every trial has, and a worker on a node. Each waits in its first epoch until all have started, and
EPOCH_S seconds in every epoch.

- start_growth: seconds from the study's start until every trial runs, over the number of trials; with 64
  trials, over the same with 8.
- driver_cpu_share: CPU time of the driver's process with all threads over wall time, while all 64 trials run
  and each reports every EPOCH_S seconds. 1 is one core.

    python bench/many_nodes.py [--nodes N] [--trials N] [--few N]
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.many_trials import EPOCHS, Idle, check, make_driver, make_experiment  # noqa: E402
from bench.record import record  # noqa: E402
from tests.support.data import write_colours  # noqa: E402

CPUS = 4  # of a node
EPOCH_S = 15.0
TRIALS, STARTED = "trials", "started"  # of the study's folder: the number of trials; those that have started
STORE_BYTES = 80 << 20  # object store of a node, the least that Ray allows


class Worker:
    """Stands for the process that trains on a node."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


class Waiting(Idle):
    """An `Idle` trial with a worker on a node, whose epochs take time once all trials of the study run."""

    def setup(self, config: dict):
        super().setup(config)
        self.study = Path(self.folder).parent
        # DEFAULT: not in the trial's own placement group, which is on the head
        self.worker = ray.remote(num_cpus=1, scheduling_strategy="DEFAULT")(Worker).remote()
        if ray.get(self.worker.node.remote()) == ray.get_runtime_context().get_node_id():
            raise RuntimeError("the worker is on the head")
        (self.study / STARTED).mkdir(exist_ok=True)
        (self.study / STARTED / Path(self.folder).name).touch()

    def step(self) -> dict:
        while len(os.listdir(self.study / STARTED)) < int((self.study / TRIALS).read_text()):
            time.sleep(1)
        if self.epoch < EPOCHS:
            time.sleep(EPOCH_S)
        return super().step()


@dataclass
class Times:
    """What is measured of a study.

    Attributes:
        begin: when the study began, by time.monotonic().
        started: when the process of each trial started.
        reports: (wall seconds, CPU seconds of this process) at each report.
        ends: the same at each trial's end.
    """

    begin: float = 0.0
    started: list[float] = field(default_factory=list)
    reports: list[tuple[float, float]] = field(default_factory=list)
    ends: list[tuple[float, float]] = field(default_factory=list)

    @property
    def start_s(self) -> float:
        """Seconds for each trial until all run."""
        return (self.started[-1] - self.begin) / len(self.started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=16, help="nodes besides the head")
    parser.add_argument("--trials", type=int, default=64, help="trials, all at once")
    parser.add_argument("--few", type=int, default=8, help="trials to compare with")
    arguments = parser.parse_args()
    if arguments.trials > CPUS * arguments.nodes:
        parser.error(f"--trials: at most {CPUS} for each node, so that all run at once")
    os.environ.pop("RAY_ADDRESS", None)
    with running_cluster(arguments.nodes) as address:
        measure(address, arguments.few)  # imports, and the first processes of nodes
        few = measure(address, arguments.few)
        many = measure(address, arguments.trials)
    figures = {
        "nodes": arguments.nodes,
        "trials": arguments.trials,
        "few_start_s": few.start_s,
        "start_s": many.start_s,
        "start_growth": many.start_s / few.start_s,
        "driver_cpu_share": share_while_all_run(many),
        "driver_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }
    record("many_nodes", {name: round(value, 3) for name, value in figures.items()})


@contextmanager
def running_cluster(nodes: int) -> Iterator[str]:
    """A cluster on this machine, whose head runs no trials; yields its address."""
    small = {"object_store_memory": STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    try:
        for _ in range(nodes):
            cluster.add_node(wait=False, num_cpus=CPUS, **small)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


def share_while_all_run(times: Times) -> float:
    """The driver's CPU time over wall time, from the last start of a trial to the first end of one."""
    during = [moment for moment in times.reports if times.started[-1] < moment[0] < times.ends[0][0]]
    if len(during) < len(times.started):
        raise RuntimeError(f"only {len(during)} reports while all trials ran: EPOCH_S is too short here")
    (begin, cpu_begin), (end, cpu_end) = during[0], during[-1]
    return (cpu_end - cpu_begin) / (end - begin)


def measure(address: str, trials: int) -> Times:
    """Runs a study whose trials all run at once."""
    from deit_ray.cluster import connect
    from deit_ray.study.observers import Observer
    from deit_ray.study.study import Study
    from deit_ray.terminal.console import Console

    times = Times()

    class Clock(Observer):
        def trial_started(self, number: int) -> None:
            times.started.append(time.monotonic())

        def trial_reported(self, number: int, result: dict) -> None:
            times.reports.append((time.monotonic(), time.process_time()))

        def trial_ended(self, end) -> None:
            times.ends.append((time.monotonic(), time.process_time()))

    console = Console()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        # all trials run to their ends
        search = {
            "trials": trials,
            "max_concurrent": trials,
            "sampler": "random",
            "scheduler": "none",
        }
        experiment = make_experiment(Path(folder), f"{folder}/results", search)
        data = write_colours(folder, {"train": 20}, classes=2)  # no trial reads it
        with connect.connected(address, False, console.warn):
            study = Study.create(experiment)
            Path(study.folder, TRIALS).write_text(str(trials))
            with study.driving():
                driver = make_driver(study, data, Waiting, trials, console)
                driver.observers.append(Clock())
                times.begin = time.monotonic()
                driver.run()
        check(study, trials)
    return times


if __name__ == "__main__":
    main()
