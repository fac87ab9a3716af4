"""Writes what a model answered on a split: accuracy by class, confusions, mistakes, and a picture."""

import csv
import io

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from deit_ray import storage
from deit_ray.commands.show import CELL, GAP, LINE, _paste, _write
from deit_ray.data import crop, shards
from deit_ray.errors import UserError
from deit_ray.results.folders import MODEL
from deit_ray.trial.answers import Answers
from deit_ray.trial.evaluation import Evaluation

DRAWN = 24  # mistakes in the picture
ACROSS = 6  # of them in a row


def save_answers(found: Evaluation, folder: str | None = None) -> list[str]:
    """Writes the answers of an evaluation.

    The files are classes.csv (accuracy by class), confusion.csv (a row for each label, a column for each
    answer), mistakes.csv (every wrong answer, the worst first) and mistakes.png (the worst mistakes).

    Args:
        found: what `deit_ray.evaluate` returned.
        folder: URI of the folder to write; by default `folder_for`.

    Returns:
        The files' URIs. There is no picture without a mistake.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = folder or folder_for(found)
    names = read_names(found.data, found.manifest, found.split, found.answers.ids)
    files = {
        "classes.csv": _classes_csv(found.answers),
        "confusion.csv": _confusion_csv(found.answers),
        "mistakes.csv": _mistakes_csv(found.answers, names),
    }
    if len(found.answers.mistakes()):
        files["mistakes.png"] = _draw_mistakes(found, names)
    written = []
    for name, content in files.items():
        uri = storage.join(folder, name)
        try:
            storage.write_bytes(uri, content)
        except OSError as error:
            raise UserError(f"{uri}: cannot be written: {error.strerror or error}") from None
        written.append(uri)
    return written


def folder_for(found: Evaluation) -> str:
    """The folder of an evaluation, next to its model: evaluation/DATA-SPLIT in the folder of a run or study.

    Beside a model of another name, such as x.safetensors, it is x-evaluation/DATA-SPLIT. For a model in
    MLflow, such as models:/STUDY@best, it is STUDY@best-evaluation/DATA-SPLIT in the results.
    """
    parent, _, file = storage.absolute(found.beside).rpartition("/")
    data = storage.absolute(found.data).rstrip("/").rpartition("/")[2]
    kind = "evaluation" if file == MODEL else f"{file.rpartition('.')[0]}-evaluation"
    return storage.join(parent, kind, f"{data}-{found.split}")


def read_names(data: str, manifest: shards.Manifest, split: str, ids: np.ndarray) -> list[str]:
    """The names of images, by their ids: where each came from."""
    names, wanted = {}, set(ids.tolist())
    for first, shard in _shards_of(manifest, split):
        rows = [i for i in range(first, first + shard.rows) if i in wanted]
        if rows:
            column = _read(data, shard.file, ["name"])["name"].to_pylist()
            names |= {i: column[i - first] for i in rows}
    return [names[i] for i in ids.tolist()]


def _shards_of(manifest: shards.Manifest, split: str) -> list[tuple[int, shards.Shard]]:
    """(first image id, shard) of each shard of a split; `val` is in the shards of `train`."""
    found, first = [], 0
    for shard in manifest.splits["test" if split == "test" else "train"]:
        found.append((first, shard))
        first += shard.rows
    return found


def _read(data: str, file: str, columns: list[str]):
    filesystem, path = storage.open_uri(storage.join(storage.absolute(data), file))
    with filesystem.open_input_file(path) as opened:
        return pq.read_table(opened, columns=columns)


def _classes_csv(answers: Answers) -> bytes:
    header = ["class", "images", "right", "top1", "low", "high", "most_taken_for", "times"]
    rows = [
        [
            found.name,
            found.images,
            found.right,
            f"{found.top1:.6f}" if found.images else "",
            *(f"{end:.6f}" for end in found.interval),
            *(found.taken_for or ("", 0)),
        ]
        for found in answers.by_class()
    ]
    return _csv(header, rows)


def _confusion_csv(answers: Answers) -> bytes:
    rows = zip(answers.classes, answers.confusion.tolist(), strict=True)
    return _csv(["label \\ answer", *answers.classes], ([name, *counts] for name, counts in rows))


def _mistakes_csv(answers: Answers, names: list[str]) -> bytes:
    header = ["id", "name", "label", "answer", "probability", "probability_of_label"]
    classes = answers.classes
    rows = (
        [
            int(answers.ids[i]),
            names[i],
            classes[answers.labels[i]],
            classes[answers.answers[i]],
            f"{answers.probabilities[i]:.6f}",
            f"{answers.of_labels[i]:.6f}",
        ]
        for i in answers.mistakes()
    )
    return _csv(header, rows)


def _csv(header: list, rows) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode(errors="replace")


def _draw_mistakes(found: Evaluation, names: list[str]) -> bytes:
    """A PNG of the worst mistakes, each with its label, the answer and the answer's probability."""
    answers, worst = found.answers, found.answers.mistakes()[:DRAWN].tolist()
    pixels = _read_images(found, [int(answers.ids[i]) for i in worst])
    rows, across = -(-len(worst) // ACROSS), min(ACROSS, len(worst))
    sheet = Image.new("RGB", (across * (CELL + GAP) + GAP, rows * (CELL + 3 * LINE + GAP) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for place, i in enumerate(worst):
        row, column = divmod(place, across)
        left, top = GAP + column * (CELL + GAP), GAP + row * (CELL + 3 * LINE + GAP)
        _paste(sheet, pixels[int(answers.ids[i])], left, top)
        label, answer = (answers.classes[k] for k in (answers.labels[i], answers.answers[i]))
        said = f"answer: {answer} {answers.probabilities[i]:.2f}"
        _write(pen, left, top, f"label: {label}", said, names[i].rpartition("/")[2])
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _read_images(found: Evaluation, ids: list[int]) -> dict[int, np.ndarray]:
    """The pixels of images, uint8 [height, width, 3], by id."""
    pixels = {}
    for first, shard in _shards_of(found.manifest, found.split):
        if here := [i for i in ids if first <= i < first + shard.rows]:
            column = _read(found.data, shard.file, ["image"])["image"]
            pixels |= {i: crop.decode(column[i - first].as_py()) for i in here}
    return pixels
