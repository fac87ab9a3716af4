"""A training run on its own: trained to its end, and tracked.

What takes long to import is imported where it is used: so a mistake is answered sooner.
"""

from __future__ import annotations

import contextlib
import json
import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from deit_ray import hints, storage
from deit_ray.accuracy import chance_remark
from deit_ray.data import shards
from deit_ray.data.damage import BAD_IMAGES, describe_bad, read_bad
from deit_ray.errors import Interrupted, UnavailableError, UnexpectedError, UserError
from deit_ray.experiment.config import Experiment
from deit_ray.outcome import Outcome
from deit_ray.results.folders import (
    JOURNAL,
    RUN,
    keep_best_model,
    measured,
    new_folder,
    results_of,
    saved_steps,
)
from deit_ray.results.journal import iterate_points
from deit_ray.results.lock import driving
from deit_ray.results.origin import check_same_inputs, note_origin
from deit_ray.results.removal import remove_unlisted
from deit_ray.terminal.format import counted
from deit_ray.terminal.live import RunView
from deit_ray.terminal.session import Session
from deit_ray.tracking.tracked import Run
from deit_ray.tracking.tracker import Tracker
from deit_ray.trial.described import Made, final_metrics_of_run, params_of, weights_of, worker_tags
from deit_ray.trial.failure import (
    describe_death,
    describe_restart,
    is_death,
    is_outside,
    read_failure,
    reason_of,
    root_cause,
)
from deit_ray.trial.needs import MODULES
from deit_ray.trial.reading import largest_shares, make_worklist
from deit_ray.trial.remarks import remarks_before

# the params that every run of its own has in MLflow, also where they are the default
COMPARED = (
    "student.model",
    "distillation.kind",
    "distillation.weight",
    "augment.strength",
    "optim.lr",
    "train.epochs",
    "train.batch_size",
    "train.workers",
    "train.threads",
)

if TYPE_CHECKING:
    from deit_ray.trial.resolve import Resolved


@dataclass(frozen=True)
class TrainedRun:
    """A finished training run.

    Attributes:
        name: name of the run.
        folder: URI of its folder, which holds the experiment, the journal and model.safetensors.
        metrics: metrics of its last evaluation, by name.
        largest: the accuracy of always answering the largest class, by split.
    """

    name: str
    folder: str
    metrics: dict[str, float]
    largest: dict[str, float] = field(default_factory=dict)

    @property
    def remark(self) -> str | None:
        """Says that the model is not better than always answering the largest class, if that is so."""
        split = "test" if "test/top1" in self.metrics else "val"
        name, images = f"{split}/top1", self.metrics.get(f"{split}/images")
        if name not in self.metrics:
            return None
        return chance_remark(name, self.metrics[name], images, self.largest.get(split))


def train(experiment: Experiment, session: Session | None = None) -> TrainedRun:
    """Trains one experiment to its end.

    Args:
        experiment: see `load_experiment`.
        session: see `Session`.

    Raises:
        UserError: the experiment cannot run, or its training failed.
        Interrupted: Ctrl-C was pressed; the run can be continued.
    """
    from deit_ray.trial.resolve import pin_teacher, pin_tracking

    session = session or Session()
    return train_in(new_folder, pin_tracking(pin_teacher(experiment), session), session)


def train_in(
    make_folder: Callable[[Experiment], str],
    experiment: Experiment,
    session: Session | None = None,
    splits: tuple[str, ...] = ("val", "test"),
    continues: dict | None = None,
    has_begun: bool = False,
) -> TrainedRun:
    """Trains an experiment in a folder, from its latest checkpoint where there is one; the rest is as in
    `train`.

    Args:
        make_folder: gives the URI of the folder, once it is certain that the experiment can run.
        splits: which of val and test are evaluated.
        continues: see `note_origin`.
        has_begun: whether the folder has the beginning of the run; see `resolve`.
    """
    from deit_ray.trial.resolve import resolve

    session = session or Session()
    resolved = resolve(experiment.with_overrides({"search.space": {}}), has_begun)  # a run searches nothing
    session.warn_of(resolved.notes)
    from deit_ray.trial.launch import check_cluster, check_machine

    check_machine(experiment, session.address)
    with session.connected(MODULES):
        device = check_cluster(experiment)
        folder = make_folder(experiment)
        name = posixpath.basename(folder)
        fingerprint, teacher = resolved.manifest.fingerprint, resolved.teacher_path
        check_same_inputs(folder, experiment, fingerprint, teacher)
        rows = shards.rows_of(resolved.manifest, experiment.data.holdout)
        note_origin(folder, experiment, fingerprint, device, teacher, continues, rows)
        with driving(folder, name), Tracker.of(experiment, session.console, folder) as tracker:
            run = start_single(tracker, experiment, folder)
            view = RunView(session.console, name, experiment)
            view.started(device, remarks_before(experiment, resolved.manifest))
            with _explaining(folder, tracker, run, session.address):
                metrics = _train_on(folder, resolved, device, splits, view.reported, session.console.warn)
                keep_best_model(folder, experiment.search.metric)
                remove_unlisted(folder)
                outcome = Outcome.finished()
                ended = {"outcome": outcome.text, "metrics": metrics}
                storage.write_bytes(storage.join(folder, RUN), json.dumps(ended).encode())
            view.kept(experiment.search.metric, measured(folder, experiment.search.metric), metrics)
            metrics_at_best = final_metrics_of_run(experiment, folder)
            tags = worker_tags(folder, experiment.train.workers)
            model = weights_of(folder, metrics_at_best)
            tracker.end_run(run, outcome, folder, metrics=metrics_at_best, tags=tags, model=model)
            warn_of_bad(folder, session.console.warn)
    return TrainedRun(name, folder, metrics, largest_shares(resolved.manifest))


@contextlib.contextmanager
def _explaining(folder: str, tracker: Tracker, run: Run, address: str | None):
    """Turns whatever ends the training early into one message: why, what was kept, and how to continue."""
    name = posixpath.basename(folder)
    kept = f"its journal and checkpoints are kept in {folder}"
    again = hints.command("train", "--continue", name, results=results_of(folder), address=address)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"{name}: interrupted; {kept}\ncontinue with: {again}") from error
    except Exception as error:
        failure = getattr(root_cause(error), "failure", None) or read_failure(folder)
        if failure is not None and failure.kind == "failed":
            tracker.end_run(run, Outcome.failed(failure.reason), folder)
            raise UserError(f"{name}: the training failed: {failure.reason}; {kept}") from error
        reason = failure.reason if failure else reason_of(error)
        message = f"{name}: the training stopped: {reason}; {kept}\nonce this is fixed, continue with: "
        message += again
        if failure is not None or is_outside(error):
            raise UnavailableError(message) from error
        raise UnexpectedError(message) from error


def _train_on(
    folder: str,
    resolved: Resolved,
    device: str,
    splits: tuple[str, ...],
    on_metrics: Callable[[dict[str, float]], None],
    warn: Callable[[str], None],
) -> dict[str, float]:
    """Trains from the latest checkpoint to the last epoch; returns the metrics of the last evaluation.

    If the process of the run dies, a new one continues from the last checkpoint, as in a study.
    """
    experiment, manifest = resolved.experiment, resolved.manifest
    splits = tuple(split for split in splits if split == "val" or split in manifest.splits)
    steps, last = saved_steps(folder), make_worklist(experiment, manifest, resolved.data, splits).steps
    if steps and steps[-1] >= last:  # the driver died between the last checkpoint and the end
        points = iterate_points(storage.join(folder, JOURNAL))
        metrics = {p.name: p.value for p in points if p.step == last and not p.name.startswith("train/")}
        return metrics | {"step": last}
    from deit_ray.cluster.connect import is_alive
    from deit_ray.trial.assemble import make_trial
    from deit_ray.trial.launch import run_trial, share

    make = partial(make_trial, experiment, device, share(resolved), splits)
    deaths = 0
    while True:
        try:
            return run_trial(make, folder, on_metrics)
        except Exception as error:
            before, steps = steps, saved_steps(folder)
            deaths = deaths + 1 if steps == before else 1
            if deaths > experiment.train.max_failures or not (is_death(error) and is_alive()):
                raise
            restart = describe_restart(describe_death(error), steps[-1] if steps else 0)
            warn(f"{posixpath.basename(folder)}: {restart}")


def start_single(tracker: Tracker, experiment: Experiment, folder: str) -> Run:
    """Starts the MLflow run of a training run on its own."""
    made = Made.read(folder, experiment)
    return tracker.start_run(
        posixpath.basename(folder),
        {"experiment": experiment.name, "kind": "train"} | made.tags(),
        params_of(experiment, COMPARED),
        folder,
        datasets=made.datasets(("train", "val", "test")),
    )


def warn_of_bad(folder: str, warn: Callable[[str], None]) -> None:
    """Says, at the end of a run, which images could not be decoded."""
    if bad := read_bad(folder):
        warn(
            f"{counted(len(bad), 'image')} could not be decoded and count nowhere: {describe_bad(bad)}; "
            f"{storage.join(folder, BAD_IMAGES)} has all"
        )


def steps_per_epoch(experiment: Experiment) -> int:
    """Optimizer steps in an epoch of an experiment."""
    uri = experiment.data.uri
    return make_worklist(experiment, shards.read_manifest(uri), uri, ()).steps_per_epoch
