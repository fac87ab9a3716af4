"""What an experiment names is found: its data, its teacher and its student, before anything starts."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from deit_ray import storage
from deit_ray.augment.policy import find_policy
from deit_ray.data import shards
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment
from deit_ray.models.student import create_student
from deit_ray.models.teacher import TeacherWeights, read_teacher
from deit_ray.results.folders import MODEL, runs_of
from deit_ray.trial.reading import make_worklist


@dataclass(frozen=True)
class Resolved:
    """An experiment, and the things that it names.

    Attributes:
        manifest: manifest of the prepared data set.
        data: absolute URI of the prepared data set.
        teacher: the teacher's weights; None where nothing is distilled.
        initial: initial weights of the student; None where it starts from scratch.
        teacher_path: local file of the teacher's weights; None where there is no such file.
    """

    experiment: Experiment
    manifest: shards.Manifest
    data: str
    teacher: TeacherWeights | None
    initial: dict | None
    teacher_path: str | None = None


def resolve(experiment: Experiment) -> Resolved:
    """Finds the data, the teacher and the student of an experiment, and checks that they fit together.

    Raises:
        UserError: one of them, or the augmentation policy, is missing or does not fit the others.
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
    return Resolved(experiment, manifest, data, teacher, initial, path)


def weights_path(weights: str, results: str) -> str | None:
    """The local file that `distillation.teacher.weights` stands for; None for `pretrained`.

    Raises:
        UserError: run:NAME names no finished run.
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


def pin_teacher(experiment: Experiment) -> Experiment:
    """The experiment with the teacher run:NAME replaced by the newest finished run of that name.

    A run of the same name that is trained later is another teacher.

    Raises:
        UserError: run:NAME names no finished run.
    """
    weights = experiment.distillation.teacher.weights if experiment.distils else ""
    if not weights.startswith("run:"):
        return experiment
    newest = _newest_with_model(weights, experiment.results.uri)
    return experiment.with_overrides({"distillation.teacher.weights": f"run:{newest}"})


def _newest_with_model(weights: str, results: str) -> str:
    """The name of the newest finished run that run:NAME stands for."""
    name = weights.removeprefix("run:")
    runs = [run for run in runs_of(name, results) if storage.exists(storage.join(results, run, MODEL))]
    if not runs:
        raise UserError(
            f"distillation.teacher.weights: {weights}: no finished run of that name in {results}; "
            f"train one first, such as: deit-ray train experiments/{name}.yaml"
        )
    return runs[-1]
