"""What a trained model is good for: its accuracy on a data set, its answers for images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch

from deit_ray import storage
from deit_ray.cluster import connect
from deit_ray.data import shards
from deit_ray.data.crop import Geometry, crop_centre, decode
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment
from deit_ray.models import student
from deit_ray.results.folders import MODEL, runs_of
from deit_ray.results.origin import check_same_inputs
from deit_ray.terminal.session import Session
from deit_ray.training.step import Normalise
from deit_ray.trial.evaluation import describe_model, evaluate_here
from deit_ray.trial.run import check_fits


@dataclass(frozen=True)
class Prediction:
    """The classes of an image with their probabilities, most likely first."""

    image: str
    classes: list[tuple[str, float]]


def evaluate(model: str, data: str, split: str = "test", session: Session | None = None) -> dict[str, float]:
    """Evaluates a model on every image of a split, once.

    Args:
        model: the path of a model.safetensors, or the name of a run or study.
        data: URI of a prepared data set.
        split: test, or val for the part of train that `data.holdout: 0.1` keeps aside.
        session: see `Session`; a run or study is looked up in its `results`.

    Returns:
        top1 and the other metrics of `evaluate.evaluate`, named SPLIT/top1 and so on.

    Raises:
        UserError: the model or the data cannot be read, or their classes differ.
    """
    session = session or Session()
    path = find_model(model, session.results)
    description = describe_model(path)
    manifest = shards.read_manifest(data)
    sized = {key: description[key] for key in ("image_size", "eval_crop", "mean", "std")}
    experiment = Experiment.model_validate(
        {
            "name": "evaluate",
            "data": {"uri": data, **sized},
            "distillation": {"kind": "none"},
            "train": {"batch_size": 64},
        }
    )
    with session.connected():
        device = check_fits(experiment, connect.possible_resources())
        return evaluate_here(path, experiment, manifest, device, (split,))


CUDA_TOLERANCE = 0.002  # of a fraction: kernels that a GPU chooses anew may round otherwise


@dataclass(frozen=True)
class Verification:
    """The recorded value of a study's best trial, and what its saved model gives when it is evaluated anew."""

    metric: str
    recorded: float
    evaluated: float
    device: str

    @property
    def difference(self) -> float:
        return self.evaluated - self.recorded

    @property
    def holds(self) -> bool:
        return abs(self.difference) <= (CUDA_TOLERANCE if self.device == "cuda" else 0)


def verify_best(study, session: Session | None = None) -> Verification:
    """Evaluates the saved model of a study's best trial on the split that it was ranked on.

    Args:
        study: a `Study`.
        session: see `Session`.

    Raises:
        UserError: no trial has finished, or the data set is not the one of the study.
    """
    best, metric = study.best(), study.experiment.search.metric
    experiment = study.trial_experiment(best.params)
    manifest = shards.read_manifest(experiment.data.uri)
    check_same_inputs(study.folder, experiment, manifest.fingerprint)
    model = storage.join(study.trial_folder(best.number), MODEL)
    with (session or Session()).connected():
        device = check_fits(experiment, connect.possible_resources())
        metrics = evaluate_here(model, experiment, manifest, device, (metric.partition("/")[0],))
    return Verification(
        metric, best.value, metrics[metric.removesuffix("_ema")], device
    )  # its weights are the average's


def predict(model: str, images: list[str], top: int = 5, session: Session | None = None) -> list[Prediction]:
    """What a model sees in images.

    Args:
        model: as for `evaluate`.
        images: paths of image files.
        top: how many classes of each.
        session: see `Session`; a run or study is looked up in its `results`.

    Raises:
        UserError: the model or an image cannot be read.
    """
    path = find_model(model, (session or Session()).results)
    description = describe_model(path)
    network = timm.create_model(description["model"], **description["arguments"]).eval()
    network.load_state_dict(student.weights_of(path))
    size, classes = description["image_size"], description["classes"]
    geometry = Geometry(size, (1.0, 1.0), (1.0, 1.0), 0.0, description["eval_crop"], 0)
    normalise = Normalise(description["mean"], description["std"], torch.device("cpu"))
    predictions = []
    for image in images:
        if not Path(image).is_file():
            raise UserError(f"{image}: no such file")
        decoded = decode(Path(image).read_bytes())
        if decoded is None:
            raise UserError(f"{image}: cannot be read as an image")
        view = np.empty((size, size, 3), np.uint8)
        crop_centre(decoded, geometry, view)
        with torch.no_grad():
            logits = network(normalise(torch.from_numpy(view).permute(2, 0, 1)[None].float() / 255))
        probabilities, labels = logits.softmax(1)[0].topk(min(top, len(classes)))
        named = [
            (classes[label], p) for label, p in zip(labels.tolist(), probabilities.tolist(), strict=True)
        ]
        predictions.append(Prediction(image, named))
    return predictions


def find_model(model: str, results: str) -> str:
    """The local path of a model: a file, or the model.safetensors of a run or study by name.

    Raises:
        UserError: there is none.
    """
    if Path(model).is_file():
        return model
    for run in reversed(runs_of(model.removeprefix("run:"), results) or [model]):
        if storage.exists(storage.join(results, run, MODEL)):
            return storage.local_path(storage.join(results, run, MODEL))
    raise UserError(f"{model}: neither a model.safetensors nor a finished run or study in {results}")
