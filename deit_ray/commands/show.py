"""A look at a prepared data set: images as they are stored, beside what the student sees of them, or at several strengths."""

import io

import cv2
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw, ImageFont

from deit_ray import storage
from deit_ray.augment.picture import draw_strengths
from deit_ray.data import crop, shards
from deit_ray.data.blocks import Samples, make_samples
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment
from deit_ray.experiment.load import load_experiment
from deit_ray.training.step import Batch, TrainStep
from deit_ray.trial import assemble

CELL = 160  # pixels
GAP, LINE = 8, 18


FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG"}


def show(
    uri: str,
    out: str,
    experiment: str | None = None,
    overrides: dict | None = None,
    samples: int = 8,
    strengths: bool = False,
) -> str:
    """Writes a contact sheet of the first training samples: a row an image, first as it is stored, then every view.

    A view is shown as it enters the student, before normalisation: cropped, flipped, augmented, erased and mixed.

    Args:
        uri: of a prepared data set.
        out: URI of the picture, .png or .jpg.
        experiment: the path of an experiment file; by default an experiment's defaults.
        overrides: dotted keys to replace.
        samples: images to show.
        strengths: shows instead what the policy does to each image's centre crop at augment.strength 0, 0.5, 1, 1.5 and 2.

    Returns:
        What was written, in words.

    Raises:
        UserError: the data set or the experiment cannot be read.
    """
    fixed = {"data.uri": uri, "distillation.kind": "none", "distillation.teacher": None, "search.space": {},
             "train.workers": 1, "train.device": "cpu", "augment.place": "stream"}  # fmt: skip
    if experiment is None:
        loaded = Experiment.model_validate(
            {"name": "show", "data": {"uri": uri}, "distillation": {"kind": "none"}}
        )
        loaded = loaded.with_overrides((overrides or {}) | fixed)
    else:
        loaded = load_experiment(experiment, (overrides or {}) | fixed)
    suffix = out.rpartition(".")[2].lower()
    if suffix not in FORMATS:
        raise UserError(f"--out {out}: must end with one of {', '.join('.' + known for known in FORMATS)}")
    manifest = shards.read_manifest(uri)
    found = shards.row_groups(uri, manifest, "train", loaded.data.holdout).images
    images = max(
        1, min(samples, found // loaded.data.views)
    )  # an epoch has as many samples as images, views counted
    loaded = loaded.with_overrides({"train.batch_size": images * loaded.data.views})
    batch, seen, targets = _first_batch(loaded, manifest)
    stored = _stored(uri, manifest, batch.ids)
    if strengths:
        crops = _centre_crops(loaded, [pixels for pixels, _ in stored.values()])
        sheet = draw_strengths(crops, loaded.augment, loaded.data.mean, loaded.data.std, loaded.seed)
        shown = f"{images} images as augment.policy {loaded.augment.policy} leaves them at five strengths"
    else:
        sheet = _draw(loaded, manifest.classes, batch, seen, targets, stored)
        views = f"{loaded.data.views} view{'s' * (loaded.data.views != 1)} of each as the student sees them"
        shown = f"{images} images as they are stored and {views} ({loaded.data.image_size} pixels)"
    buffer = io.BytesIO()
    sheet.save(buffer, FORMATS[suffix])
    storage.write_bytes(out, buffer.getvalue())
    return f"{out}: {shown}"


def _first_batch(experiment: Experiment, manifest: shards.Manifest) -> tuple[Samples, np.ndarray, np.ndarray]:
    """The samples of the first step, what becomes of them in it (uint8 [batch, size, size, 3]), and their soft targets [batch, classes].

    It is the stream's and the step's own work, so what is shown is what is trained on.
    """
    worklist = assemble.make_worklist(experiment, manifest, storage.absolute(experiment.data.uri), ())
    task = next(iter(worklist.tasks_between(0, 1)))
    samples = next(
        iter(make_samples(task, assemble.make_recipe(experiment, "cpu"), experiment.train.batch_size, 1))
    )
    cpu, nothing = torch.device("cpu"), torch.nn.Linear(1, 1)
    step = TrainStep(
        experiment, nothing, nothing, None, len(manifest.classes), worklist.steps_per_epoch, 0, cpu
    )
    images, targets, _ = step.inputs(Batch.of(samples.slice(0, experiment.train.batch_size, 0), cpu), 0)
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return samples.slice(0, experiment.train.batch_size, 0), pixels, targets.numpy()


def _centre_crops(experiment: Experiment, images: list[np.ndarray]) -> np.ndarray:
    """uint8 [images, size, size, 3]."""
    geometry, size = assemble.make_recipe(experiment, "cpu").geometry, experiment.data.image_size
    crops = np.empty((len(images), size, size, 3), np.uint8)
    for image, out in zip(images, crops, strict=True):
        crop.crop_centre(image, geometry, out)
    return crops


def _stored(uri: str, manifest: shards.Manifest, ids: np.ndarray) -> dict[int, tuple[np.ndarray, str]]:
    """The pixels and the name of training images, by id."""
    found, first = {}, 0
    for shard in manifest.splits["train"]:
        inside = sorted({int(i) for i in ids if first <= i < first + shard.rows})
        if inside:
            filesystem, path = storage.open_uri(storage.join(storage.absolute(uri), shard.file))
            with filesystem.open_input_file(path) as file:
                table = pq.read_table(file, columns=["image", "name"]).take([i - first for i in inside])
            for i, image, name in zip(inside, table["image"], table["name"], strict=True):
                pixels = crop.decode(image.as_py())
                if pixels is None:
                    raise UserError(
                        f"{uri}: {name} in {shard.file} cannot be decoded; deit-ray data check {uri} says how to repair"
                    )
                found[i] = pixels, name.as_py()
        first += shard.rows
    return found


def _draw(
    experiment, classes: list[str], batch: Samples, seen: np.ndarray, targets: np.ndarray, stored: dict
) -> Image.Image:
    views, font = experiment.data.views, ImageFont.load_default(12)
    rows = len(batch.ids) // views
    sheet = Image.new(
        "RGB", ((1 + views) * (CELL + GAP) + GAP, rows * (CELL + 2 * LINE + GAP) + GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for k in range(len(batch.ids)):
        row, view = divmod(k, views)
        top = GAP + row * (CELL + 2 * LINE + GAP)
        if view == 0:
            pixels, name = stored[int(batch.ids[k])]
            _paste(sheet, pixels, GAP, top)
            height, width = pixels.shape[:2]
            _write(
                draw,
                font,
                GAP,
                top,
                f"{classes[batch.labels[k]]}",
                f"{width}x{height} {name.rpartition('/')[2]}",
            )
        left = GAP + (1 + view) * (CELL + GAP)
        _paste(sheet, seen[k], left, top)
        parts = [
            (float(targets[k][c]), classes[c])
            for c in np.argsort(-targets[k])[:2]
            if targets[k][c] > 1.5 / len(classes)
        ]
        _write(
            draw,
            font,
            left,
            top,
            f"view {batch.views[k]}",
            " + ".join(f"{share:.2f} {name}" for share, name in parts),
        )
    return sheet


def _paste(sheet: Image.Image, pixels: np.ndarray, left: int, top: int) -> None:
    """Into a cell, at the largest size that fits; small images grow by whole pixels, so that these can be seen."""
    scale = CELL / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    fitted = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    sheet.paste(Image.fromarray(fitted), (left, top))


def _write(draw: ImageDraw.ImageDraw, font, left: int, top: int, *lines: str) -> None:
    for number, text in enumerate(lines):
        while text and draw.textlength(text, font) > CELL:
            text = text[:-2] + "…" if not text.endswith("…") else text[:-2] + "…" if len(text) > 2 else ""
        draw.text((left, top + CELL + number * LINE), text, "black", font)
