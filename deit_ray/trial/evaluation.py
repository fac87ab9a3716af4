"""The evaluation of a saved model over Ray: every image of a split, once."""

import tempfile
from dataclasses import dataclass
from functools import partial

import ray

from deit_ray import storage
from deit_ray.data import shards
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment
from deit_ray.models import student
from deit_ray.trial.answers import Answers
from deit_ray.trial.assemble import EVALUATE, make_trainer
from deit_ray.trial.launch import run_trial
from deit_ray.trial.reading import largest_shares, make_worklist, uneven_splits


class Evaluation(dict[str, float]):
    """The metrics of a model on a split by name, such as test/top1; and what it answered for each image.

    Attributes:
        model, data: URIs of the model and of the data set.
        split: val or test.
        manifest: of the data set.
        answers: see `Answers`; `deit_ray.save_answers` writes them as files.
    """

    def __init__(self, metrics: dict[str, float], origin: "Origin", answers: Answers):
        super().__init__(metrics)
        self.model, self.data = origin.model, origin.data
        self.split, self.manifest = origin.split, origin.manifest
        self.answers = answers

    @property
    def largest_share(self) -> float:
        """The accuracy of always answering the largest class of the split."""
        return largest_shares(self.manifest)[self.split]


@dataclass(frozen=True)
class Origin:
    """What was evaluated; see `Evaluation`."""

    model: str
    data: str
    split: str
    manifest: shards.Manifest


def evaluate_here(
    model: str, experiment: Experiment, manifest: shards.Manifest, device: str, split: str
) -> Evaluation:
    """Evaluates a model.safetensors on the Ray that is connected.

    Args:
        model: URI of the file.
        experiment: whose data, threads and workers are used.
        manifest: of its data.
        device: cpu or cuda.
        split: val or test.

    Raises:
        UserError: deit_ray did not write the file, or the model knows another number of classes than the data
            has.
    """
    path = storage.local_path(model)
    description = describe_model(path)
    if len(description["classes"]) != len(manifest.classes):
        raise UserError(f"{model}: knows {len(description['classes'])} classes, but the data set at "
                        f"{experiment.data.uri} has {len(manifest.classes)}")  # fmt: skip
    weights = ray.put((description, student.weights_of(path)))
    data = storage.absolute(experiment.data.uri)
    make = partial(_make_evaluation, experiment, manifest, data, device, (split,), weights)
    parts: list = []
    with tempfile.TemporaryDirectory(
        prefix="deit_ray-"
    ) as folder:  # Ray Train needs one; nothing in it is kept
        metrics = run_trial(
            make,
            f"{folder}/evaluation",
            lambda metrics: None,
            lambda result: parts.extend(result["answered"]),
        )
    answers = Answers.of(manifest.classes, parts)
    return Evaluation(metrics, Origin(model, experiment.data.uri, split, manifest), answers)


def _make_evaluation(experiment, manifest, data, device, splits, weights, config, on_report):
    worklist = make_worklist(experiment, manifest, data, splits, epochs=0)
    job = {"model": weights, "balanced": uneven_splits(manifest)}
    return make_trainer(experiment, device, EVALUATE, job, worklist, config["folder"], on_report)


def describe_model(path: str) -> dict:
    """The description inside a model.safetensors; see `save_model`.

    Raises:
        UserError: deit_ray did not write the file.
    """
    description = student.read_description(path)
    if description is None:
        raise UserError(
            f"{path}: not a model.safetensors that deit-ray wrote: it does not say which model and "
            "classes it is"
        )
    return description
