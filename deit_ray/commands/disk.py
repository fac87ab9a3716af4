"""How many bytes a study or run will take, from the sizes of its models."""

import itertools
from dataclasses import dataclass

from pydantic import ValidationError

from deit_ray.experiment.config import Experiment
from deit_ray.experiment.searched import SHAPES
from deit_ray.models.shapes import Weights, weights_of
from deit_ray.models.student import model_arguments
from deit_ray.results.removal import KEPT
from deit_ray.tracking.address import tracking_uri
from deit_ray.trial.runnable import student_shape

SIZES = (*SHAPES, "optim.ema_decay")  # searchable settings on which the bytes of a trial depend
MOST_BUILT = 32  # models that are built to find the largest
CHECKPOINTS = 2  # that a trial keeps: its best one and its latest one
MOMENTS = 2  # numbers that AdamW and LAMB keep for each trained parameter


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk. Journals and databases, which are small, are not counted.

    Attributes:
        model: of a model.safetensors.
        checkpoint: of a checkpoint: the model, its moving average and the optimizer's state.
        trials: trials of the study; 1 for a run.
        concurrent: trials that run at once.
        keep: `results.keep`; all for a run.
        is_linked: whether MLflow's models are links to the results' files, on the same disk.
    """

    model: int
    checkpoint: int
    trials: int
    concurrent: int
    keep: str
    is_linked: bool

    @property
    def trial(self) -> int:
        """At most, of a trial: its model, and its checkpoints if the best one is not the latest one."""
        return self.model + CHECKPOINTS * self.checkpoint

    @property
    def running(self) -> int:
        """At most, until the study ends; a trial has a new checkpoint before the old one is deleted."""
        return self.trials * self.trial + self.concurrent * self.checkpoint

    @property
    def ended(self) -> int:
        """At most, after the study's end, with the study's copy of its best model."""
        kept = self.trials if self.keep == "all" else min(KEPT, self.trials)
        copy = self.model if self.trials > 1 else 0
        return kept * self.trial + (self.trials - kept) * self.model + copy

    @property
    def tracked(self) -> int:
        """At most, in MLflow's store of artifacts: the models of trials that finish. Links take no bytes."""
        return 0 if self.is_linked else self.trials * self.model


def disk_of(experiment: Experiment, classes: int, trials: int, concurrent: int) -> Disk:
    """The bytes of an experiment with its largest searched models.

    Args:
        classes: of the data set.
        trials: trials of the study; 1 for a run.
        concurrent: trials that run at once.
    """
    sizes = [_sizes(own, classes) for own in _variants(experiment) if not student_shape(own, classes).refusal]
    model, checkpoint = (max(column) for column in zip(*sizes, strict=True))
    keep = experiment.results.keep if experiment.search.space else "all"
    is_linked = tracking_uri(experiment).startswith("sqlite:")  # its artifacts are in the results' folder
    return Disk(model, checkpoint, trials, concurrent, keep, is_linked)


def _variants(experiment: Experiment) -> list[Experiment]:
    """Experiments of trials that may differ in their bytes, with the values that the search space names."""
    named = {key: d.named for key, d in experiment.search.space.items() if key in SIZES}
    combinations = itertools.islice(itertools.product(*named.values()), MOST_BUILT)
    found = []
    for values in combinations:
        try:
            found.append(
                experiment.with_overrides({**dict(zip(named, values, strict=True)), "search.space": {}})
            )
        except ValidationError:  # these values do not fit together
            continue
    return found


def _sizes(own: Experiment, classes: int) -> tuple[int, int]:
    """Bytes of a trial's model and of its checkpoint."""
    student = own.student
    weights: Weights = weights_of(student.model, model_arguments(student, own.data.image_size, classes))
    copies = 2 if own.optim.ema_decay else 1
    return weights.bytes, copies * weights.bytes + MOMENTS * weights.trained_bytes
