"""Shows a prepared data set: images as they are stored, and as the student sees them."""

import io

import cv2
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from deit_ray import storage
from deit_ray.augment.lettering import fit_font
from deit_ray.augment.picture import draw_strengths
from deit_ray.data import crop, shards
from deit_ray.data.blocks import Samples, make_samples
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment
from deit_ray.experiment.load import load_experiment
from deit_ray.terminal.format import counted
from deit_ray.training.step import Batch, Inputs
from deit_ray.trial import assemble

CELL, GAP, LINE, LETTERS = 160, 8, 18, 12  # pixels
FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG"}
FIXED = {  # one worker, no teacher, augmented in the stream
    "distillation.kind": "none",
    "distillation.teacher": None,
    "search.space": {},
    "train.workers": 1,
    "train.device": "cpu",
    "augment.place": "stream",
}
MADE_BY = "deit_ray data show"  # stands in every picture, so that no other file is written over


def show(
    uri: str,
    out: str,
    experiment: str | None = None,
    overrides: dict | None = None,
    samples: int = 8,
    strengths: bool = False,
) -> str:
    """Writes a contact sheet of the first training samples.

    A row shows an image as it is stored, then its views. A view is shown as it enters the student, before
    normalisation: cropped, flipped, augmented, erased and mixed.

    Args:
        uri: URI of a prepared data set.
        out: URI of the picture, .png or .jpg.
        experiment: path of an experiment file; by default all settings are the defaults.
        overrides: dotted keys to replace.
        samples: number of images to show.
        strengths: whether to show, instead of the views, each image's centre crop after the policy at
            augment.strength 0, 0.5, 1, 1.5 and 2.

    Returns:
        One sentence that says what was written.

    Raises:
        UserError: the data set or the experiment cannot be read; or `out` exists, and is no picture of
            this function.
    """
    suffix = out.rpartition(".")[2].lower()
    if suffix not in FORMATS:
        raise UserError(f"--out {out}: must end with one of {', '.join('.' + known for known in FORMATS)}")
    check_ours(out, "--out", MADE_BY)
    sheet, shown = draw_sheet(_load(uri, experiment, overrides or {}), samples, strengths)
    buffer, made_by = io.BytesIO(), PngInfo()
    made_by.add_text("Software", MADE_BY)
    sheet.save(buffer, FORMATS[suffix], pnginfo=made_by, comment=MADE_BY)
    storage.write_bytes(out, buffer.getvalue())
    return f"{out}: {shown}"


def draw_sheet(experiment: Experiment, samples: int, strengths: bool) -> tuple[Image.Image, str]:
    """The contact sheet of an experiment's first training samples, and what it shows; see `show`.

    Raises:
        UserError: the data set cannot be read.
    """
    loaded, uri = experiment.with_overrides(FIXED), experiment.data.uri
    manifest = shards.read_manifest(uri)
    available = shards.row_groups(uri, manifest, "train", loaded.data.holdout).images
    # an epoch has as many samples as the split has images, and every view is a sample
    images = max(1, min(samples, available // loaded.data.views))
    loaded = loaded.with_overrides({"train.batch_size": images * loaded.data.views})
    batch, pixels, targets = _first_batch(loaded, manifest)
    stored = _stored(uri, manifest, batch.ids)
    if strengths:
        crops = _centre_crops(loaded, [image for image, _ in stored.values()])
        sheet = draw_strengths(crops, loaded.augment, loaded.data.mean, loaded.data.std, loaded.seed)
        shown = f"{counted(images, 'image')} at five strengths of augment.policy {loaded.augment.policy}"
    else:
        sheet = _draw(loaded.data.views, manifest.classes, batch, pixels, targets, stored)
        views = f"{counted(loaded.data.views, 'view')} of each as the student sees them"
        shown = f"{counted(images, 'image')} as stored and {views} ({loaded.data.image_size} pixels)"
    return sheet, shown


def check_ours(out: str, option: str, made_by: str) -> None:
    """Refuses a picture that exists and that a command has not made: it may be a person's.

    Args:
        option: the option that names it, for the message.
        made_by: what stands in the command's pictures, such as MADE_BY.

    Raises:
        UserError: it exists, and is another's.
    """
    if not storage.exists(out):
        return
    try:
        with Image.open(io.BytesIO(storage.read_bytes(out))) as image:
            notes = (image.info.get("Software"), image.info.get("comment"))
    except (OSError, SyntaxError):
        notes = ()
    if not {made_by, made_by.encode()} & set(notes):
        command = made_by.removeprefix("deit_ray ")
        raise UserError(f"{option} {out}: exists, and {command} has not made it; name another file")


def _load(uri: str, path: str | None, overrides: dict) -> Experiment:
    """The experiment to show."""
    fixed = FIXED | {"data.uri": uri}
    if path is not None:
        return load_experiment(path, overrides | fixed)
    defaults = {"name": "show", "data": {"uri": uri}, "distillation": {"kind": "none"}}
    return Experiment.model_validate(defaults).with_overrides(overrides | fixed)


def _first_batch(experiment: Experiment, manifest: shards.Manifest) -> tuple[Samples, np.ndarray, np.ndarray]:
    """The samples of the first step, and the images and targets that the student gets.

    The code of the stream and of the step makes them, so the sheet shows exactly the inputs of a run.

    Returns:
        (samples, uint8 pixels [batch, size, size, 3], soft targets [batch, classes]).
    """
    batch_size, cpu = experiment.train.batch_size, torch.device("cpu")
    worklist = assemble.make_worklist(experiment, manifest, storage.absolute(experiment.data.uri), ())
    task = next(worklist.tasks_between(0, 1))
    recipe = assemble.make_recipe(experiment, "cpu")
    samples = next(make_samples(task, recipe, batch_size, 1)).slice(0, batch_size, 0)
    inputs = Inputs(experiment, len(manifest.classes), 0, cpu)
    images, targets, _ = inputs(Batch.of(samples, cpu), 0)
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return samples, pixels, targets.numpy()


def _centre_crops(experiment: Experiment, images: list[np.ndarray]) -> np.ndarray:
    """The centre crops of images, uint8 [images, size, size, 3]."""
    geometry, size = assemble.make_recipe(experiment, "cpu").geometry, experiment.data.image_size
    crops = np.empty((len(images), size, size, 3), np.uint8)
    for image, out in zip(images, crops, strict=True):
        crop.crop_centre(image, geometry, out)
    return crops


def _stored(uri: str, manifest: shards.Manifest, ids: np.ndarray) -> dict[int, tuple[np.ndarray, str]]:
    """The pixels and the name of training images, by id."""
    stored, first = {}, 0
    for shard in manifest.splits["train"]:
        wanted = sorted({int(i) for i in ids if first <= i < first + shard.rows})
        if wanted:
            rows = _read_rows(uri, shard.file, [i - first for i in wanted])
            stored |= dict(zip(wanted, rows, strict=True))
        first += shard.rows
    return stored


def _read_rows(uri: str, file: str, rows: list[int]) -> list[tuple[np.ndarray, str]]:
    """The pixels and the name of some rows of a shard."""
    filesystem, path = storage.open_uri(storage.join(storage.absolute(uri), file))
    with filesystem.open_input_file(path) as opened:
        table = pq.read_table(opened, columns=["image", "name"]).take(rows)
    found = []
    for image, name in zip(table["image"], table["name"], strict=True):
        pixels = crop.decode(image.as_py())
        if pixels is None:
            raise UserError(
                f"{uri}: {name} in {file} cannot be decoded; deit-ray data check {uri} says how to repair it"
            )
        found.append((pixels, name.as_py()))
    return found


def _draw(
    views: int, classes: list[str], batch: Samples, pixels: np.ndarray, targets: np.ndarray, stored: dict
) -> Image.Image:
    """The sheet: in each row an image as it is stored, then its views with their targets."""
    rows = len(batch.ids) // views
    width, height = (1 + views) * (CELL + GAP) + GAP, rows * (CELL + 2 * LINE + GAP) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for k in range(len(batch.ids)):
        row, view = divmod(k, views)
        top = GAP + row * (CELL + 2 * LINE + GAP)
        if view == 0:
            image, name = stored[int(batch.ids[k])]
            _paste(sheet, image, GAP, top)
            size = f"{image.shape[1]}x{image.shape[0]} {name.rpartition('/')[2]}"
            _write(pen, GAP, top, classes[batch.labels[k]], size)
        left = GAP + (1 + view) * (CELL + GAP)
        _paste(sheet, pixels[k], left, top)
        _write(pen, left, top, f"view {batch.views[k]}", _describe(targets[k], classes))
    return sheet


def _describe(targets: np.ndarray, classes: list[str]) -> str:
    """The two largest soft targets of a sample [classes], without those due to label smoothing."""
    largest = [c for c in np.argsort(-targets)[:2] if targets[c] > 1.5 / len(classes)]
    return " + ".join(f"{float(targets[c]):.2f} {classes[c]}" for c in largest)


def _paste(sheet: Image.Image, pixels: np.ndarray, left: int, top: int) -> None:
    """Pastes an image into a cell at the largest size that fits; small images grow by whole pixels."""
    scale = CELL / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    fitted = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    sheet.paste(Image.fromarray(fitted), (left, top))


def _write(pen: ImageDraw.ImageDraw, left: int, top: int, *lines: str) -> None:
    """Writes lines below a cell, each cut to its width."""
    for number, text in enumerate(lines):
        font, text = fit_font(text, LETTERS)
        pen.text((left, top + CELL + number * LINE), _cut(pen, font, text), "black", font)


def _cut(pen: ImageDraw.ImageDraw, font, text: str) -> str:
    """The text, or as much of its beginning as fits into a cell, with an ellipsis."""
    kept, cut = len(text) - 1, text
    while cut and pen.textlength(cut, font) > CELL:
        kept -= 1
        cut = text[:kept] + "…" if kept > 0 else ""
    return cut
