"""Whether a trial can run: all that is known of an experiment and its searched values before it starts.

Models are built on torch's meta device (models/shapes.py), so a look costs milliseconds. A study looks at
samples of its space before it starts, and at each draw.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from deit_ray.augment.policy import find_policy
from deit_ray.data import shards
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment
from deit_ray.experiment.searched import SHAPES
from deit_ray.experiment.space import SAMPLED, combinations_of, explain, impossible_values, size_of
from deit_ray.models.shapes import Shape, shape_of
from deit_ray.models.student import model_arguments, unknown_model
from deit_ray.models.teacher import TeacherWeights, check_size
from deit_ray.training.evaluate import metric_names
from deit_ray.trial.reading import make_worklist

MOST_SHAPES = 32  # combinations that are looked at where models differ, which takes longer
MOST_REFUSED = 0.75  # a space of which a larger part cannot run is refused
BROKEN_BFLOAT16 = "avx512_bf16"  # processors with this flag; see `check_precision`


@dataclass(frozen=True)
class Runnable:
    """Looks at trials of an experiment on a data set.

    Attributes:
        experiment: the run's or the study's.
        manifest, data: the prepared data set and its absolute URI.
        teacher: its weights; None if there is none, or it is not read yet.
    """

    experiment: Experiment
    manifest: shards.Manifest
    data: str
    teacher: TeacherWeights | None = None

    def refusal(self, params: dict) -> str | None:
        """Why a trial with these searched values cannot run; None if it can."""
        try:
            own = self.experiment.with_overrides({**params, "search.space": {}})
            self.check(own)
        except ValidationError as error:
            return explain(error, params)
        except UserError as error:
            return str(error)
        return None

    def check(self, own: Experiment) -> None:
        """Checks an experiment without a search space.

        Raises:
            UserError: it cannot run; the message names the key.
        """
        if self._images("train") < own.train.batch_size:
            make_worklist(own, self.manifest, self.data, ("val",))  # raises the error that says so
        find_policy(own.augment.policy)
        shape = student_shape(own, len(self.manifest.classes))
        if shape.refusal:
            raise UserError(f"student.model: {own.student.model} {shape.refusal}")
        if own.student.drop_path_rule == "uniform" and not shape.has_blocks:
            raise UserError(
                f"student.drop_path_rule: uniform needs the blocks of a transformer such as ViT, which "
                f"{own.student.model} does not have; use linear"
            )
        self._check_metric(own, shape)
        if self.teacher is not None and own.distillation.kind != "none":
            weights = self.experiment.distillation.teacher.weights
            check_size(self.teacher.model, self.teacher.arguments, own.data.image_size, weights)

    def check_study(self) -> list[str]:
        """Checks the search space, by samples of it; returns notes for a person.

        Raises:
            UserError: no part of the space can run, or a large part cannot, or one of its choices cannot run
                with any other values.
        """
        space = self.experiment.search.space
        builds = any(key in SHAPES for key in space)
        combinations = combinations_of(space, MOST_SHAPES if builds else SAMPLED)
        refused = [(params, why) for params in combinations if (why := self.refusal(params))]
        reasons = {why for _, why in refused}
        if len(refused) == len(combinations):
            if len(reasons) == 1:
                raise UserError(f"{self.experiment.name}: {reasons.pop()}")
            raise UserError(
                f"{self.experiment.name}: search.space: none of it can run; {_example(*refused[0])}"
            )
        for key, value, why in impossible_values(space, self.refusal):
            if space[key].kind != "choice":
                continue  # other values of the range may run
            raise UserError(
                f"{self.experiment.name}: {why}"
                if why.startswith("search.space")
                else f"{self.experiment.name}: search.space.{key}: no trial with {value!r} can run: {why}"
            )
        part = len(refused) / len(combinations)
        if part > MOST_REFUSED:
            raise UserError(
                f"{self.experiment.name}: search.space: {part:.0%} of it cannot run, "
                f"{_example(*refused[0])}; narrow the space, or name the values that can run with choice"
            )
        notes = []
        if size_of(space) < self.experiment.search.trials:
            notes.append(
                f"search.space: has {size_of(space):g} combinations, fewer than search.trials "
                f"({self.experiment.search.trials}); the study ends once each was tried"
            )
        if refused:
            notes.append(
                f"search.space: about {part:.0%} of it cannot run, {_example(*refused[0])}; "
                "a trial that draws such values fails without being started"
            )
        return notes

    def _check_metric(self, own: Experiment, shape: Shape) -> None:
        """Refuses a metric that will never be measured. A run without val images ranks nothing."""
        metric, (split, _, name) = own.search.metric, own.search.metric.partition("/")
        is_study = bool(self.experiment.search.space)
        names = metric_names(len(self.manifest.classes), shape.two_heads, own.optim.ema_decay > 0)
        splits = [split for split in ("val", "test") if self._images(split)]
        if split not in splits:
            if split == "val" and not is_study:
                return
            kept = "data.holdout" if split == "val" else "data.uri"
            raise UserError(
                f"search.metric: {metric!r} is never measured, since there are no {split} images: "
                f"{self._why_empty(split)}; set {kept} otherwise"
            )
        if name not in names:
            measured = ", ".join(f"{split}/{name}" for split in splits for name in names)
            why = {
                "top5": f"the data set has {len(self.manifest.classes)} classes",
                "top1_cls": f"{own.student.model} has one head",
                "top1_dist": f"{own.student.model} has one head",
                "top1_ema": "optim.ema_decay is 0",
            }.get(name, "there is no such metric")
            raise UserError(f"search.metric: {metric!r} is never measured: {why}; measured are {measured}")

    def _images(self, split: str) -> int:
        stored = "test" if split == "test" else "train"
        if stored not in self.manifest.splits:
            return 0
        rows = self.manifest.rows(stored)
        held = round(rows * self.experiment.data.holdout)
        return {"test": rows, "val": held, "train": rows - held}[split]

    def _why_empty(self, split: str) -> str:
        if split == "test":
            return f"the data set at {self.experiment.data.uri} has none"
        rows, holdout = self.manifest.rows("train"), self.experiment.data.holdout
        return f"data.holdout {holdout:g} of {rows} training images is none; from {1 / rows:.2g} on it is one"

    def notes(self) -> list[str]:
        """What a person must know of a run or study that can run."""
        if self._images("val"):
            return []
        return [
            f"nothing is measured before the last epoch: {self._why_empty('val')}; the model of the last "
            "epoch is kept, and checkpoints are saved as usual"
        ]


def student_shape(own: Experiment, classes: int, trains: bool = True) -> Shape:
    """What is known of an experiment's student before it is built."""
    student, size = own.student, own.data.image_size
    if why := unknown_model(student.model):
        return Shape(why)
    arguments = model_arguments(student, size, classes)
    if arguments.get("depth"):
        arguments["depth"] = 1  # more blocks of the same kind take longer and show nothing else
    batch = max(1, own.train.batch_size // own.train.workers)
    return shape_of(student.model, arguments, size, batch, student.drop_path, trains)


def check_precision(experiment: Experiment, device: str) -> None:
    """Refuses bfloat16 on a processor where torch computes it wrongly.

    On processors with AVX512-BF16, torch 2.14.1 leaves uninitialised memory in the gradients of a convolution
    that gives a single pixel (tests/trial/test_runnable.py shows it).

    Args:
        device: cpu or cuda.

    Raises:
        UserError: the experiment, or a part of its search space, would run so.
    """
    if device != "cpu" or BROKEN_BFLOAT16 not in _processor_flags():
        return
    for params in combinations_of(experiment.search.space, MOST_SHAPES):
        try:
            own = experiment.with_overrides({**params, "search.space": {}})
        except ValidationError:
            continue
        if own.train.precision == "bfloat16" and student_shape(own, 2).one_pixel_convolutions:
            raise UserError(
                f"train.precision: bfloat16 on this processor ({BROKEN_BFLOAT16}) gives wrong gradients of "
                f"convolutions over a single pixel, which {own.student.model} has for images of "
                f"{own.data.image_size} pixels; use float32"
            )


def _processor_flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # only Linux has this file
        return []
    return next((line.split() for line in text.splitlines() if line.startswith("flags")), [])


def _example(params: dict, why: str) -> str:
    values = ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in params.items()
    )
    return f"such as {values}: {why}"
