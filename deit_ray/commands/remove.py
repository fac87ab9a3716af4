"""Deletes a study or run: the files that deit-ray wrote, and its runs in MLflow. Other files stay.

Its experiment goes first, so that nothing takes what is left for a study or run. A mark in the folder says
that the deletion has begun: after a kill, the same command deletes the rest.
"""

import json
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass

from deit_ray import hints, storage
from deit_ray.data.listing import printable
from deit_ray.errors import UnavailableError, UserError
from deit_ray.experiment.config import Experiment
from deit_ray.experiment.load import dump_experiment
from deit_ray.outcome import BAD_IMAGES
from deit_ray.results import lease, lock
from deit_ray.results.folders import (
    BEST,
    EXPERIMENT,
    JOURNAL,
    MODEL,
    REMOVING,
    REPORT,
    RUN,
    SNAPSHOT,
    TRIAL,
    find_run,
    name_of,
    recorded,
    results_of,
    runs_of,
    trials_of,
)
from deit_ray.results.origin import ORIGIN
from deit_ray.results.removal import CHECKPOINT, CHECKPOINT_FILES, list_files, remove_files
from deit_ray.study.database import DATABASE, LOG, is_study
from deit_ray.study.study import REQUESTS, is_unchanged
from deit_ray.terminal.format import counted, size
from deit_ray.tracking.address import tracking_uri
from deit_ray.tracking.removal import TrackedRuns, find_tracked
from deit_ray.tracking.tracked import RECORD, Record
from deit_ray.trial.failure import FAILURE

LAST = (lock.LOCK, lease.LEASE, REMOVING)
# any of these says that deit-ray wrote the folder
MARKS = re.compile("|".join([*map(re.escape, (DATABASE, ORIGIN, RECORD, REMOVING)), rf"{LOG}/\d{{8}}\.json"]))
NAMES = (
    *(EXPERIMENT, MODEL, REPORT, RUN, SNAPSHOT, BAD_IMAGES, ORIGIN, RECORD, FAILURE, *LAST, DATABASE),
    *(f"{DATABASE}-{suffix}" for suffix in ("journal", "wal", "shm")),
    ".validate_storage_marker",  # Ray Train's
)
SEGMENT = r"\d{6,}\.jsonl"
EVALUATED = r"(classes|confusion|mistakes)\.csv|mistakes\.png"
PARTIAL = r"\.[^/]+\.[0-9a-f]{32}\.partial"  # of a write that was killed
OURS = re.compile(
    rf"({TRIAL.pattern}/)?("
    + "|".join(
        [
            *map(re.escape, NAMES),
            rf"worker-\d+\.json|{JOURNAL}/({SEGMENT}|{PARTIAL})|{PARTIAL}",
            rf"{CHECKPOINT.pattern}/({'|'.join(map(re.escape, CHECKPOINT_FILES))})",
            rf"{LOG}/(merged/)?\d{{8}}\.json|{REQUESTS}/(study|\d+|{PARTIAL})",
            rf"evaluation/[^/]+/({EVALUATED}|{PARTIAL})",
        ]
    )
    + ")"
)
NAMED = 5  # files that a message names


@dataclass(frozen=True)
class Removal:
    """What the deletion of a study or run would delete.

    Attributes:
        name: of the study or run.
        folder: URI of its folder.
        is_study: whether it is a study.
        trials: number of its trials' folders; 0 for a run.
        files: bytes of each file that is deleted, by path within the folder.
        others: files that stay, since deit-ray did not write them or a person has changed them.
        tracked: its runs in MLflow; None where they stay.
        pupils: names of other runs and studies in the same results that learn from its model.
    """

    name: str
    folder: str
    is_study: bool
    trials: int
    files: dict[str, int]
    others: tuple[str, ...]
    tracked: TrackedRuns | None
    pupils: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def sentences(self) -> list[str]:
        """What would be deleted, and what a person must know before."""
        what = f"the study, {counted(self.trials, 'trial')}" if self.is_study else "the run"
        there = f"{what}, {counted(len(self.files), 'file')} with {size(self.bytes)} in {self.folder}"
        said = [f"{self.name}: {there}"]
        if self.tracked:
            said.append(f"  and {self.tracked.describe()}")
            said += [f"  but not what {place} has of it" for place in self.tracked.elsewhere]
        said += [f"  {pupil} has it as its teacher, and cannot be resumed without" for pupil in self.pupils]
        return said + self.left()

    def left(self) -> list[str]:
        """Names files that stay; empty if none does."""
        if not self.others:
            return []
        more = f" and {len(self.others) - NAMED} more" if len(self.others) > NAMED else ""
        named = ", ".join(map(printable, self.others[:NAMED]))
        return [f"  {named}{more}: not written by deit-ray, or changed since, so left in {self.folder}"]


def find_removal(name: str, results: str = hints.DEFAULT_RESULTS, keep_runs: bool = False) -> Removal:
    """What the deletion of a study or run would delete; nothing is deleted.

    Args:
        name: whole name of the study or run, such as digits_search-1, or the path of its folder.
        results: the folder to look in.
        keep_runs: whether its runs in MLflow stay.

    Raises:
        UserError: there is no such study or run, it is a trial, it is running, or deit-ray did not write it.
        UnavailableError: MLflow does not answer.
    """
    folder = _find(name, results)
    files = list_files(folder)
    others = [file for file in files if not _is_ours(folder, file)]
    _check_ours(folder, files, others)
    if (driver := lock.driver_of(folder)) is not None:
        raise UserError(
            f"{name}: is running, on {driver.get('host')} as process {driver.get('pid')}; wait for its "
            "end, or end it, before you delete it"
        )
    tracked = None
    if not keep_runs and EXPERIMENT in files:
        tracked = _find_tracked(folder)
    ours = {file: count for file, count in files.items() if file not in others}
    pupils = tuple(_pupils_of(folder))
    trials = len(trials_of(folder))
    return Removal(
        name=posixpath.basename(folder),
        folder=folder,
        is_study=is_study(folder) or trials > 0,
        trials=trials,
        files=ours,
        others=tuple(others),
        tracked=tracked,
        pupils=pupils,
    )


def remove(found: Removal) -> None:
    """Deletes a study or run. It may be repeated after a kill.

    Raises:
        UserError: it is running.
        UnavailableError: MLflow does not answer, or a file cannot be deleted. The rest can be deleted by the
            same command.
    """
    folder, mark = found.folder, storage.join(found.folder, REMOVING)
    with lock.driving(folder, found.name):
        if found.tracked:
            found.tracked.delete_all()
        storage.write_bytes(mark, json.dumps({"pid": os.getpid()}).encode())
        storage.remove(storage.join(folder, EXPERIMENT))  # without it, nothing can resume or use the rest
        files = [file for file in list_files(folder) if _is_ours(folder, file)]
        remove_files(folder, [file for file in files if file not in LAST])
        remove_files(folder, LAST)


def _find(name: str, results: str) -> str:
    """The folder of the study or run of a name."""
    begun = storage.join(storage.absolute(results), name.rstrip("/"))
    if "/" in name and storage.exists(storage.join(name, REMOVING)):
        begun = storage.absolute(name.rstrip("/"))
    folder = begun if storage.exists(storage.join(begun, REMOVING)) else find_run(name, results)
    if TRIAL.fullmatch(posixpath.basename(folder)):
        whole = hints.command("rm", name_of(folder).partition("/")[0], results=results_of(folder))
        raise UserError(
            f"{name}: is a trial, and a study needs all its trials; delete the whole study: {whole}"
        )
    if "/" not in name and posixpath.basename(folder) != name and runs_of(name, results):
        raise UserError(
            f"{name}: write the whole name of what is to be deleted, such as {posixpath.basename(folder)}"
        )
    if storage.is_local(folder) and os.path.islink(storage.local_path(folder)):
        raise UserError(f"{name}: is a link to {os.path.realpath(folder)}; delete that folder, and the link")
    return folder


def _is_ours(folder: str, file: str) -> bool:
    """Whether deit-ray has certainly written a file of a study's or run's folder."""
    if file == BEST:
        return is_unchanged(storage.read_bytes(storage.join(folder, file)))
    return OURS.fullmatch(file) is not None


def _check_ours(folder: str, files: dict[str, int], others: list[str]) -> None:
    """Refuses a folder that deit-ray did not write, though it has an experiment file."""
    if any(map(MARKS.fullmatch, files)):
        return
    text = storage.read_bytes(storage.join(folder, EXPERIMENT)).decode(errors="replace")
    lines = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    if others or lines != dump_experiment(recorded(folder)):
        named = f", and holds {', '.join(map(printable, others[:NAMED]))}" if others else ""
        raise UserError(f"{folder}: deit-ray did not write this folder{named}; delete it yourself")


def _find_tracked(folder: str) -> TrackedRuns:
    """The runs of a study or run in MLflow, those of trials first, with their models."""
    experiment = recorded(folder, {"results.uri": results_of(folder)})
    folders = [*(storage.join(folder, trial) for trial in trials_of(folder)), folder]
    records = [record for record in map(Record.read, folders) if record is not None]
    uri, own, name = tracking_uri(experiment, folder), Record.read(folder), posixpath.basename(folder)
    try:
        return find_tracked(uri, experiment.tracking.experiment, name, records, own and own.id)
    except UnavailableError as error:
        raise UnavailableError(
            f"{name_of(folder)}: {error}; nothing was deleted; repeat this once it answers, or leave its "
            "runs there with --keep-runs"
        ) from error


def _pupils_of(folder: str) -> Iterator[str]:
    """The names of other runs and studies in the same results whose teacher is the model of a run."""
    results, name = results_of(folder), posixpath.basename(folder)
    for other in storage.list_names(results):
        if other == name or not storage.exists(storage.join(results, other, EXPERIMENT)):
            continue
        try:
            experiment = recorded(storage.join(results, other))
        except UserError:  # of another version, or damaged
            continue
        if _learns_from(experiment, folder):
            yield other


def _learns_from(experiment: Experiment, folder: str) -> bool:
    teacher = experiment.distillation.teacher if experiment.distils else None
    if teacher is None:
        return False
    if teacher.weights.startswith("run:"):
        return teacher.weights == f"run:{posixpath.basename(folder)}"
    return storage.absolute(teacher.weights) == storage.absolute(storage.join(folder, MODEL))
