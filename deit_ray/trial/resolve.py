"""What an experiment names is found: its data, its teacher and its student, before anything starts.

`plan`, `train` and `tune` check an experiment with one function, `resolve`. The cheapest checks come first;
torch and timm are imported after them.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deit_ray import hints, storage
from deit_ray.data import shards
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment
from deit_ray.experiment.load import load_experiment
from deit_ray.experiment.searched import check_searched, idle_keys
from deit_ray.results.folders import MODEL, runs_of
from deit_ray.terminal.session import Session
from deit_ray.tracking.address import tracking_uri, with_tracking

if TYPE_CHECKING:
    from deit_ray.models.teacher import TeacherWeights

TEACHER = "distillation.teacher.weights"
SHARED = ("data.uri", "data.image_size", "results.uri")  # what a run and its teacher have in common


@dataclass(frozen=True)
class Resolved:
    """An experiment, and the things that it names.

    Attributes:
        manifest: manifest of the prepared data set.
        data: absolute URI of the prepared data set.
        teacher: the teacher's weights; None where nothing is distilled.
        initial: initial weights of the student; None where it starts from scratch.
        teacher_path: local file of the teacher's weights; None where there is no such file.
        notes: what a person must know before it starts.
    """

    experiment: Experiment
    manifest: shards.Manifest
    data: str
    teacher: TeacherWeights | None
    initial: dict | None
    teacher_path: str | None = None
    notes: tuple[str, ...] = ()

    def refusal(self, params: dict) -> str | None:
        """Why a trial with these searched values cannot run; None if it can."""
        from deit_ray.trial.runnable import Runnable

        return Runnable(self.experiment, self.manifest, self.data, self.teacher).refusal(params)


def resolve(experiment: Experiment, continues: bool = False) -> Resolved:
    """Finds the data, the teacher and the student of an experiment, and checks that they fit together.

    Args:
        continues: whether it has begun already, perhaps with an earlier version, which checked less. What
            would be refused because it changes nothing is then a note.

    Raises:
        UserError: one of them, or the augmentation policy, is missing or does not fit the others; or a part
            of the search space cannot run; or the results cannot be written.
    """
    tracking_uri(experiment)  # refuses one that MLflow cannot use
    storage.check_writable("results.uri", experiment.results.uri)
    notes = []
    if continues:
        notes += [f"search.space.{key}: {why}" for key, why in idle_keys(experiment).items()]
    else:
        check_searched(experiment, experiment.name)
    if experiment.search.space and not storage.is_local(experiment.results.uri):
        storage.check_conditions("results.uri", experiment.results.uri)
    manifest = shards.read_manifest(experiment.data.uri)
    data = storage.absolute(experiment.data.uri)
    from deit_ray.trial.runnable import Runnable

    runnable = Runnable(experiment, manifest, data)
    notes += runnable.notes()
    teacher = path = None
    if experiment.search.space:
        notes += _or_note(runnable.check_study, continues)
    else:
        notes += _or_note(lambda: runnable.check(experiment), continues)
    if experiment.distils:
        teacher, path = _find_teacher(experiment, manifest, notes)
        if "data.image_size" in experiment.search.space:  # else the teacher's size is checked
            _or_note(Runnable(experiment, manifest, data, teacher).check_study, continues)
    initial = _initial_weights(experiment, manifest, notes)
    return Resolved(experiment, manifest, data, teacher, initial, path, tuple(notes))


def _or_note(check, continues: bool) -> list[str]:
    """The notes of a check; for something that has begun already, its refusal is a note too."""
    try:
        return check() or []
    except UserError as error:
        if not continues:
            raise
        return [str(error)]


def _find_teacher(
    experiment: Experiment, manifest: shards.Manifest, notes: list[str]
) -> tuple[TeacherWeights, str | None]:
    from deit_ray.models.classes import check_classes
    from deit_ray.models.teacher import read_teacher

    section = experiment.distillation.teacher
    path = teacher_path(experiment)
    teacher = read_teacher(section, path, experiment.data.image_size, len(manifest.classes))
    notes += check_classes(teacher.classes, manifest.classes, f"{TEACHER}: {section.weights}")
    return teacher, path


def _initial_weights(experiment: Experiment, manifest: shards.Manifest, notes: list[str]) -> dict | None:
    """The student's first weights where they come from a file or from timm."""
    init = experiment.student.init
    if init == "scratch":
        return None
    import torch

    from deit_ray.models.classes import check_classes
    from deit_ray.models.student import create_student
    from deit_ray.models.weights import read_description

    if init != "pretrained":
        classes = (read_description(init, "student.init") or {}).get("classes")
        if classes is not None and len(classes) == len(manifest.classes):  # else the student's head is new
            notes += check_classes(classes, manifest.classes, f"student.init: {init}")
    torch.manual_seed(experiment.seed)  # a head for other classes is new
    return create_student(experiment.student, experiment.data.image_size, len(manifest.classes)).state_dict()


def teacher_path(experiment: Experiment) -> str | None:
    """The local file that `distillation.teacher.weights` stands for; None for `pretrained`.

    Raises:
        UserError: run:NAME names no finished run.
    """
    weights, results = experiment.distillation.teacher.weights, experiment.results.uri
    if weights == "pretrained":
        return None
    if not weights.startswith("run:"):
        return weights
    uri = storage.join(storage.absolute(results), _newest_with_model(experiment), MODEL)
    return storage.fetch(uri)


def pin_tracking(experiment: Experiment, session: Session) -> Experiment:
    """The experiment of a new study or run with the MLflow that it keeps; see `with_tracking`.

    Raises:
        UserError: MLflow cannot work with MLFLOW_TRACKING_URI.
    """
    experiment, note = with_tracking(experiment)
    if note:
        session.console.begin(note)
    return experiment


def pin_teacher(experiment: Experiment) -> Experiment:
    """The experiment with the teacher run:NAME replaced by the newest finished run of that name.

    A run of the same name that is trained later is another teacher.

    Raises:
        UserError: run:NAME names no finished run.
    """
    weights = experiment.distillation.teacher.weights if experiment.distils else ""
    if not weights.startswith("run:"):
        return experiment
    newest = _newest_with_model(experiment)
    return experiment.with_overrides({TEACHER: f"run:{newest}"})


def _newest_with_model(experiment: Experiment) -> str:
    """The name of the newest finished run that run:NAME stands for."""
    weights, results = experiment.distillation.teacher.weights, experiment.results.uri
    name = weights.removeprefix("run:")
    runs = [run for run in runs_of(name, results) if storage.exists(storage.join(results, run, MODEL))]
    if not runs:
        raise UserError(
            f"{TEACHER}: {weights}: no finished run of that name in {results}; {_remedy(name, experiment)}"
        )
    return runs[-1]


def _remedy(name: str, experiment: Experiment) -> str:
    """What to do about a teacher that no finished run has: finish it, correct its name, or train it."""
    results, file = experiment.results.uri, Path("experiments", f"{name}.yaml")
    if begun := runs_of(name, results):
        again = hints.command("train", "--continue", begun[-1], results=results)
        return f"{begun[-1]} has not finished; continue it with: {again}"
    finished = [r for r in storage.list_names(results) if storage.exists(storage.join(results, r, MODEL))]
    names = {re.sub(r"-\d+$", "", run) for run in finished} | set(finished)
    if not file.is_file():
        names |= {path.stem for path in file.parent.glob("*.yaml")}
        near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.7)
        return f"did you mean run:{near[0]}?" if near else "train one first, and name it as run:NAME"
    made = load_experiment(file)
    given = {key: experiment.get(key) for key in SHARED if made.get(key) != experiment.get(key)}
    given |= {key: storage.absolute(value) for key, value in given.items() if key.endswith(".uri")}
    options = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    return f"train one first: {hints.command('train', str(file.absolute()), *options)}"
