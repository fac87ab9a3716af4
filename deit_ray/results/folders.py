"""The folders of runs, studies and trials: their names, their files, and what can be read from them.

This file imports neither torch nor Ray, so that commands that only read results answer at once.
"""

import json
import math
import posixpath
import re
import tempfile
from pathlib import Path
from typing import Any

from deit_ray import storage
from deit_ray.errors import UserError, explain_os_error
from deit_ray.experiment.config import Experiment
from deit_ray.experiment.load import dump_experiment, load_recorded
from deit_ray.outcome import MODEL
from deit_ray.results.journal import checkpoint_name, iterate_points, step_of

EXPERIMENT = "experiment.yaml"
REMOVING = ".removing.json"  # in the folder of a study or run whose deletion has begun
RUN = "run.json"  # in the folder of a run that has finished
JOURNAL = "journal"
EMA = "ema.safetensors"  # in a checkpoint: the weights of the moving average
STATE = "state.pt"  # in a checkpoint: the optimizer's state
REPORT = "report.html"  # in the folder of a study that has ended: everything about it on one page
BEST = "best.yaml"  # in the folder of a study: the configuration of its best trial
TRIAL = re.compile(r"trial-\d{4,}")  # a trial's folder; see `trial_name`. A run's is NAME-N
SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's name for its list of checkpoints


def runs_of(name: str, results: str) -> list[str]:
    """The runs and studies of an experiment, oldest first: NAME-1, NAME-2 and so on, or NAME itself."""
    pattern = re.compile(re.escape(name) + r"-(\d+)$")
    names = storage.list_names(results)
    numbered = sorted((int(found.group(1)), entry) for entry in names if (found := pattern.match(entry)))
    return [entry for _, entry in numbered] + [entry for entry in names if entry == name]


def find_run(name: str, results: str) -> str:
    """The folder of the run, study or trial that a person names.

    Args:
        name: a trial (`digits_search-1/7`, `digits_search/trial-0007`), a run or study (`digits_student-2`,
            or `digits_student` for the newest), or the path of such a folder.
        results: the folder to look in.

    Raises:
        UserError: there is no such run; the message lists the existing runs.
    """
    if "/" in name and storage.exists(storage.join(name, EXPERIMENT)):
        return storage.absolute(name.rstrip("/"))
    parent, _, last = name.rstrip("/").rpartition("/")
    trial = re.fullmatch(r"(?:trial-)?(\d+)", last)
    if parent and trial:
        study = find_run(parent, results)
        folder = storage.join(study, trial_name(int(trial.group(1))))
        if storage.exists(storage.join(folder, EXPERIMENT)):
            return folder
        trials = ", ".join(trials_of(study)) or "none"
        raise UserError(f"{name}: no such trial; {posixpath.basename(study)} has: {trials}")
    runs = [] if "/" in name else runs_of(name, results)
    runs = [run for run in runs if storage.exists(storage.join(results, run, EXPERIMENT))]
    if runs:
        return storage.join(storage.absolute(results), runs[-1])
    if storage.exists(storage.join(name, EXPERIMENT)):
        return storage.absolute(name)
    known = [
        entry
        for entry in storage.list_names(results)
        if storage.exists(storage.join(results, entry, EXPERIMENT))
    ]
    raise UserError(
        f"{name}: no such run, study or trial in {results}; "
        f"there are: {', '.join(known) or 'none'} (a trial is STUDY/7)"
    )


def trial_name(number: int) -> str:
    return f"trial-{number:04d}"


def trials_of(folder: str) -> list[str]:
    """The names of the trials' folders in a study's folder; a run's folder has none."""
    return [name for name in storage.list_names(folder) if TRIAL.fullmatch(name)]


def name_of(folder: str) -> str:
    """The name of a run's folder: digits_student-2, or digits_search-1/trial-0007 for a trial."""
    parent, _, last = folder.rpartition("/")
    return f"{posixpath.basename(parent)}/{last}" if TRIAL.fullmatch(last) else last


def results_of(folder: str) -> str:
    """The results folder that contains a run's, study's or trial's folder."""
    parent, _, last = folder.rpartition("/")
    return parent.rpartition("/")[0] if TRIAL.fullmatch(last) else parent


def experiment_of(folder: str) -> Experiment:
    """The experiment of a run's, study's or trial's folder.

    Its `results.uri` is where the folder is now, since people move folders.
    """
    experiment = recorded(folder)
    if storage.absolute(experiment.results.uri) == results_of(folder):
        return experiment
    return experiment.with_overrides({"results.uri": results_of(folder)})


def recorded(folder: str, overrides: dict[str, Any] | None = None) -> Experiment:
    """The experiment in a run's, study's or trial's folder, with keys replaced; see `load_recorded`."""
    uri = storage.join(folder, EXPERIMENT)
    if storage.is_local(uri):
        return load_recorded(storage.local_path(uri), overrides)
    with tempfile.TemporaryDirectory(prefix="deit_ray-") as local:
        path = Path(local) / EXPERIMENT
        path.write_bytes(storage.read_bytes(uri))
        return load_recorded(path, overrides)


def new_folder(experiment: Experiment, comment: str = "") -> str:
    """Makes a new folder NAME-N for a run in the results and writes the experiment into it, under a comment.

    Raises:
        UserError: the results cannot be written.
    """
    results = storage.absolute(experiment.results.uri)
    taken = [
        int(run.rpartition("-")[2]) for run in runs_of(experiment.name, results) if run != experiment.name
    ]
    number = max(taken, default=0) + 1
    while True:
        folder = storage.join(results, f"{experiment.name}-{number}")
        try:
            if storage.is_local(folder):
                Path(folder).mkdir(parents=True)
            storage.create_bytes(
                storage.join(folder, EXPERIMENT), dump_experiment(experiment, comment).encode()
            )
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            reason = explain_os_error(error)
            raise UserError(f"results.uri: {experiment.results.uri}: cannot be written: {reason}") from None


def saved_steps(folder: str) -> list[int]:
    """The steps of a run's whole checkpoints, from Ray Train's own list, in ascending order."""
    known = read_snapshot(folder)
    return [] if known is None else listed_steps(known)


def listed_steps(known: dict) -> list[int]:
    """The steps of the checkpoints on a list of `read_snapshot`, in ascending order."""
    results = [*known["checkpoint_results"], *filter(None, [known["latest_checkpoint_result"]])]
    return sorted({step_of(result["checkpoint_dir_name"]) for result in results})


def read_snapshot(folder: str) -> dict | None:
    """Ray Train's list of a run's checkpoints; None if there is none."""
    try:
        return json.loads(storage.read_bytes(storage.join(folder, SNAPSHOT)))
    except FileNotFoundError:
        return None


def measured(folder: str, name: str) -> dict[int, float]:
    """A metric's values by step, from the run's journal."""
    return {
        point.step: point.value
        for point in iterate_points(storage.join(folder, JOURNAL))
        if point.name == name
    }


def best_step(folder: str, metric: str) -> tuple[int, float] | None:
    """The step and value of the best kept checkpoint; of equal ones, the latest.

    If no kept checkpoint has a finite value: the step of the latest one, and NaN. If none is kept: None.
    """
    steps, values = saved_steps(folder), measured(folder, metric)
    ranked = [(step, values[step]) for step in steps if math.isfinite(values.get(step, math.nan))]
    if not ranked:
        return (steps[-1], math.nan) if steps else None
    return max(ranked, key=lambda item: (item[1], item[0]))


def keep_best_model(folder: str, metric: str) -> float | None:
    """Copies the weights that a metric is measured on from the best checkpoint to the run's own folder.

    Returns:
        The metric's value, NaN if it was never measured; None if no checkpoint is kept.
    """
    found = best_step(folder, metric)
    if found is None:
        return None
    step, value = found
    weights = storage.join(folder, checkpoint_name(step), file_measured_by(metric))
    storage.copy(weights, storage.join(folder, MODEL))
    return value


def file_measured_by(metric: str) -> str:
    """The file of a checkpoint with the weights that a metric is measured on."""
    return EMA if metric.endswith("_ema") else MODEL
