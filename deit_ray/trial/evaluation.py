"""The evaluation of a saved model over Ray: every image of a split, once."""

import tempfile
from dataclasses import dataclass
from functools import partial

import ray
import torch

from deit_ray import storage
from deit_ray.data import shards
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment
from deit_ray.models.classes import check_classes
from deit_ray.models.shapes import shape_of
from deit_ray.models.weights import load_described
from deit_ray.trial.answers import Answers
from deit_ray.trial.assemble import EVALUATE, make_trainer
from deit_ray.trial.launch import run_trial
from deit_ray.trial.reading import largest_shares, make_worklist, uneven_splits


class Evaluation(dict[str, float]):
    """The metrics of a model on a split by name, such as test/top1; and what it answered for each image.

    Attributes:
        model, data: URIs of the model and of the data set.
        beside: URI of the file beside which `deit_ray.save_answers` writes: the model, unless that is in
            MLflow.
        split: val or test.
        manifest: of the data set.
        answers: see `Answers`; `deit_ray.save_answers` writes them as files.
    """

    def __init__(self, metrics: dict[str, float], origin: "Origin", answers: Answers):
        super().__init__(metrics)
        self.model, self.data = origin.model, origin.data
        self.beside = origin.model
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
        UserError: see `check_model`.
    """
    path = storage.fetch(model)
    description, state = check_model(path, experiment.data.uri, manifest)[:2]
    weights = ray.put((description, state))
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


def check_model(
    path: str, uri: str, manifest: shards.Manifest
) -> tuple[dict, dict[str, torch.Tensor], list[str]]:
    """The description and the tensors of a model.safetensors, and notes for a person. No Ray is needed.

    Args:
        uri, manifest: the data set on which it will be evaluated.

    Raises:
        UserError: deit_ray did not write the file, it is damaged, or its classes are not the data set's in
            the same order.
    """
    network, description = load_described(path)
    known, size = description["classes"], description["image_size"]
    if len(known) != len(manifest.classes):
        raise UserError(
            f"{path}: knows {len(known)} classes, but the data set at {uri} has {len(manifest.classes)}"
        )
    notes = check_classes(known, manifest.classes, f"{path}, on the data set at {uri}")
    if why := shape_of(description["model"], description["arguments"], size).refusal:
        notes.append(f"{path}: {description['model']} {why}")
    return description, network.state_dict(), notes
