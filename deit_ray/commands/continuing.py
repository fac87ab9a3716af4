"""Continues a run: from where it was interrupted, or beyond its epochs."""

import posixpath
from functools import partial
from typing import Literal

from optuna.trial import TrialState

from deit_ray import hints, storage
from deit_ray.data import shards
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment
from deit_ray.experiment.load import dump_experiment
from deit_ray.results.folders import (
    EXPERIMENT,
    JOURNAL,
    RUN,
    SNAPSHOT,
    experiment_of,
    find_run,
    name_of,
    new_folder,
    results_of,
    saved_steps,
)
from deit_ray.results.journal import JournalWriter, checkpoint_name, iterate_points
from deit_ray.results.origin import check_numerics, check_same_inputs
from deit_ray.results.removal import are_checkpoints_removed
from deit_ray.study.database import is_study
from deit_ray.study.study import Study
from deit_ray.terminal.session import Session
from deit_ray.trial.resolve import pin_tracking
from deit_ray.trial.run import TrainedRun, steps_per_epoch, train_in

Schedule = Literal["stretch", "hold"]
LONGEST_NAME = 240  # characters; see `config.Name`


def continue_run(
    name: str,
    epochs: int | None = None,
    schedule: Schedule = "stretch",
    session: Session | None = None,
) -> TrainedRun:
    """Continues a run.

    An interrupted run of `train` continues in its own folder, to its own number of epochs. A finished run, or
    a trial that has ended, stays unchanged: a new run begins with copies of its checkpoints and its journal,
    and trains to `epochs`.

    Args:
        name: see `folders.find_run`.
        epochs: total number of epochs, more than the run has; None for an interrupted run.
        schedule: learning rate from here on. `stretch`: the cosine of a run that was planned for `epochs`, so
            the rate, which had fallen to min_lr, rises to that curve. `hold`: the schedule does not change,
            so the rate stays at min_lr.
        session: see `Session`; the run is looked up in its `results`.

    Raises:
        UserError: there is no such run, it cannot be continued, or `epochs` is not above the epochs it has.
    """
    session = session or Session()
    folder = find_run(name, session.results)
    experiment = experiment_of(folder)
    if is_study(folder):
        raise UserError(
            f"{name}: is a study; resume it with: "
            f"{hints.command('tune', '--resume', posixpath.basename(folder), results=results_of(folder))}, "
            "or name one of its trials"
        )
    finished = _has_ended(folder, results_of(folder))
    check_numerics(name, folder)
    check_same_inputs(folder, experiment, shards.read_manifest(experiment.data.uri).fingerprint)
    if not finished:
        if epochs is not None:
            raise UserError(
                f"{name}: --epochs {epochs}: it was interrupted before its {experiment.train.epochs} epochs "
                "were over; finish it first: "
                + hints.command("train", "--continue", name_of(folder), results=results_of(folder))
            )
        return train_in(lambda _: folder, experiment, session, has_begun=True)
    step = _last_checkpoint(folder)
    reached = step // steps_per_epoch(experiment)
    if epochs is None:
        raise UserError(
            f"{name}: has ended, at epoch {reached}; set the total number of epochs: --epochs N, "
            f"above {reached}"
        )
    if epochs <= reached:
        raise UserError(
            f"{name}: --epochs {epochs}: it has {reached} epochs already; allowed: above {reached}"
        )
    own = {"name": name_of(folder).replace("/", "-")[:LONGEST_NAME]}
    longer = pin_tracking(lengthen(experiment, epochs, schedule).with_overrides(own), session)
    origin = {"folder": folder, "step": step, "schedule": schedule}
    return train_in(
        partial(_copy_run, folder, step, schedule), longer, session, continues=origin, has_begun=True
    )


def lengthen(experiment: Experiment, epochs: int, schedule: Schedule) -> Experiment:
    """The experiment with more epochs, and a learning rate as `continue_run` describes."""
    length = None if schedule == "stretch" else experiment.optim.schedule_epochs or experiment.train.epochs
    return experiment.with_overrides({"train.epochs": epochs, "optim.schedule_epochs": length})


def _has_ended(folder: str, results: str) -> bool:
    """Whether a run or trial has ended, so that it can only be continued by a new run.

    Raises:
        UserError: the folder is that of a trial that has not ended.
    """
    parent, _, last = folder.rpartition("/")
    if not is_study(parent):
        return storage.exists(storage.join(folder, RUN))
    study, number = posixpath.basename(parent), int(last.removeprefix("trial-"))
    trials = Study.open(study, results).optuna.get_trials(deepcopy=False)
    if trials[number].state in (TrialState.RUNNING, TrialState.WAITING):
        again = hints.command("tune", "--resume", study, results=results)
        raise UserError(f"{study}/{number}: has not ended; resume its study with: {again}")
    return True


def _last_checkpoint(folder: str) -> int:
    """The step of a run's latest checkpoint."""
    if are_checkpoints_removed(folder):
        again = hints.command("reproduce", name_of(folder), results=results_of(folder))
        raise UserError(
            f"{name_of(folder)}: its checkpoints were removed when its study ended (results.keep: best), "
            f"so it cannot be continued; train it again, and continue that run: {again}"
        )
    steps = saved_steps(folder)
    if not steps or not all(storage.exists(storage.join(folder, checkpoint_name(s))) for s in steps):
        raise UserError(
            f"{name_of(folder)}: its checkpoints are not kept, so it cannot be continued; looked in {folder}"
        )
    return steps[-1]


def _copy_run(source: str, step: int, schedule: Schedule, experiment: Experiment) -> str:
    """Makes the folder of a run that begins where another run, the source, stopped.

    The folder gets the source's checkpoints, Ray Train's list of them, and the source's journal. All kept
    checkpoints are copied, since the best one of the whole run may be among them.
    """
    comment = f"Continues {name_of(source)} from step {step}, schedule: {schedule}."
    folder = new_folder(experiment, comment)
    # without this file, an unfinished copy cannot be taken for a run
    storage.remove(storage.join(folder, EXPERIMENT))
    for saved in saved_steps(source):
        checkpoint = checkpoint_name(saved)
        for file in storage.list_names(storage.join(source, checkpoint)):
            content = storage.read_bytes(storage.join(source, checkpoint, file))
            storage.write_bytes(storage.join(folder, checkpoint, file), content)
    journal = JournalWriter(storage.join(folder, JOURNAL))
    points = iterate_points(storage.join(source, JOURNAL))
    journal.pending = [point for point in points if point.step <= step]  # with the times of the source
    journal.flush()
    storage.write_bytes(storage.join(folder, SNAPSHOT), storage.read_bytes(storage.join(source, SNAPSHOT)))
    storage.write_bytes(storage.join(folder, EXPERIMENT), dump_experiment(experiment, comment).encode())
    return folder
