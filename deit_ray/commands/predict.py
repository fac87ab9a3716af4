"""The accuracy of a trained model on a data set, and its predictions for images.

torch, timm and Ray are imported once the model is found, so that a wrong name is answered at once.
"""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deit_ray import storage
from deit_ray.data import shards
from deit_ray.data.decode import ROTATED, describe_remarks
from deit_ray.data.listing import Unreadable, Unused
from deit_ray.data.walk import scan
from deit_ray.data.worklist import EVALUATIONS
from deit_ray.errors import UserError
from deit_ray.experiment.config import Data, Experiment
from deit_ray.results.folders import EXPERIMENT, MODEL, experiment_of, runs_of
from deit_ray.results.origin import check_same_inputs
from deit_ray.terminal.session import Session
from deit_ray.tracking.address import VARIABLE, tracking_uri
from deit_ray.tracking.fetch import fetch_model, is_model_uri, registered_name
from deit_ray.tracking.moved import follow_artifacts
from deit_ray.trial.needs import MODULES

if TYPE_CHECKING:
    from deit_ray.trial.evaluation import Evaluation

ROTATIONS = {  # what became of the rotation in EXIF, by what the model says about it
    True: "applied, as to the images that the model was trained on",
    False: "not applied, as to the images that the model was trained on",
    None: "applied, except to JPEGs, as by the earlier version that made the model",
}
CUDA_TOLERANCE = 0.002  # of a fraction: a GPU may choose other kernels, which round differently


def evaluate(model: str, data: str, split: str = "test", session: Session | None = None) -> Evaluation:
    """Evaluates a model on every image of a split, once.

    Args:
        model: path of a model.safetensors; name of a run or study; or URI of a model in MLflow, such as
            models:/digits_search-1@best.
        data: URI of a prepared data set.
        split: test, or val for the part of train that the run of the model held out with its `data.holdout`;
            for a model without a run, the last tenth.
        session: see `Session`; a run or study is looked up in its `results`.

    Returns:
        top1 and the other metrics of `training.evaluate`, named SPLIT/top1 and so on; as `answers`, what the
        model answered for each image, which `save_answers` writes as files.

    Raises:
        UserError: the model or the data cannot be read, their classes differ, or there is no such split.
    """
    session = session or Session()
    path = find_model(model, session.results)
    manifest = shards.read_manifest(data)
    holdout = _holdout(path, data, split, manifest, session)
    from deit_ray.trial.evaluation import check_model

    description, _, notes = check_model(storage.fetch(path), data, manifest)
    session.warn_of(notes)
    if ROTATED in manifest.remarks and description.get("exif", manifest.exif) != manifest.exif:
        here = "applied" if manifest.exif else "not applied"
        session.console.warn(
            f"{data}: {manifest.remarks[ROTATED][0]} images ask for a rotation in EXIF, which was {here} "
            f"here, unlike in the images that {model} was trained on"
        )
    sized = {key: description[key] for key in ("image_size", "eval_crop", "mean", "std")}
    experiment = Experiment.model_validate(
        {
            "name": "evaluate",
            "data": {"uri": data, "holdout": holdout, **sized},
            "distillation": {"kind": "none"},
            "train": {"batch_size": 64},
        }
    )
    evaluation = _evaluate(path, experiment, manifest, split, session)[0]
    if is_model_uri(model):
        name = re.sub(r"[^\w.@-]+", "-", model.partition("/")[2])
        evaluation.beside = storage.join(storage.absolute(session.results), f"{name}.safetensors")
    return evaluation


def _holdout(model: str, data: str, split: str, manifest: shards.Manifest, session: Session) -> float:
    """The part of the training images that is `val`: that of the model's own run, if it has one.

    Raises:
        UserError: the split does not exist, or has no images.
    """
    if split not in EVALUATIONS:
        raise UserError(f"--split {split}: there is no such split; allowed: {', '.join(EVALUATIONS)}")
    folder = posixpath.dirname(storage.absolute(model))
    has_run = storage.exists(storage.join(folder, EXPERIMENT))
    holdout = experiment_of(folder).data.holdout if has_run else Data.model_fields["holdout"].default
    if split == "val" and not has_run:
        session.console.warn(
            f"{model}: its run is not known, so val is the last {holdout:.0%} of the training images, on "
            "which it may have been trained"
        )
    if not shards.row_groups(data, manifest, split, holdout).images:
        held = f"the run of {model} held out {holdout:g} of the training images" if split == "val" else data
        raise UserError(f"--split {split}: has no images: {held}")
    return holdout


@dataclass(frozen=True)
class Verification:
    """The recorded value of a study's best trial, and the value that its saved model has when evaluated
    again.

    Attributes:
        metric: name of the metric that the study ranks by.
        recorded, evaluated: both values, fractions from 0 to 1.
        device: where the model was evaluated: cpu or cuda.
    """

    metric: str
    recorded: float
    evaluated: float
    device: str

    @property
    def difference(self) -> float:
        """The evaluated value minus the recorded one."""
        return self.evaluated - self.recorded

    @property
    def holds(self) -> bool:
        """Whether both are equal; on a GPU, nearly equal."""
        return abs(self.difference) <= (CUDA_TOLERANCE if self.device == "cuda" else 0)


def verify_best(study, session: Session | None = None) -> Verification:
    """Evaluates the saved model of a study's best trial on the split by which the study ranks.

    Args:
        study: a `Study`.
        session: see `Session`.

    Raises:
        UserError: no trial has finished, or the data set is not the study's.
    """
    best, metric = study.best(), study.experiment.search.metric
    experiment = study.trial_experiment(best.params)
    manifest = shards.read_manifest(experiment.data.uri)
    check_same_inputs(study.folder, experiment, manifest.fingerprint)
    model = storage.join(study.trial_folder(best.number), MODEL)
    split = metric.partition("/")[0]
    metrics, device = _evaluate(model, experiment, manifest, split, session or Session())
    evaluated = metrics[metric.removesuffix("_ema")]  # the saved weights are those of the moving average
    return Verification(metric, best.value, evaluated, device)


def _evaluate(
    model: str, experiment: Experiment, manifest: shards.Manifest, split: str, session: Session
) -> tuple[Evaluation, str]:
    """The metrics of a model on a split, and the device on which it was evaluated."""
    from deit_ray.cluster import connect
    from deit_ray.trial.evaluation import evaluate_here
    from deit_ray.trial.launch import check_fits

    with session.connected(MODULES):
        device = check_fits(experiment, connect.possible_resources())
        return evaluate_here(model, experiment, manifest, device, split), device


@dataclass(frozen=True)
class Prediction:
    """The classes of an image with their probabilities, most likely first.

    Attributes:
        image: path of the image file.
        classes: (name, probability) of each class; empty if the image cannot be read.
        problem: why the image cannot be read; None if it can.
    """

    image: str
    classes: list[tuple[str, float]]
    problem: str | None = None


def predict(model: str, images: list[str], top: int = 5, session: Session | None = None) -> list[Prediction]:
    """The most likely classes of images. An image that cannot be read costs only its own answer.

    Args:
        model: as for `evaluate`.
        images: paths of image files, or of folders of them.
        top: number of classes of each image.
        session: see `Session`; a run or study is looked up in its `results`.

    Raises:
        UserError: the model cannot be read, or there is no image.
    """
    session = session or Session()
    path = storage.fetch(find_model(model, session.results))
    files = find_images(images, session)
    from deit_ray.commands.classify import Classifier

    classifier = Classifier(path)
    predictions, remarks = [], {}
    for image in files:
        try:
            classes, found = classifier.classify(_read(image), top)
        except Unreadable as unreadable:
            predictions.append(Prediction(image, [], str(unreadable)))
            continue
        for remark in found:
            remarks.setdefault(remark, [0, image])[0] += 1
        predictions.append(Prediction(image, classes))
    session.warn_of(describe_remarks(remarks, ROTATIONS[classifier.view.exif]))
    return predictions


def find_images(paths: list[str], session: Session) -> list[str]:
    """The image files of paths, in their order: a folder gives the images in and below it, sorted.

    What an image is, and which files are not used, is decided as by `data prepare`; warnings name the latter.
    A path that does not exist is kept, so that its answer says so.

    Raises:
        UserError: no path exists, or a folder holds no images.
    """
    if paths and not any(Path(path).exists() for path in paths):
        raise UserError(f"{paths[0]}: no such file")
    files = []
    for path in paths:
        if not Path(path).is_dir():
            files.append(path)
            continue
        unused = Unused()
        found = scan(path, unused)
        found.note_others(unused)
        images = [name for name, _ in found.all_images()]
        if not images:
            raise UserError(f"{path}: the folder holds no image files, such as .jpg or .png")
        session.warn_of(f"{path}: {note}" for note in unused.notes())
        files += [str(Path(path, name)) for name in images]
    return files


def _read(image: str) -> bytes:
    """The content of an image file.

    Raises:
        Unreadable: there is no such file.
    """
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from None


def find_model(model: str, results: str) -> str:
    """The local path or URI of a model: a file, or the model.safetensors of a run or study.

    Args:
        model: path or URI of a file, or of the folder of a run or study; the name of a run or study; or the
            URI of a model in MLflow, such as models:/digits_search-1@best.
        results: folder in which runs and studies are looked up.

    Raises:
        UserError: there is no such model.
        UnavailableError: MLflow does not answer.
    """
    if is_model_uri(model):
        uri = _mlflow_of(model, results)
        follow_artifacts(uri, storage.join(storage.absolute(results), "mlruns"))
        return fetch_model(model, uri)
    if not storage.is_local(model):
        uri = model if model.endswith(".safetensors") else storage.join(model, MODEL)
        if storage.exists(uri):
            return uri
    if Path(model).is_file():
        return model
    if (Path(model) / MODEL).is_file():  # the folder of a run or study
        return str(Path(model) / MODEL)
    for run in reversed(runs_of(model.removeprefix("run:"), results) or [model]):
        if storage.exists(storage.join(results, run, MODEL)):
            model = storage.join(results, run, MODEL)
            return storage.local_path(model) if storage.is_local(model) else model
    raise UserError(f"{model}: neither a model.safetensors nor a finished run or study in {results}")


def _mlflow_of(model: str, results: str) -> str:
    """The address of the MLflow that is asked for a model: MLFLOW_TRACKING_URI, else that of the study of the
    model's name in the results, else the database next to the results.

    Raises:
        UserError: there is none.
    """
    if uri := os.environ.get(VARIABLE):
        return uri
    name = registered_name(model)
    folder = storage.join(storage.absolute(results), name or "")
    if name and storage.exists(storage.join(folder, EXPERIMENT)):
        return tracking_uri(experiment_of(folder), folder)
    database = storage.join(storage.absolute(results), "mlflow.db")
    if storage.is_local(results) and storage.exists(database):
        return f"sqlite:///{database}"
    raise UserError(
        f"{model}: there is no MLflow to ask: {database} does not exist; set {VARIABLE} to its address, or "
        "name the folder of the results with --results"
    )
