"""The evaluation of a saved model over Ray: every image of a split, once."""

import tempfile
from functools import partial

import ray

from deit_ray import storage
from deit_ray.data import shards
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment
from deit_ray.models import student
from deit_ray.trial.assemble import EVALUATE, make_trainer
from deit_ray.trial.launch import run_trial
from deit_ray.trial.reading import make_worklist


def evaluate_here(
    model: str, experiment: Experiment, manifest: shards.Manifest, device: str, splits: tuple[str, ...]
) -> dict[str, float]:
    """Evaluates a model.safetensors on the Ray that is connected.

    Args:
        model: URI of the file.
        experiment: whose data, threads and workers are used.
        manifest: of its data.
        device: cpu or cuda.
        splits: which of val and test.

    Returns:
        The metrics by name, such as test/top1.

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
    make = partial(
        _make_evaluation, experiment, manifest, storage.absolute(experiment.data.uri), device, splits, weights
    )
    with tempfile.TemporaryDirectory(
        prefix="deit_ray-"
    ) as folder:  # Ray Train needs one; nothing in it is kept
        return run_trial(make, f"{folder}/evaluation", lambda metrics: None)


def _make_evaluation(experiment, manifest, data, device, splits, weights, config, on_report):
    worklist = make_worklist(experiment, manifest, data, splits, epochs=0)
    job = {"model": weights}
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
