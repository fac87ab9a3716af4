"""`evaluate` says what a model answered: accuracy by class, confusions, and its worst mistakes, as files."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from deit_ray.cli.finished import metrics_line
from deit_ray.cli.views import show_evaluation
from deit_ray.commands.mistakes import folder_for, save_answers
from deit_ray.data import shards
from deit_ray.errors import UserError
from deit_ray.trial.answers import Answers
from deit_ray.trial.evaluation import Evaluation, Origin
from tests.support.commands import call
from tests.support.data import TINTS, write_colours

IMAGES = 30
# of ten images of each class: all of a right, of b two taken for a, of c all but one taken for b
ANSWERS = [0] * 10 + [1] * 8 + [0] * 2 + [1] * 9 + [2]


def evaluation(data: Path, model: Path) -> Evaluation:
    """An evaluation of the test images of a data set whose labels count 0, 1, 2, 0, ..."""
    manifest = write_colours(str(data), {"train": 4, "test": IMAGES})
    ids = np.arange(IMAGES)
    labels, answers = ids % 3, np.empty(IMAGES, np.int64)
    for label in range(3):
        answers[labels == label] = ANSWERS[10 * label : 10 * (label + 1)]
    of_labels = np.where(labels == answers, 0.9, 0.3 - ids / 1000).astype(np.float32)
    probabilities = np.where(labels == answers, 0.9, 0.6).astype(np.float32)
    arrays = {"id": ids, "label": labels, "answer": answers, "probability": probabilities}
    parts = [
        {name: array[rank::2] for name, array in (arrays | {"of_label": of_labels}).items()}
        for rank in (1, 0)
    ]
    found = Answers.of(manifest.classes, parts)
    top1 = float((labels == answers).mean())
    metrics = {"test/top1": top1, "test/images": float(IMAGES)}
    return Evaluation(metrics, Origin(str(model), str(data), "test", manifest), found)


def rows_of(path: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(Path(path).read_text())))


def test_answers_are_counted_by_class_over_all_workers(tmp_path):
    answers = evaluation(tmp_path / "data", tmp_path / "x.safetensors").answers
    assert answers.ids.tolist() == list(range(IMAGES))
    assert answers.confusion.tolist() == [[10, 0, 0], [2, 8, 0], [0, 9, 1]]
    found = answers.by_class()
    assert [(c.name, c.images, c.right, c.taken_for) for c in found] == [
        ("a", 10, 10, None),
        ("b", 10, 8, ("a", 2)),
        ("c", 10, 1, ("b", 9)),
    ]
    worst = answers.mistakes()
    assert len(worst) == 11
    assert answers.of_labels[worst].tolist() == sorted(answers.of_labels[worst])


def test_the_files_hold_every_class_every_confusion_and_every_mistake(tmp_path):
    found = evaluation(tmp_path / "data", tmp_path / "run-1" / "model.safetensors")
    files = save_answers(found)
    folder = tmp_path / "run-1" / "evaluation" / "data-test"
    assert files == [
        str(folder / name) for name in ("classes.csv", "confusion.csv", "mistakes.csv", "mistakes.png")
    ]
    classes = rows_of(files[0])
    assert [(row["class"], row["right"], row["most_taken_for"]) for row in classes] == [
        ("a", "10", ""),
        ("b", "8", "a"),
        ("c", "1", "b"),
    ]
    assert [list(row.values()) for row in rows_of(files[1])][2] == ["c", "0", "9", "1"]
    mistakes = rows_of(files[2])
    assert len(mistakes) == 11
    # the names are the images' own
    assert all(row["name"] == f"test-{row['id']}" for row in mistakes)
    assert [float(row["probability_of_label"]) for row in mistakes] == sorted(
        float(row["probability_of_label"]) for row in mistakes
    )
    with Image.open(files[3]) as picture:
        assert picture.size[0] > picture.size[1] > 100


def test_a_model_without_mistakes_has_no_picture_and_other_files_get_a_folder_of_their_own(tmp_path):
    found = evaluation(tmp_path / "data", tmp_path / "x.safetensors")
    assert folder_for(found) == str(tmp_path / "x-evaluation" / "data-test")
    found.answers.answers[:] = found.answers.labels
    assert [Path(file).name for file in save_answers(found)] == [
        "classes.csv",
        "confusion.csv",
        "mistakes.csv",
    ]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/classes.csv: cannot be written"):
        save_answers(found, str(tmp_path / "file"))


def test_the_worst_twenty_of_a_thousand_classes_are_shown(tmp_path):
    classes = [f"class {label:03d} of [many]" for label in range(1000)]
    ids = np.arange(5000)
    labels = ids % 1000
    answers = np.where((labels < 50) & (ids < 2000), (labels + 1) % 1000, labels)
    answered = Answers(classes, ids, labels, answers, np.ones(5000, np.float32), np.ones(5000, np.float32))
    manifest = shards.Manifest(classes, {}, {"test": [5] * 1000}, "")
    metrics = {"test/top1": float((labels == answers).mean()), "test/images": 5000.0}
    found = Evaluation(metrics, Origin("x.safetensors", "data", "test", manifest), answered)
    for width in (60, 80, 200):
        console = Console(width=width)
        with console.capture() as capture:
            console.print(show_evaluation(found, []))
        lines = capture.get().splitlines()
        assert sum("of [many]" in line for line in lines) >= 20
        assert len(lines) < 30
        assert "class 000 of [many]" in capture.get()
        assert all(len(line) <= width for line in lines)
    assert "the worst 20 of 1000 classes" in capture.get()


def test_the_command_prints_the_metrics_as_before_and_names_its_files(finished_run, tints, tmp_path):
    copy = finished_run.copy(tmp_path / "results")
    ended = call("evaluate", "whole", "--data", tints, "--results", copy.results)
    assert ended.status == 0, ended
    lines = ended.out.splitlines()
    assert lines[0].split()[::2] == [
        "test/loss", "test/top1", "test/top1_cls", "test/top1_dist", "test/images"
    ]  # fmt: skip
    folder = copy.folder / "evaluation" / "tints-test"
    confusion = [list(map(int, list(row.values())[1:])) for row in rows_of(folder / "confusion.csv")]
    assert np.sum(confusion) == 90
    right = int(np.trace(confusion))
    assert f"test/top1 {right / 90:.4f}  " in lines[0]
    assert len(rows_of(folder / "mistakes.csv")) == 90 - right
    assert all(name in ended.out for name in (*TINTS, "classes.csv", "confusion.csv", "mistakes.csv"))
    assert metrics_line({"test/top1": right / 90}) in lines[0]
