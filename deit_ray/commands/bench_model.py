"""Measures models: images/s of inference, parameters, multiply-adds, and accuracy where it is known.

torch, timm and Matplotlib are imported where they are used, so that a wrong name is answered sooner.
"""

import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from optuna.trial import TrialState

from deit_ray import storage
from deit_ray.accuracy import interval, show_accuracy
from deit_ray.commands.bench_data import seconds_of
from deit_ray.commands.show import check_ours
from deit_ray.errors import UserError
from deit_ray.outcome import MODEL
from deit_ray.results.folders import RUN, find_run, runs_of
from deit_ray.study.database import is_study
from deit_ray.study.study import Study

ROUNDS = 5  # of which the median counts
BATCH = {"cpu": 16, "cuda": 256}
PLOTTED_BY = "deit_ray bench model"  # stands in every picture, so that no other file is written over
DISTILLED, PLAIN = "tab:orange", "tab:blue"  # colours of models with a distillation token, and of others


@dataclass(frozen=True)
class Accuracy:
    """An accuracy that a run or trial has measured.

    Attributes:
        metric: its name, such as test/top1.
        value: a fraction.
        images: number of images; None if it is not known.
        choices: number of evaluations from which it was chosen as the best.
    """

    metric: str
    value: float
    images: float | None = None
    choices: int = 1

    def __str__(self) -> str:
        return f"{self.metric} {show_accuracy(self.value, self.images, self.choices)}"


@dataclass(frozen=True)
class Measured:
    """A model and its measurements.

    Attributes:
        name: what a person named it: a timm model, a file, a run, or a trial (STUDY/7).
        model: timm's name of the architecture.
        arguments: of timm.create_model.
        image_size: pixels of a side.
        accuracy: None if it is not known.
        parameters: number of parameters.
        multiply_adds: of one image; papers often call them FLOPs.
        images_per_s: of inference.
        two_heads: whether it has a distillation token with a head of its own.
    """

    name: str
    model: str
    arguments: dict
    image_size: int
    accuracy: Accuracy | None = None
    parameters: int = 0
    multiply_adds: int = 0
    images_per_s: float = 0.0
    two_heads: bool = False


@dataclass(frozen=True)
class ModelBench:
    """The measured models, fastest first, and how they were measured.

    Attributes:
        device, precision: cpu or cuda; float32 or bfloat16.
        batch_size: images at once.
    """

    models: list[Measured]
    device: str
    precision: str
    batch_size: int


def bench_model(
    names: Sequence[str],
    image_size: int | None = None,
    batch_size: int | None = None,
    seconds: float = 5.0,
    results: str = "results",
    plot: str | None = None,
) -> ModelBench:
    """Measures models on this machine: on its GPU if it has one. Their weights do not matter for it.

    Args:
        names: each a timm model, a model.safetensors that deit-ray wrote, a run, or a study: then each of its
            architectures, by its best finished trial.
        image_size: pixels of a side; by default those that a model was trained with.
        batch_size: images at once; by default 256 on a GPU, 16 on a CPU.
        seconds: approximate seconds of each model.
        results: folder in which runs and studies are looked up.
        plot: URI of a picture to write, .png: accuracy over images/s if accuracies are known; if not,
            images/s over parameters and over multiply-adds.

    Raises:
        UserError: there is no such model, or it cannot take such images; or the picture cannot be written.
    """
    if plot is not None:
        if not plot.endswith(".png"):
            raise UserError(f"--plot {plot}: must end with .png")
        check_ours(plot, "--plot", PLOTTED_BY)
    found = [model for name in names for model in find_models(name, results)]
    if image_size is not None:
        found = [_resized(model, image_size) for model in found]
    from deit_ray.models.shapes import shape_of

    for model in found:
        if why := shape_of(model.model, model.arguments, model.image_size).refusal:
            raise UserError(f"{model.name}: {model.model} {why}")
    import torch

    from deit_ray.training.step import has_bfloat16

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = batch_size or BATCH[device.type]
    is_half = has_bfloat16(device)
    measured = [_measure(model, device, is_half, batch_size, seconds) for model in found]
    measured.sort(key=lambda model: -model.images_per_s)
    bench = ModelBench(measured, device.type, "bfloat16" if is_half else "float32", batch_size)
    if plot is not None:
        storage.write_bytes(plot, draw(bench))
    return bench


def find_models(name: str, results: str) -> list[Measured]:
    """The models that a name stands for, not measured yet; see `bench_model`.

    Raises:
        UserError: there is none.
    """
    if Path(name).is_file():
        return [_described(name, name, None)]
    if not runs_of(name, results) and "/" not in name:
        return [_of_timm(name, results)]
    folder = find_run(name, results)
    if not is_study(folder):
        return [_described(name, storage.join(folder, MODEL), _accuracy_of_run(folder))]
    parent, _, last = folder.rpartition("/")
    study, best = Study.open(last, parent), {}
    metric = study.experiment.search.metric
    for trial in study.records(TrialState.COMPLETE):
        accuracy = Accuracy(metric, trial.best, trial.images, trial.choices)
        path = storage.join(study.trial_folder(trial.number), MODEL)
        model = _described(f"{study.name}/{trial.number}", path, accuracy)
        kind = json.dumps([model.model, model.arguments, model.image_size], sort_keys=True)
        if kind not in best or accuracy.value > best[kind].accuracy.value:
            best[kind] = model
    if not best:
        raise UserError(f"{name}: no trial of the study has finished yet, so it has no model")
    return list(best.values())


def _of_timm(name: str, results: str) -> Measured:
    import timm

    from deit_ray.models.student import takes_image_size, unknown_model

    if why := unknown_model(name):
        raise UserError(f"{why}; and there is no such run or study in {results}, and no such file")
    size = timm.get_pretrained_cfg(name).input_size[-1]
    arguments = {"img_size": size} if takes_image_size(name) else {}
    return Measured(name, name, arguments, size)


def _described(name: str, path: str, accuracy: Accuracy | None) -> Measured:
    """The model in a model.safetensors that deit-ray wrote."""
    if not storage.exists(path):
        raise UserError(f"{name}: has no {MODEL}: it has not finished yet")
    if not storage.is_local(path):
        raise UserError(f"{name}: {path}: copy the model to this machine, and name the file")
    from deit_ray.models.weights import read_description

    found = read_description(storage.local_path(path), name)
    if found is None:
        raise UserError(f"{name}: not a model.safetensors that deit-ray wrote; name its timm model instead")
    return Measured(name, found["model"], found["arguments"], found["image_size"], accuracy)


def _accuracy_of_run(folder: str) -> Accuracy | None:
    """The accuracy of a run on the test images, or else on `val`."""
    if not storage.exists(storage.join(folder, RUN)):
        return None
    metrics = json.loads(storage.read_bytes(storage.join(folder, RUN))).get("metrics", {})
    for split in ("test", "val"):
        if f"{split}/top1" in metrics:
            return Accuracy(f"{split}/top1", metrics[f"{split}/top1"], metrics.get(f"{split}/images"))
    return None


def _resized(model: Measured, image_size: int) -> Measured:
    sized = {"img_size": image_size} if "img_size" in model.arguments else {}
    return replace(model, image_size=image_size, arguments=model.arguments | sized)


def _measure(model: Measured, device, is_half: bool, batch_size: int, seconds: float) -> Measured:
    import timm
    import torch

    from deit_ray.models.shapes import count_multiply_adds
    from deit_ray.models.student import has_two_heads

    network = timm.create_model(model.model, **model.arguments).eval().to(device)
    images = torch.randn(batch_size, 3, model.image_size, model.image_size, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def answer() -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=is_half):
            network(images)

    answer()  # the first call chooses kernels and fills caches
    count = max(1, round(seconds / ROUNDS / seconds_of(answer, 1, wait)))
    rounds = [seconds_of(answer, count, wait) for _ in range(ROUNDS)]
    return replace(
        model,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        multiply_adds=count_multiply_adds(model.model, model.arguments, model.image_size),
        images_per_s=batch_size / statistics.median(rounds),
        two_heads=has_two_heads(network),
    )


def draw(bench: ModelBench) -> bytes:
    """The picture of `bench_model`, as the bytes of a .png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = [model for model in bench.models if model.accuracy]
    figure = Figure(figsize=(7, 5) if known else (11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    speed = f"images/s on {bench.device}, {bench.precision}, {bench.batch_size} at once"
    if known:
        axes = figure.subplots()
        for model in known:
            accuracy = model.accuracy
            low, high = accuracy.value, accuracy.value
            if accuracy.images:
                low, high = interval(accuracy.value, accuracy.images, accuracy.choices)
            error = [[accuracy.value - low], [high - accuracy.value]]
            axes.errorbar(model.images_per_s, accuracy.value, error, capsize=3, **_marker(model))
            _label(axes, model, model.images_per_s, high)
        metrics = sorted({model.accuracy.metric for model in known})
        axes.set(xscale="log", xlabel=speed)
        _tick(axes.xaxis)
        axes.set(ylabel=f"{' or '.join(metrics)}, with 95% intervals")
    else:
        panels = zip(figure.subplots(1, 2), ("parameters", "multiply_adds"), strict=True)
        for axes, name in panels:
            for model in bench.models:
                axes.plot(getattr(model, name), model.images_per_s, **_marker(model))
                _label(axes, model, getattr(model, name), model.images_per_s)
            axes.set(xscale="log", yscale="log", xlabel=name.replace("_", "-"), ylabel=speed)
            _tick(axes.xaxis)
            _tick(axes.yaxis)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": PLOTTED_BY})
    return buffer.getvalue()


def _marker(model: Measured) -> dict:
    return {"marker": "o", "color": DISTILLED if model.two_heads else PLAIN}


def _label(axes, model: Measured, x: float, y: float) -> None:
    axes.annotate(model.model, (x, y), xytext=(0, 7), textcoords="offset points", fontsize=7, ha="center")
    axes.margins(0.25)


def _tick(axis) -> None:
    """Numbers such as 2 k on a logarithmic axis, also where it is shorter than a factor of ten."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(EngFormatter())
    axis.set_minor_formatter(NullFormatter())
