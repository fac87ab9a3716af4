"""What a person is told before anything is trained.

That is: few val images, a student with one head for labels and teacher, a teacher that has learnt nothing.
"""

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
    found = (few, one_head_remark(experiment, manifest), teacher_remark(experiment, manifest))
    return [remark for remark in found if remark]


def one_head_remark(experiment: Experiment, manifest: shards.Manifest) -> str | None:
    """Names the students, of all that a study may train, whose only head learns from labels and teacher.

    None if each has a distillation token with a head of its own, or if nothing is distilled.
    """
    if not experiment.distils:
        return None
    from deit_ray.trial.runnable import student_shape  # imports torch and timm

    searched = experiment.search.space.get("student.model")
    models = searched.values if searched else [experiment.student.model]
    students = {name: experiment.with_overrides({"student.model": name}) for name in models}
    one_head = [
        name for name, own in students.items() if not student_shape(own, len(manifest.classes)).two_heads
    ]
    if not one_head:
        return None
    lacks = "has no distillation token: its" if len(one_head) == 1 else "have no distillation token: their"
    return f"{', '.join(one_head)} {lacks} one head learns from the labels and from the teacher's logits"


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
