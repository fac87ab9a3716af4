"""An estimate of the trials, time, bytes and money of a study or a single run, before anything starts.

Ray and Optuna are imported where they are used, after `resolve`, so that a wrong model name is
answered sooner.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deit_ray import storage
from deit_ray.errors import UserError
from deit_ray.experiment.config import Distillation, Experiment, flatten
from deit_ray.experiment.load import default_experiment
from deit_ray.experiment.space import Refusal
from deit_ray.results.folders import EXPERIMENT, JOURNAL, experiment_of, measured, trials_of
from deit_ray.results.origin import origin_of
from deit_ray.terminal.session import Session
from deit_ray.tracking.address import with_tracking
from deit_ray.trial.needs import Needs
from deit_ray.trial.reading import make_worklist
from deit_ray.trial.remarks import remarks_before
from deit_ray.trial.resolve import Resolved, resolve

if TYPE_CHECKING:
    from deit_ray.commands.disk import Disk

SAMPLED = 5  # trials that are shown
RATE = "perf/images_per_s"


@dataclass(frozen=True)
class Rate:
    """Training speed of one worker, and where the number comes from."""

    images_per_s: float
    source: str


@dataclass(frozen=True)
class Plan:
    """The estimate for an experiment.

    Attributes:
        experiment: the planned experiment.
        settings: values that differ from the defaults, by dotted key.
        device: cpu or cuda.
        where: owner of the resources that were counted, in words.
        resources: the resources that were counted, by Ray's name.
        sampled: searched values of the first trials, as the study draws them while no result is known.
        trials: trials of the study; 1 for a run.
        needs: needs of one trial.
        fit: trials that fit at once.
        concurrent: trials that will run at once.
        epochs, steps, samples: sums over all trials of full length; a scheduler stops some trials early.
        rate: training speed; None if it is not known.
        disk: the bytes that it takes.
        remarks: warnings, see `trial.remarks`.
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
    disk: Disk
    remarks: list[str] = dataclasses.field(default_factory=list)

    @property
    def worker_hours(self) -> float | None:
        """Hours of one worker that training takes, summed over all trials."""
        return self.samples / self.rate.images_per_s / 3600 if self.rate else None

    @property
    def gpu_hours(self) -> float | None:
        """Hours of one GPU that training takes, summed over all trials; None if no GPU is used."""
        if self.rate is None or self.device != "cuda":
            return None
        return self.worker_hours * self.experiment.train.gpus_per_worker

    @property
    def hours(self) -> float | None:
        """Wall time in hours that training takes, without starts and evaluations."""
        if self.rate is None:
            return None
        rounds = math.ceil(self.trials / self.concurrent)
        hours_of_trial = self.worker_hours / self.trials / self.experiment.train.workers
        return rounds * hours_of_trial

    @property
    def money(self) -> float | None:
        """The price of all GPU-hours; None if a price or a speed is not known, or no GPU is used."""
        per_hour = self.experiment.cost.per_gpu_hour
        if self.gpu_hours is None or per_hour is None:
            return None
        return self.gpu_hours * per_hour


def plan(experiment: Experiment, session: Session | None = None) -> Plan:
    """Checks an experiment and estimates the trials, time, bytes and money of its study or run. Nothing is
    started.

    Args:
        session: see `Session`. The resources of the cluster at its address are counted. The default address
            is RAY_ADDRESS, or the cluster whose head this machine is. Without a cluster, the resources are
            those that a local Ray would have.

    Raises:
        UserError: the experiment could not run.
    """
    session = session or Session()
    resolved = resolve(with_tracking(experiment)[0])
    session.warn_of(resolved.notes)
    return plan_of(resolved, *resources_of(experiment, session))


def plan_of(resolved: Resolved, resources: dict[str, float], where: str) -> Plan:
    """The plan of an experiment on given resources; `where` names their owner in words."""
    from deit_ray.commands.disk import disk_of
    from deit_ray.trial.launch import check_fits

    experiment, search = resolved.experiment, resolved.experiment.search
    device = check_fits(experiment, resources)
    needs = Needs.of(experiment, device)
    trials = search.trials if search.space else 1
    fit = needs.fit(resources)
    worklist = make_worklist(experiment, resolved.manifest, resolved.data, ("val",))
    epochs = trials * experiment.train.epochs
    batch_sizes = _batch_sizes(experiment)
    concurrent = max(1, min(fit, trials, search.max_concurrent or fit))
    return Plan(
        experiment=experiment,
        settings=changed_settings(experiment),
        device=device,
        where=where,
        resources=resources,
        sampled=sample_trials(experiment, resolved.refusal),
        trials=trials,
        needs=needs,
        fit=fit,
        concurrent=concurrent,
        epochs=epochs,
        steps=epochs * max(worklist.train.images // size for size in batch_sizes),
        samples=epochs * max(worklist.train.images // size * size for size in batch_sizes),
        rate=rate_of(experiment, device),
        disk=disk_of(experiment, len(resolved.manifest.classes), trials, concurrent),
        remarks=remarks_before(experiment, resolved.manifest),
    )


def resources_of(experiment: Experiment, session: Session) -> tuple[dict[str, float], str]:
    """The resources that the cluster has or could have, by Ray's name; and their owner in words.

    Without a cluster, the resources are those that a local Ray would have.
    """
    import ray

    from deit_ray.cluster import connect, ray_private

    address = connect.chosen_address(session.address)
    if ray.is_initialized() or address != "local":
        with dataclasses.replace(session, address=address).connected():
            for key, uri in (("results.uri", experiment.results.uri), ("data.uri", experiment.data.uri)):
                connect.check_reachable(key, uri)
            return connect.possible_resources(), "the cluster"
    return ray_private.machine_resources(), "this machine"


def sample_trials(experiment: Experiment, refusal: Refusal) -> list[dict]:
    """The searched values of a study's first trials, as the study draws them while no result is known.

    Args:
        refusal: see `StudySearcher`.
    """
    if not experiment.search.space:
        return []
    import optuna

    from deit_ray.study.searcher import StudySearcher

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    searcher = StudySearcher(optuna.create_study(direction="maximize"), experiment, str, refusal)
    return [searcher.ask().params for _ in range(min(SAMPLED, searcher.remaining()))]


def changed_settings(experiment: Experiment) -> dict:
    """The settings that differ from the defaults, by dotted key."""
    default = flatten(default_experiment().as_dict())
    kind = Distillation.model_fields[
        "kind"
    ].default  # `default_experiment` has the kind none, which needs no teacher
    default |= {"name": None, "distillation.kind": kind}
    return {key: value for key, value in flatten(experiment.as_dict()).items() if default.get(key) != value}


def rate_of(experiment: Experiment, device: str) -> Rate | None:
    """Training speed of one worker: cost.images_per_s, or the speed of the newest run that is comparable."""
    if experiment.cost.images_per_s:
        return Rate(experiment.cost.images_per_s, "cost.images_per_s")
    results = experiment.results.uri
    for folder in _newest_first(results):
        for candidate in [folder, *(storage.join(folder, name) for name in reversed(trials_of(folder)))]:
            speeds = _speeds_if_comparable(candidate, experiment, device)
            if speeds:
                name = candidate.removeprefix(storage.absolute(results)).strip("/")
                return Rate(
                    statistics.median(speeds) / experiment_of(candidate).train.workers,
                    f"the median of {name}",
                )
    return None


def _newest_first(results: str) -> list[str]:
    """The folders in a results folder; the one whose experiment file was written last comes first."""
    results = storage.absolute(results)
    folders = [storage.join(results, name) for name in storage.list_names(results)]
    times = {folder: storage.modified_ns(storage.join(folder, EXPERIMENT)) for folder in folders}
    return sorted((folder for folder, time in times.items() if time is not None), key=times.get, reverse=True)


def _speeds_if_comparable(folder: str, experiment: Experiment, device: str) -> list[float]:
    """The speeds in images/s that a run has measured; none if its device or its `_speed_factors` differ."""
    origin = origin_of(folder)
    if (
        origin is None
        or origin["machine"]["device"] != device
        or not storage.exists(storage.join(folder, JOURNAL))
    ):
        return []
    try:
        other = experiment_of(folder)
    except UserError:  # another version wrote it, with other keys
        return []
    if _speed_factors(other) != _speed_factors(experiment):
        return []
    return list(measured(folder, RATE).values())


def _speed_factors(experiment: Experiment) -> tuple:
    """The settings on which training speed depends most."""
    student, size = experiment.student, experiment.data.image_size
    shape = (student.model, student.patch_size, student.width, student.depth, student.heads, size)
    return *shape, experiment.train.batch_size, experiment.distils


def _batch_sizes(experiment: Experiment) -> Sequence[int]:
    """The batch sizes that a trial may have."""
    searched = experiment.search.space.get("train.batch_size")
    if searched is None:
        return [experiment.train.batch_size]
    return searched.values if searched.kind == "choice" else range(searched.values[0], searched.values[1] + 1)
