"""What a study, or a single run, will take, said before anything starts."""

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
import ray

from deit_ray import storage
from deit_ray.cluster import connect, ray_private
from deit_ray.errors import UserError
from deit_ray.experiment.config import Distillation, Experiment, flatten
from deit_ray.results.folders import EXPERIMENT, JOURNAL, experiment_of, measured, trials_of
from deit_ray.results.origin import origin_of
from deit_ray.study.searcher import StudySearcher
from deit_ray.trial.assemble import make_worklist
from deit_ray.trial.needs import Needs
from deit_ray.trial.run import Ready, check, check_fits

SAMPLED = 5  # trials that are shown
RATE = "perf/images_per_s"


@dataclass(frozen=True)
class Rate:
    """Training speed of one worker, and where the number comes from."""

    images_per_s: float
    source: str


@dataclass(frozen=True)
class Plan:
    """What an experiment will take.

    Attributes:
        experiment: what it is of.
        settings: the values that differ from the defaults, by dotted key.
        device: cpu or cuda.
        where: the resources that were looked at.
        sampled: the first trials' values, as the study draws them as long as no result is known.
        trials: of the study; 1 for a run.
        needs: of one trial.
        fit, concurrent: how many trials fit at once, and how many will run.
        epochs, steps, samples: of all trials together, at most: a scheduler stops some early.
        rate: None where none is known.
    """

    experiment: Experiment
    settings: dict
    device: str
    where: str
    resources: dict[str, float]
    sampled: list[dict]
    trials: int
    needs: Needs
    fit: int
    concurrent: int
    epochs: int
    steps: int
    samples: int
    rate: Rate | None

    @property
    def worker_hours(self) -> float | None:
        """Of training alone, which are GPU-hours where the device is one."""
        return self.samples / self.rate.images_per_s / 3600 if self.rate else None

    @property
    def hours(self) -> float | None:
        """Of wall time, of training alone."""
        if self.rate is None:
            return None
        return (
            math.ceil(self.trials / self.concurrent)
            * self.worker_hours
            / self.trials
            / self.experiment.train.workers
        )

    @property
    def money(self) -> float | None:
        per_hour = self.experiment.cost.per_gpu_hour
        return (
            self.worker_hours * per_hour
            if self.rate and self.device == "cuda" and per_hour is not None
            else None
        )


def plan(experiment: Experiment, address: str | None = None) -> Plan:
    """Checks an experiment and reckons what it takes, starting nothing.

    Args:
        address: of a running cluster, which is asked for its resources; by default RAY_ADDRESS or the cluster whose head this is, else
            what a Ray started here would have is taken.

    Raises:
        UserError: the experiment could not run.
    """
    ready = check(experiment)
    return reckon(ready, *resources_of(experiment, address))


def reckon(ready: Ready, resources: dict[str, float], where: str) -> Plan:
    """The plan of an experiment on such resources; `where` says whose they are."""
    experiment, search = ready.experiment, ready.experiment.search
    device = check_fits(experiment, resources)
    needs, trials = Needs.of(experiment, device), search.trials if search.space else 1
    fit = needs.fit(resources)
    worklist = make_worklist(experiment, ready.manifest, ready.data, ("val",))
    epochs = trials * experiment.train.epochs
    batch_sizes = _batch_sizes(experiment)
    return Plan(
        experiment=experiment,
        settings=changed_settings(experiment),
        device=device,
        where=where,
        resources=resources,
        sampled=sample_trials(experiment, min(SAMPLED, trials)),
        trials=trials,
        needs=needs,
        fit=fit,
        concurrent=max(1, min(fit, trials, search.max_concurrent or fit)),
        epochs=epochs,
        steps=epochs * max(worklist.train.images // size for size in batch_sizes),
        samples=epochs * max(worklist.train.images // size * size for size in batch_sizes),
        rate=rate_of(experiment, device),
    )


def resources_of(experiment: Experiment, address: str | None) -> tuple[dict[str, float], str]:
    """What the cluster has or could have, and which one that is; without one, what Ray would find on this machine."""
    address = (
        address
        or os.environ.get("RAY_ADDRESS")
        or ("auto" if connect.BOOTSTRAP.expanduser().is_file() else None)
    )
    if ray.is_initialized() or (address and address != "local"):
        with connect.connected(address, False, lambda text: None):
            for key, uri in (("results.uri", experiment.results.uri), ("data.uri", experiment.data.uri)):
                connect.check_reachable(key, uri)
            return connect.possible_resources(), "the cluster"
    return ray_private.machine_resources(), "this machine"


def sample_trials(experiment: Experiment, count: int) -> list[dict]:
    """The values of a study's first trials, as it draws them as long as no result is known."""
    if not experiment.search.space:
        return []
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    searcher = StudySearcher(optuna.create_study(direction="maximize"), experiment, folder_of=str)
    return [searcher.ask().params for _ in range(count)]


def changed_settings(experiment: Experiment) -> dict:
    """The settings that differ from the defaults, by dotted key."""
    least = {
        "name": "x",
        "data": {"uri": ""},
        "distillation": {"kind": "none"},
    }  # hard is the default, but wants a teacher
    default = flatten(Experiment.model_validate(least).as_dict())
    default |= {"name": None, "distillation.kind": Distillation.model_fields["kind"].default}
    return {key: value for key, value in flatten(experiment.as_dict()).items() if default.get(key) != value}


def rate_of(experiment: Experiment, device: str) -> Rate | None:
    """Training speed of one worker: the one that the experiment gives, or what the newest run of its like has measured."""
    if experiment.cost.images_per_s:
        return Rate(experiment.cost.images_per_s, "cost.images_per_s")
    results = experiment.results.uri
    for folder in _newest_first(results):
        for candidate in [folder, *(storage.join(folder, name) for name in reversed(trials_of(folder)))]:
            speeds = _speeds_of_its_like(candidate, experiment, device)
            if speeds:
                name = candidate.removeprefix(storage.absolute(results)).strip("/")
                return Rate(
                    statistics.median(speeds) / experiment_of(candidate).train.workers,
                    f"the median of {name}",
                )
    return None


def _newest_first(results: str) -> list[str]:
    """The folders of a results folder, by when their experiment was written."""
    results = storage.absolute(results)
    folders = [storage.join(results, name) for name in storage.list_names(results)]
    times = {folder: storage.modified_ns(storage.join(folder, EXPERIMENT)) for folder in folders}
    return sorted((folder for folder, time in times.items() if time is not None), key=times.get, reverse=True)


def _speeds_of_its_like(folder: str, experiment: Experiment, device: str) -> list[float]:
    """What a run has measured, if it trained the same student on images of the same size, as many at a time, on such a device."""
    origin = origin_of(folder)
    if (
        origin is None
        or origin["machine"]["device"] != device
        or not storage.exists(storage.join(folder, JOURNAL))
    ):
        return []
    try:
        other = experiment_of(folder)
    except UserError:  # of another version, whose keys are not today's: its speed is of no use
        return []
    if _like(other) != _like(experiment):
        return []
    return list(measured(folder, RATE).values())


def _like(experiment: Experiment) -> tuple:
    """What training speed depends on most."""
    student = experiment.student
    return (student.model, student.patch_size, student.width, student.depth, student.heads, experiment.data.image_size,
            experiment.train.batch_size, experiment.distils)  # fmt: skip


def _batch_sizes(experiment: Experiment) -> Sequence[int]:
    """The batch sizes that a trial may have."""
    searched = experiment.search.space.get("train.batch_size")
    if searched is None:
        return [experiment.train.batch_size]
    return searched.values if searched.kind == "choice" else range(searched.values[0], searched.values[1] + 1)
