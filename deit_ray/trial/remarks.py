"""What a person is told before anything is trained: few val images, and a teacher that has learnt nothing."""

import json
import posixpath

from deit_ray import storage
from deit_ray.accuracy import chance_remark, few_images_warning, show_accuracy
from deit_ray.data import shards
from deit_ray.experiment.config import Experiment
from deit_ray.results.folders import RUN, runs_of
from deit_ray.trial.reading import count_val, largest_shares


def remarks_before(experiment: Experiment, manifest: shards.Manifest) -> list[str]:
    """The warnings that `plan`, `train` and `tune` show, one sentence each."""
    few = None
    if experiment.search.metric.startswith("val/"):
        few = few_images_warning("val", count_val(experiment, manifest))
    return [remark for remark in (few, teacher_remark(experiment, manifest)) if remark]


def teacher_remark(experiment: Experiment, manifest: shards.Manifest) -> str | None:
    """Says that a teacher is not better than always answering the largest class, with its own accuracy.

    None if it is better, if nothing is distilled, or if no run.json beside its weights says its accuracy.
    """
    if not experiment.distils:
        return None
    weights = experiment.distillation.teacher.weights
    folder = posixpath.dirname(weights)
    if weights.startswith("run:"):
        results = storage.absolute(experiment.results.uri)
        finished = [
            run
            for run in runs_of(weights.removeprefix("run:"), results)
            if storage.exists(storage.join(results, run, RUN))
        ]
        folder = storage.join(results, finished[-1]) if finished else ""
    if not folder or not storage.exists(storage.join(folder, RUN)):
        return None
    metrics = json.loads(storage.read_bytes(storage.join(folder, RUN))).get("metrics", {})
    split = "test" if "test/top1" in metrics else "val"
    name, images = f"{split}/top1", metrics.get(f"{split}/images")
    if name not in metrics:
        return None
    remark = chance_remark(f"its {name}", metrics[name], images, largest_shares(manifest).get(split))
    if remark is None:
        return None
    shown = show_accuracy(metrics[name], images)
    return (
        f"the teacher {posixpath.basename(folder)} has {name} {shown}: {remark}; it teaches no more than that"
    )
