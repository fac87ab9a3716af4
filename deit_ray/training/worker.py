"""What each Ray Train worker runs: the training loop, and the loop of a run that only evaluates."""

import dataclasses
import math
import tempfile
import time
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import timm
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from deit_ray import storage
from deit_ray.cluster.phase import show_phase
from deit_ray.cluster.ray_private import spilled_bytes
from deit_ray.data.damage import BAD_IMAGES, Bad, describe_bad, note_bad
from deit_ray.data.stream import Stream
from deit_ray.data.worklist import WorkList
from deit_ray.errors import HopelessError, NonFiniteLoss
from deit_ray.experiment.config import Experiment
from deit_ray.models.student import create_student, model_arguments
from deit_ray.results.folders import JOURNAL
from deit_ray.results.journal import JournalWriter, checkpoint_name
from deit_ray.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from deit_ray.training.clock import Clock
from deit_ray.training.evaluate import evaluate
from deit_ray.training.step import Batch, Normalise, TrainStep, uses_bfloat16
from deit_ray.training.system import SystemMeter, system_metrics


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """Everything that a worker needs to train.

    Attributes:
        experiment: the trial's.
        classes: names, by label.
        exif: whether the data set's images were turned as their EXIF says.
        worklist: the run's work list.
        stream: this rank's batches; the stream has been started.
        teacher: Ray object reference of `TeacherWeights`, or None.
        initial: Ray object reference of the student's initial weights, or None to start from scratch.
        folder: URI of the trial's results.
        balanced: the splits whose balanced accuracy is measured too.
    """

    experiment: Experiment
    classes: list[str]
    exif: bool
    worklist: WorkList
    stream: Stream
    teacher: object
    initial: object
    folder: str
    balanced: frozenset[str] = frozenset()


def train_worker(**fields) -> None:
    """Trains, evaluates, reports and saves; starts from the latest checkpoint if there is one.

    Args:
        fields: the fields of `TrainJob`.
    """
    job = TrainJob(**fields)
    experiment, worklist, stream = job.experiment, job.worklist, job.stream
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(experiment.train.threads)
    train_step = make_train_step(job, rank, world_size, device)
    model, description = train_step.model, describe(experiment, job.classes, job.exif)

    progress, checkpoint = Progress(0), ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            progress = load_checkpoint(Path(folder), train_step)
    if stream.start != progress.step:
        raise RuntimeError(
            f"the stream starts at step {stream.start}, but the checkpoint is of step {progress.step}"
        )
    journal = JournalWriter(storage.join(job.folder, JOURNAL)) if rank == 0 else None
    cost = Cost(journal, device, world_size, experiment.train)
    clock, meter = Clock(stream, device), SystemMeter(device, context.get_local_rank() == 0)

    for epoch in range(progress.step // max(1, worklist.steps_per_epoch), experiment.train.epochs):
        begin, end = epoch * worklist.steps_per_epoch, (epoch + 1) * worklist.steps_per_epoch
        show_phase("step")
        for step in range(max(begin, progress.step), end):
            samples = next(stream)
            if samples.split != "train" or samples.first_step != step:
                raise RuntimeError(
                    f"the stream gave {samples.split} step {samples.first_step}, not train step {step}"
                )
            with clock.step():
                scalars = train_step(Batch.of(samples, device), step)
            clock.count(experiment.train.batch_size, int((~samples.valid).sum()))
            if (step + 1) % experiment.train.log_every == 0 or step + 1 == end:
                scalars = {f"train/{name}": value.item() for name, value in scalars.items()}
                clock.settle()
                if not math.isfinite(scalars["train/loss"]):
                    raise NonFiniteLoss(
                        f"the loss is {scalars['train/loss']} at step {step + 1} (epoch {epoch + 1})"
                    )
                if rank == 0:
                    journal.add(scalars, step + 1)

        if not worklist.reports_after(epoch):
            continue
        splits = worklist.evaluations_after(epoch)
        show_phase("evaluation")
        clock.enter("evaluation")
        metrics = {"data/bad_images": sum_over_workers(clock.bad)} | cost.read()
        metrics |= system_metrics(gather([meter.read()]))
        for split in splits:
            metrics |= evaluate(
                split, model, train_step.ema and train_step.ema.module, stream,
                worklist.evaluation_steps(split), train_step.normalise, train_step.autocast,
                split in job.balanced,
            )  # fmt: skip
        metrics |= account_for_bad(
            job, rank, gather_bad(stream.bad), metrics["data/bad_images"], clock.images
        )
        if rank == 0:
            spilled = spilled_bytes(ray.get_runtime_context().gcs_address)
            metrics |= {} if spilled is None else {"perf/spilled_bytes": spilled}
        show_phase("checkpoint")
        clock.enter("checkpoint")
        metrics |= clock.read() | {"epoch": epoch + 1}
        if train_step.compiled:
            metrics["perf/compiled"] = float(train_step.compiled.failure is None)
        with tempfile.TemporaryDirectory() as folder:
            if rank == 0:
                journal.add(metrics, end)
                with journal.flushing():
                    save_checkpoint(Path(folder), train_step, Progress(end), description)
                metrics = journal.at(list(metrics), end)
            ray.train.report(
                metrics | {"epoch": epoch + 1, "step": end},
                checkpoint=ray.train.Checkpoint.from_directory(folder) if rank == 0 else None,
                checkpoint_dir_name=checkpoint_name(end),
            )
        clock.enter("training")


def make_train_step(job: TrainJob, rank: int, world_size: int, device: torch.device) -> TrainStep:
    """The training step of a worker, with its student and teacher."""
    experiment, classes = job.experiment, len(job.classes)
    torch.manual_seed(experiment.seed)
    student = experiment.student.model_copy(update={"init": "scratch"})
    model = create_student(student, experiment.data.image_size, classes)
    if job.initial is not None:
        model.load_state_dict(ray.get(job.initial))
    model.to(device)
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    teacher = ray.get(job.teacher) if job.teacher is not None else None
    return TrainStep(experiment, model, wrapped, teacher, classes, job.worklist.steps_per_epoch, rank, device)


def describe(experiment: Experiment, classes: list[str], exif: bool) -> dict:
    """The description that a model.safetensors holds beside the weights; see `save_model`."""
    data, student = experiment.data, experiment.student
    return {
        "model": student.model,
        "arguments": model_arguments(student, data.image_size, len(classes)),
        "classes": classes,
        "image_size": data.image_size,
        "eval_crop": data.eval_crop,
        "mean": data.mean,
        "std": data.std,
        "exif": exif,
    }


@dataclasses.dataclass(frozen=True)
class EvaluateJob:
    """Everything that a worker needs to evaluate a model.

    Attributes:
        experiment, worklist, stream: as in `TrainJob`.
        model: Ray object reference of (description, state dict) of the model.
        balanced: as in `TrainJob`.
    """

    experiment: Experiment
    worklist: WorkList
    stream: Stream
    model: object
    balanced: frozenset[str] = frozenset()


def evaluate_worker(**fields) -> None:
    """Evaluates a model on the work list's evaluations; reports the metrics and, as `answered`, all answers.

    Args:
        fields: the fields of `EvaluateJob`.
    """
    job = EvaluateJob(**fields)
    device = ray.train.torch.get_device()
    torch.set_num_threads(job.experiment.train.threads)
    description, state = ray.get(job.model)
    model = timm.create_model(description["model"], **description["arguments"])
    model.load_state_dict(state)
    normalise = Normalise(description["mean"], description["std"], device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(job.experiment, device))
    metrics, answered = {}, []
    for split in job.worklist.evaluations_after(-1):
        steps = job.worklist.evaluation_steps(split)
        metrics |= evaluate(
            split,
            model.to(device),
            None,
            job.stream,
            steps,
            normalise,
            autocast,
            split in job.balanced,
            answered,
        )
    ray.train.report(metrics | {"answered": gather(answered)})


class TooManyBadImages(HopelessError):
    """The part of the images that could not be decoded is above `data.max_bad`."""


class Cost:
    """The hours that a run's workers have used. The journal has those from before a resume."""

    def __init__(self, journal: JournalWriter | None, device: torch.device, world_size: int, train):
        on_gpu = device.type == "cuda"
        self.name = "cost/gpu_hours" if on_gpu else "cost/cpu_hours"
        self.rate = world_size * (train.gpus_per_worker if on_gpu else train.cpus_per_worker)
        self.before = journal.last.get(self.name, (0, 0.0))[1] if journal else 0.0
        self.begin = time.perf_counter()

    def read(self) -> dict[str, float]:
        return {self.name: self.before + (time.perf_counter() - self.begin) * self.rate / 3600}


def account_for_bad(job: TrainJob, rank: int, bad: Bad, samples: float, images: int) -> dict[str, float]:
    """Lists the run's images that could not be decoded in a file, by rank 0, which returns their number.

    Args:
        bad: the images that could not be decoded, of all workers.
        samples: number of samples masked since the last evaluation, out of `images`.

    Raises:
        TooManyBadImages: the masked part of the samples is above `data.max_bad`.
    """
    data, named = job.experiment.data, note_bad(job.folder, job.worklist, bad) if rank == 0 else []
    if samples > data.max_bad * images:
        which = f", such as {describe_bad(named)}, listed in {BAD_IMAGES}" if named else ""
        raise TooManyBadImages(
            f"{samples:.0f} of {images} images could not be decoded{which}; more than data.max_bad "
            f"({data.max_bad:g}) allows; see what is wrong with: deit-ray data check {data.uri}"
        )
    return {"data/bad_images_total": len(named)}


def gather_bad(bad: Bad) -> Bad:
    """The bad images of all workers together. Every worker must call this function."""
    if not torch.distributed.is_initialized():
        return bad
    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, bad)
    return set().union(*gathered)


def gather(items: list) -> list:
    """The items of all workers together. Every worker must call this function."""
    if not torch.distributed.is_initialized():
        return items
    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def sum_over_workers(value: float) -> float:
    """The sum of a number over all workers. Every worker must call this function."""
    total = torch.tensor(float(value), dtype=torch.float64, device=ray.train.torch.get_device())
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total.item()
