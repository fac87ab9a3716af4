"""A training run on its own: checked, trained, tracked. Studies share the checks."""

import contextlib
import json
import posixpath
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
import ray.tune

from deit_ray import storage
from deit_ray.augment.policy import find_policy
from deit_ray.cluster import connect
from deit_ray.cluster.holdings import sweep
from deit_ray.data import shards
from deit_ray.data.damage import BAD_IMAGES, describe_bad, read_bad
from deit_ray.errors import Interrupted, UserError
from deit_ray.experiment.config import Experiment
from deit_ray.models.student import create_student
from deit_ray.models.teacher import TeacherWeights, read_teacher
from deit_ray.results.folders import JOURNAL, MODEL, RUN, keep_best_model, new_folder, runs_of, saved_steps
from deit_ray.results.journal import iterate_points
from deit_ray.results.lock import driving
from deit_ray.results.origin import check_same_inputs, note_origin
from deit_ray.terminal.console import Console
from deit_ray.tracking.tracked import Run
from deit_ray.tracking.tracker import Tracker
from deit_ray.trial.assemble import Shared, make_trial, make_worklist
from deit_ray.trial.failure import read_failure, reason_of
from deit_ray.trial.needs import Needs
from deit_ray.trial.trial import Trial


@dataclass(frozen=True)
class Ready:
    """An experiment whose parts were found and fit together; nothing has started yet."""

    experiment: Experiment
    manifest: shards.Manifest
    data: str  # absolute URI of the prepared data set
    teacher: TeacherWeights | None
    initial: dict | None  # the student's initial weights, where it does not start from scratch
    teacher_path: str | None = None  # the local file of its weights, where it is one


def check(experiment: Experiment) -> Ready:
    """Finds the data, the teacher and the student of an experiment.

    Raises:
        UserError: one of them, or the augmentation's policy, is missing or does not fit the others.
    """
    manifest = shards.read_manifest(experiment.data.uri)
    data = storage.absolute(experiment.data.uri)
    make_worklist(experiment, manifest, data, ("val",))
    for name in experiment.policies:
        find_policy(name)
    student = create_student(experiment.student, experiment.data.image_size, len(manifest.classes))
    initial = student.state_dict() if experiment.student.init != "scratch" else None
    teacher = path = None
    if experiment.distils:
        section = experiment.distillation.teacher
        path = weights_path(section.weights, experiment.results.uri)
        teacher = read_teacher(section, path, experiment.data.image_size, len(manifest.classes))
    return Ready(experiment, manifest, data, teacher, initial, path)


def weights_path(weights: str, results: str) -> str | None:
    """The local file that `distillation.teacher.weights` or a MODEL on the command line stands for.

    Raises:
        UserError: run: names no finished run.
    """
    if weights == "pretrained":
        return None
    if not weights.startswith("run:"):
        return weights
    uri = storage.join(storage.absolute(results), _newest_with_model(weights, results), MODEL)
    if storage.is_local(uri):
        return storage.local_path(uri)
    local = Path(tempfile.mkdtemp(prefix="deit_ray-")) / MODEL
    local.write_bytes(storage.read_bytes(uri))
    return str(local)


def _newest_with_model(weights: str, results: str) -> str:
    """The newest finished run that run:NAME stands for."""
    name = weights.removeprefix("run:")
    runs = [run for run in runs_of(name, results) if storage.exists(storage.join(results, run, MODEL))]
    if not runs:
        raise UserError(
            f"distillation.teacher.weights: {weights}: no finished run of that name in {results}; "
            f"train one first, such as: deit-ray train experiments/{name}.yaml"
        )
    return runs[-1]


def pin_teacher(experiment: Experiment) -> Experiment:
    """The experiment with its teacher run:NAME replaced by the newest run of that name: one that is trained later is another teacher."""
    weights = experiment.distillation.teacher.weights if experiment.distils else ""
    if not weights.startswith("run:"):
        return experiment
    return experiment.with_overrides(
        {"distillation.teacher.weights": f"run:{_newest_with_model(weights, experiment.results.uri)}"}
    )


def share(ready: Ready) -> Shared:
    """Puts what all trials have in common into Ray's object store, once."""
    teacher, initial = (None if value is None else ray.put(value) for value in (ready.teacher, ready.initial))
    return Shared(ready.manifest, ready.data, teacher, initial)


def train(
    experiment: Experiment, address: str | None = None, console: Console | None = None, verbose: bool = False
) -> "TrainedRun":
    """Trains one experiment to its end.

    Args:
        experiment: see `load_experiment`.
        address: of a Ray cluster; by default RAY_ADDRESS, or a local Ray for this run.
        console: what a person sees; by default nothing.
        verbose: shows Ray's own output too.

    Returns:
        The run; its folder holds the experiment, the journal and model.safetensors.

    Raises:
        UserError: the experiment cannot run.
    """
    return train_in(new_folder, pin_teacher(experiment), address, console, verbose)


def train_in(
    make_folder: Callable[[Experiment], str],
    experiment: Experiment,
    address: str | None = None,
    console: Console | None = None,
    verbose: bool = False,
    splits: tuple[str, ...] = ("val", "test"),
    continues: dict | None = None,
) -> "TrainedRun":
    """Trains an experiment in a folder, from the latest checkpoint on where there is one; the rest is as in `train`.

    Args:
        make_folder: gives the URI of the folder, once it is certain that the experiment can run.
        splits: which of val and test are evaluated.
        continues: see `note_origin`.
    """
    ready = check(experiment)
    console = console or Console(quiet=True)
    with connect.connected(address, verbose, console.warn):
        device = check_fits(experiment, connect.possible_resources())
        for key, uri in (("results.uri", experiment.results.uri), ("data.uri", experiment.data.uri)):
            connect.check_reachable(key, uri)
        folder = make_folder(experiment)
        name = posixpath.basename(folder)
        how = f"go on with: deit-ray train --continue {name}{storage.results_option(experiment.results.uri)}"
        check_same_inputs(folder, experiment, ready.manifest.fingerprint, ready.teacher_path)
        note_origin(folder, experiment, ready.manifest.fingerprint, device, ready.teacher_path, continues)
        with driving(folder, name), Tracker.of(experiment, console) as tracker:
            run = start_single(tracker, experiment, folder)
            console.run_started(name, experiment, device)
            try:
                metrics = _train_on(
                    folder, ready, device, splits, lambda result: console.run_progress(result, experiment)
                )
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise Interrupted(
                        f"{name}: interrupted; its journal and checkpoints: {folder}\n{how}"
                    ) from None
                failure = read_failure(folder)
                reason = failure.reason if failure else reason_of(error)
                if failure is not None and failure.kind == "failed":
                    tracker.end_run(run, f"failed: {reason}", folder, BAD_IMAGES)
                    how = ""
                mended = f"\nonce this is mended, {how}" if how else ""
                raise UserError(
                    f"{name}: the training failed: {reason}\n  its journal and checkpoints: {folder}{mended}"
                ) from error
            keep_best_model(folder, experiment.search.metric)
            storage.write_bytes(
                storage.join(folder, RUN), json.dumps({"outcome": "finished", "metrics": metrics}).encode()
            )
            tracker.end_run(run, "finished", folder, MODEL, BAD_IMAGES)
            warn_of_bad(folder, console.warn)
    return TrainedRun(name, folder, metrics)


def start_single(tracker: Tracker, experiment: Experiment, folder: str) -> Run:
    """The run of a training run on its own."""
    return tracker.start_run(
        posixpath.basename(folder),
        {"experiment": experiment.name, "kind": "train"},
        params_of(experiment),
        folder,
    )


def params_of(experiment: Experiment) -> dict[str, str]:
    """What MLflow shows of an experiment whose values are not searched: the few that people compare by."""
    keys = ("student.model", "distillation.kind", "distillation.weight", "augment.strength", "optim.lr", "train.epochs",
            "train.batch_size", "train.workers", "train.threads", "seed")  # fmt: skip
    return {key: str(experiment.get(key)) for key in keys}


def warn_of_bad(folder: str, warn: Callable[[str], None]) -> None:
    """Says, at the end of a run, which images it could not decode."""
    if bad := read_bad(folder):
        warn(
            f"{len(bad)} images could not be decoded and counted nowhere: {describe_bad(bad)}; {storage.join(folder, BAD_IMAGES)} has all"
        )


def _train_on(folder: str, ready: Ready, device: str, splits: tuple[str, ...], on_result) -> dict[str, float]:
    """Trains from the latest checkpoint to the last epoch; returns the metrics of the last evaluation."""
    experiment = ready.experiment
    splits = tuple(split for split in splits if split == "val" or split in ready.manifest.splits)
    steps, last = saved_steps(folder), make_worklist(experiment, ready.manifest, ready.data, splits).steps
    if steps and steps[-1] >= last:  # the driver went away between the last checkpoint and the end
        points = iterate_points(storage.join(folder, JOURNAL))
        return {p.name: p.value for p in points if p.step == last and not p.name.startswith("train/")} | {
            "step": last
        }
    return run_trial(partial(make_trial, experiment, device, share(ready), splits), folder, on_result)


@dataclass(frozen=True)
class TrainedRun:
    """A finished training run: its name, the URI of its folder, and the metrics of its last evaluation."""

    name: str
    folder: str
    metrics: dict[str, float]


def check_fits(experiment: Experiment, resources: dict[str, float]) -> str:
    """The device a trial runs on, having made sure that one fits.

    Raises:
        UserError: with the sum of what is needed and what there is.
    """
    device = connect.training_device(experiment.train.device, resources)
    needs = Needs.of(experiment, device)
    if needs.fit(resources) < 1:
        have = f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
        raise UserError(
            f"a trial can never start: it needs {needs.sum_shown(experiment)}, but the cluster has {have}; "
            "lower train.workers, train.cpus_per_worker or data.cpus_per_worker, or use a larger cluster"
        )
    return device


def run_trial(make, folder: str, on_result) -> dict[str, float]:
    """Runs one trial in an actor of its own, outside Ray Tune; returns the metrics of its last report."""
    actor_class = ray.tune.with_parameters(Trial, make=make)
    actor = ray.remote(num_cpus=0, resources={connect.HEAD: 0.001})(actor_class).remote(
        config={"folder": folder}
    )
    metrics: dict[str, float] = {}
    try:
        while True:
            result = ray.get(actor.train.remote())
            if result.get("done"):
                return metrics
            metrics = {key: value for key, value in result.items() if "/" in key or key in ("epoch", "step")}
            metrics = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
            on_result(metrics)
    finally:
        if ray.is_initialized():
            with contextlib.suppress(
                ray.exceptions.RayError, KeyboardInterrupt
            ):  # whatever it does, it is killed next
                ray.get(actor.stop.remote(), timeout=10)
            ray.kill(actor)
            sweep(folder)


def steps_per_epoch(experiment: Experiment) -> int:
    return make_worklist(
        experiment, shards.read_manifest(experiment.data.uri), experiment.data.uri, ()
    ).steps_per_epoch
