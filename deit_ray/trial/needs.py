"""What a trial needs of a cluster, added up before it starts."""

from dataclasses import dataclass

from deit_ray.experiment.config import Experiment
from deit_ray.terminal.format import counted

# modules that a trial's process, its workers, the stream's tasks and Ray's own actors import
MODULES = ("deit_ray.trial.trial", "deit_ray.training.worker", "deit_ray.data.windows")
# part of the object store for the streams of all trials; two windows of a stream overlap only for a moment
STREAM_STORE = 0.4


@dataclass(frozen=True)
class Needs:
    """What a trial takes from the cluster: reserved by its workers, and counted for its stream."""

    gpus: float
    cpus: float
    stream_cpus: float

    @classmethod
    def of(cls, experiment: Experiment, device: str) -> "Needs":
        workers = experiment.train.workers
        return cls(
            gpus=workers * experiment.train.gpus_per_worker if device == "cuda" else 0.0,
            cpus=workers * experiment.train.cpus_per_worker,
            stream_cpus=workers * experiment.data.cpus_per_worker,
        )

    def fit(self, resources: dict[str, float]) -> int:
        """How many such trials fit into a cluster's resources at once."""
        by_cpu = (resources.get("CPU", 0) + 1e-6) // (self.cpus + self.stream_cpus)
        return int(min(by_cpu, self._fit_gpus(resources.get("GPU", 0)))) if self.gpus else int(by_cpu)

    def _fit_gpus(self, available: float) -> float:
        """How many trials fit into a number of GPUs. A trial that takes a part of a GPU fits into one GPU."""
        if self.gpus < 1:
            return available // 1 * ((1 + 1e-6) // self.gpus)
        return (available + 1e-6) // self.gpus

    def sum_shown(self, experiment: Experiment) -> str:
        train, data, workers = experiment.train, experiment.data, experiment.train.workers
        group, cpus = counted(workers, "worker"), counted(self.cpus + self.stream_cpus, "CPU")
        gpus = f" and {counted(self.gpus, 'GPU')}" if self.gpus else ""
        return (
            f"{group} x ({train.cpus_per_worker:g} training + {data.cpus_per_worker:g} stream) "
            f"CPUs = {cpus}{gpus}"
        )


def store_share(resources: dict[str, float], needs: Needs) -> float:
    """Bytes of the cluster's object store for each of a trial's two windows, when as many trials run as fit
    into the cluster."""
    return STREAM_STORE * resources["object_store_memory"] / max(1, needs.fit(resources))
