"""Deletes files of runs, and nothing else in their folders."""

import contextlib
import errno
import json
import os
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deit_ray import storage
from deit_ray.results.folders import (
    EMA,
    MODEL,
    SNAPSHOT,
    STATE,
    best_step,
    file_measured_by,
    keep_best_model,
    listed_steps,
    read_snapshot,
    saved_steps,
)
from deit_ray.results.journal import checkpoint_name

KEPT = 5  # trials whose checkpoints an ended study keeps, with `results.keep: best`
CHECKPOINT = re.compile(r"step-\d{8,}")  # a checkpoint's folder; see `checkpoint_name`
CHECKPOINT_FILES = (MODEL, EMA, STATE)
REMOVED = "deit_ray_removed"  # a key of a list of checkpoints: they were removed
DELETERS = 16  # objects that are deleted at once


def remove_checkpoints(folder: str, metric: str) -> None:
    """Removes the checkpoints of a run. Its best model stays, in the run's own folder.

    It may be repeated after a kill: once the list of checkpoints is empty, none can be taken for a whole one.
    """
    if saved_steps(folder):
        _keep_model(folder, metric)
        removed = {"checkpoint_results": [], "latest_checkpoint_result": None, REMOVED: True}
        storage.write_bytes(storage.join(folder, SNAPSHOT), json.dumps(removed).encode())
    remove_unlisted(folder)


def remove_unlisted(folder: str) -> None:
    """Removes the checkpoints of a run that has ended which are not on Ray Train's list.

    A process that was killed, as ASHA kills those of the trials that it stops, leaves one: it had written a
    checkpoint and not yet the list, or the list and not yet deleted the checkpoint before.
    """
    known = read_snapshot(folder)
    if known is None:
        return
    listed = {checkpoint_name(step) for step in listed_steps(known)}
    for name in storage.list_names(folder):
        if CHECKPOINT.fullmatch(name) and name not in listed:
            remove_files(storage.join(folder, name), CHECKPOINT_FILES)


def _keep_model(folder: str, metric: str) -> None:
    """Copies the best checkpoint's weights to the run's own folder, unless they are there or lost."""
    if storage.exists(storage.join(folder, MODEL)):
        return
    step, _ = best_step(folder, metric)
    if storage.exists(storage.join(folder, checkpoint_name(step), file_measured_by(metric))):
        keep_best_model(folder, metric)


def are_checkpoints_removed(folder: str) -> bool:
    """Whether `remove_checkpoints` has removed the checkpoints of a run."""
    return bool((read_snapshot(folder) or {}).get(REMOVED))


def list_files(uri: str) -> dict[str, int]:
    """The files in and below a folder: bytes by path within the folder. Links are listed, not followed."""
    if storage.is_local(uri):
        root = storage.local_path(uri)
        with storage.naming(uri, "read"):
            found = [
                os.path.join(folder, name)
                for folder, folders, files in os.walk(root, onerror=_raise)
                for name in (*files, *(f for f in folders if os.path.islink(os.path.join(folder, f))))
            ]
            return {os.path.relpath(path, root): os.lstat(path).st_size for path in found}
    from pyarrow import fs

    filesystem, path = storage.open_uri(uri)
    with storage.naming(uri, "read"):
        found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
    prefix = path.rstrip("/") + "/"
    return {file.path.removeprefix(prefix): file.size for file in found if file.type == fs.FileType.File}


def _raise(error: OSError) -> None:
    """As `onerror` of `os.walk`, which by default leaves out what it cannot read."""
    if not isinstance(error, FileNotFoundError):
        raise error


def remove_files(uri: str, names: Collection[str]) -> None:
    """Deletes files of a folder, those that exist, and then each folder in and below it that is empty.

    Args:
        names: paths of the files within the folder.
    """
    with storage.naming(uri, "deleted"):
        if storage.is_local(uri):
            _remove_local(Path(storage.local_path(uri)), names)
        else:
            _remove_objects(uri, names)


def _remove_local(root: Path, names: Collection[str]) -> None:
    for name in names:
        (root / name).unlink(missing_ok=True)
    for folder, _, _ in os.walk(root, topdown=False):  # what a folder holds comes before the folder
        try:
            os.rmdir(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise


def _remove_objects(uri: str, names: Collection[str]) -> None:
    filesystem, root = storage.open_uri(uri)

    def remove_one(name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_file(f"{root}/{name}")

    with ThreadPoolExecutor(DELETERS, thread_name_prefix="delete") as pool:
        list(pool.map(remove_one, names))
    # objects that stand for folders: pyarrow leaves them
    kept = list_files(uri)
    folders = sorted({str(parent) for name in names for parent in Path(name).parents}, reverse=True)
    for folder in folders:
        prefix = "" if folder == "." else f"{folder}/"
        if not any(name.startswith(prefix) for name in kept):
            with contextlib.suppress(FileNotFoundError):
                filesystem.delete_dir(f"{root}/{folder}".removesuffix("/."))
