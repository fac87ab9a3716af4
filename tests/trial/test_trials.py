"""Trials on a real Ray Train: evaluation, resume, repetition and distillation."""

import io
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import cv2
import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import deit_ray
from deit_ray.commands.predict import evaluate, predict
from deit_ray.data import shards
from deit_ray.data.damage import BAD_IMAGES, read_bad
from deit_ray.data.shards import read_manifest
from deit_ray.errors import UserError
from deit_ray.experiment.load import load_experiment
from deit_ray.results.journal import iterate_points
from deit_ray.trial import launch, run
from deit_ray.trial.assemble import make_trial
from deit_ray.trial.resolve import resolve
from tests.conftest import EXPERIMENTS, SMALL_STEPS
from tests.support.commands import call
from tests.support.data import write_colours, write_tints
from tests.support.training import CONVNET, train_locally

SHORT = {"train.epochs": 3, "optim.warmup_epochs": 1}


def journal(folder: str) -> dict:
    return {(p.name, p.step): p.value for p in iterate_points(f"{folder}/journal")}


def measured(folder: str) -> dict:
    """The journal's points, without those that depend on the clock."""
    return {
        key: value
        for key, value in journal(folder).items()
        if not key[0].startswith(("perf/", "cost/", "system/"))
    }


def test_every_image_is_counted_once_by_three_workers(ray_cluster, small, tmp_path):
    # 361 test images, 3 workers, batches of 48: 361 = 7 x 48 + 25, so the last batch is padded
    uri = str(tmp_path / "tints")
    write_tints(uri, {"train": 200, "test": 361})
    keys = {
        "data.uri": uri,
        "train.workers": 3,
        "train.batch_size": 48,
        "train.epochs": 8,
        "train.eval_every": 8,
        "optim.lr": 5e-3,
        "student.model": "test_vit",  # without the batch statistics that each worker has of its own
    }
    trained = run.train(small(**CONVNET | keys))
    assert trained.metrics["test/images"] == 361

    model = timm.create_model("test_vit", num_classes=3, img_size=16).eval()
    model.load_state_dict(load_file(f"{trained.folder}/model.safetensors"))
    rows = pq.read_table(f"{uri}/test-00000.parquet").to_pylist()
    views = np.stack([evaluation_view(row["image"]) for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    with torch.no_grad():
        logits = model((torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5)
    top1 = float((logits.argmax(1) == labels).double().mean())
    found = evaluate(f"{trained.folder}/model.safetensors", uri)
    assert found["test/images"] == 361
    assert found["test/top1"] == pytest.approx(top1, abs=1e-9)
    assert found["test/loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-6)
    # after a single evaluation, the kept model is the one that the run has evaluated
    assert trained.metrics["test/top1"] == pytest.approx(top1, abs=1e-9)
    assert len(logits.argmax(1).unique()) > 1  # it does not give all images the same class


def evaluation_view(jpeg: bytes) -> np.ndarray:
    """The evaluation view of an image of 20 rows and 20 to 22 columns, uint8 [16, 16, 3].

    The image is filtered along each axis with three taps (s, 1 - 2s, s), s = 0.02 + 0.22 (shrink - 1). Then
    OpenCV's bicubic interpolation makes the short side 16 / data.eval_crop = 16 / 1.0 pixels, and the centre
    is cut. Every axis here shrinks by 20 / 16 = 1.25 to 21 / 16 = 1.31: above 1.1, from which the filter is
    used, and below 2.5, from which the image is averaged first.
    """
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
    height, width = image.shape[:2]
    new_width = 16 * width // 20
    along_y, along_x = (
        np.array([s, 1 - 2 * s, s])
        for s in (0.02 + 0.22 * (height / 16 - 1), 0.02 + 0.22 * (width / new_width - 1))
    )
    smooth = cv2.sepFilter2D(image, -1, along_x, along_y, borderType=cv2.BORDER_REPLICATE)
    resized = cv2.resize(smooth, (new_width, 16), interpolation=cv2.INTER_CUBIC)
    left = round((new_width - 16) / 2)
    return resized[:, left : left + 16]


def test_images_that_cannot_be_decoded_are_named_and_too_many_of_them_end_the_trial(
    ray_cluster, small, server, tmp_path
):
    uri, jpeg = str(tmp_path / "damaged"), cv2.imencode(".jpg", np.zeros((20, 20, 3), np.uint8))[1].tobytes()
    rows = [(b"broken" if i == 70 else jpeg, i % 3, f"image {i}") for i in range(200)]
    splits, counts = zip(*(shards.write_split(uri, split, rows) for split in ("train", "test")), strict=True)
    names = ("train", "test")
    shards.write_manifest(
        uri, ["a", "b", "c"], dict(zip(names, splits, strict=True)), dict(zip(names, counts, strict=True)), {}
    )
    # 180 training images and 20 held out, in batches of 90: two steps an epoch
    keys = {"data.uri": uri, "data.holdout": 0.1, "train.batch_size": 90, "data.max_bad": 1.0}
    trained = run.train(small(**CONVNET | keys))
    assert read_bad(trained.folder) == [("test", 70, "image 70"), ("train", 70, "image 70")]
    assert trained.metrics["test/images"] == 199
    assert journal(trained.folder)["data/bad_images_total", 4] == 2
    client = mlflow.MlflowClient(server.uri)
    run_id = json.loads(Path(f"{trained.folder}/tracking.json").read_text())["run_id"]
    assert BAD_IMAGES in [file.path for file in client.list_artifacts(run_id)]

    message = r"1 of 180 images could not be decoded, such as train image 70 \(image 70\)"
    with pytest.raises(UserError, match=message):
        run.train(small(**CONVNET | keys | {"data.max_bad": 0.001}))


def test_at_each_evaluation_all_of_a_workers_time_has_a_name(finished_run):
    points = journal(str(finished_run.folder))
    spent = [
        sum(v for (name, s), v in points.items() if name.endswith("_frac") and s == step)
        for step in range(SMALL_STEPS, 4 * SMALL_STEPS + 1, SMALL_STEPS)
    ]
    assert spent == pytest.approx([1] * 4, abs=1e-9)


def die_once(step: int, flag: Path, worker: str, config: dict) -> None:
    """The loop of each worker: trains, but the process dies the first time it reaches an optimizer step."""
    from deit_ray.training.step import TrainStep
    from deit_ray.trial.assemble import run_worker

    call = TrainStep.__call__

    def dies(self, batch, number):
        if number == step and not flag.exists():
            flag.touch()
            os._exit(1)
        return call(self, batch, number)

    TrainStep.__call__ = dies
    run_worker(worker, config)


def test_resumed_run_equals_uninterrupted_run(ray_cluster, finished_run, tmp_path):
    exp = load_experiment(finished_run.folder / "experiment.yaml")
    assert exp.student.drop_path > 0  # the model's random state is resumed too
    make = partial(make_trial, exp, "cpu", launch.share(resolve(exp)), ("val", "test"))
    dying = partial(die_once, SMALL_STEPS + 2, tmp_path / "died")  # after the checkpoint of the first epoch
    resumed = str(tmp_path / "resumed")
    launch.run_trial(partial(make, loop=dying), resumed, lambda metrics: None)
    assert (tmp_path / "died").exists()
    whole = measured(str(finished_run.folder))
    assert len(whole) > exp.train.epochs * SMALL_STEPS * 3
    assert measured(resumed) == whole


def test_two_workers_train_and_count_the_same_images(ray_cluster, experiment, teacher_file):
    keys = {"distillation.teacher": {"weights": teacher_file}, "train.workers": 2, "data.views": 3}
    trained = run.train(experiment("digits_student", SHORT | keys))
    assert trained.metrics["test/images"] == 359
    assert trained.metrics["val/images"] == 144
    assert np.isfinite(trained.metrics["val/loss"])


def test_compiled_workers_say_so_and_write_the_same_files(ray_cluster, compiler, small, finished_run):
    trained = run.train(small(**{"train.compile": "always", "train.workers": 2}))
    assert trained.metrics["perf/compiled"] == 1
    assert "perf/compiled" not in {name for name, _ in journal(str(finished_run.folder))}
    names = [
        set(load_file(f"{folder}/model.safetensors")) for folder in (trained.folder, finished_run.folder)
    ]
    assert names[0] == names[1]


@pytest.fixture(scope="module")
def scrambled(digits, tmp_path_factory) -> str:
    """The digits with random labels in `train`; those of `test` are right."""
    folder = tmp_path_factory.mktemp("scrambled")
    manifest = read_manifest(digits)
    table = pq.read_table(f"{digits}/train-00000.parquet").to_pylist()
    labels = np.random.default_rng(0).integers(0, 10, len(table))
    rows = ((row["image"], int(label), row["name"]) for row, label in zip(table, labels, strict=True))
    splits, counts = dict(manifest.splits), dict(manifest.class_counts)
    splits["train"], counts["train"] = shards.write_split(str(folder), "train", rows)
    shutil.copy(f"{digits}/test-00000.parquet", folder)
    shards.write_manifest(str(folder), manifest.classes, splits, counts, {})
    return str(folder)


def test_distillation_is_alive(ray_cluster, experiment, scrambled, teacher_file):
    """Nothing can be learnt from scrambled labels: what the student has learnt comes from its teacher."""

    def keys(weight: float, epochs: int) -> dict:
        return {
            "data.uri": scrambled,
            "data.holdout": 0.0,
            "distillation.teacher": {"weights": teacher_file},
            "distillation.weight": weight,
            "augment.strength": 0.0,
            "train.epochs": epochs,
            "train.eval_every": epochs,
        }

    assert run.train(experiment("digits_student", keys(1.0, 25))).metrics["test/top1_dist"] >= 0.85
    without = train_locally(experiment("digits_student", keys(0.0, 12)))  # the same step, without Ray
    assert without.metrics["test/top1_dist"] < 0.25


@pytest.fixture
def own_images(tmp_path) -> Path:
    """A folder of two uneven classes that a small model can tell apart: light and dark noise."""
    for label, centre, count in (("dark", 60, 40), ("light", 190, 20)):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).normal(centre, 40, (48, 64, 3)).clip(0, 255).astype(np.uint8)
            cv2.imwrite(str(tmp_path / "pets" / label / f"{i}.png"), pixels)
    return tmp_path / "pets"


def test_own_images_go_from_teacher_to_study(ray_cluster, own_images, tmp_path, monkeypatch):
    """Follows the README's steps."""
    monkeypatch.chdir(tmp_path)
    deit_ray.prepare(str(own_images), "data/own")
    quick = {"train.epochs": 2, "optim.warmup_epochs": 1, "train.batch_size": 16}
    teacher = run.train(deit_ray.load_experiment(EXPERIMENTS / "own_images_teacher.yaml", quick))
    assert teacher.metrics["test/images"] == 12
    assert teacher.largest["test"] == pytest.approx(2 / 3)
    assert 0 <= teacher.metrics["test/top1_balanced"] <= 1  # 40 images of one class, 20 of the other
    student = run.train(
        deit_ray.load_experiment(
            EXPERIMENTS / "own_images_student.yaml", quick | {"student.width": 48, "student.depth": 2}
        )
    )
    assert "test/top5" not in student.metrics  # with two classes there is no top 5
    search = quick | {"student.width": 48, "student.depth": 2, "search.trials": 1, "search.grace_epochs": 1}
    study = deit_ray.tune(deit_ray.load_experiment(EXPERIMENTS / "own_images_search.yaml", search))
    assert len(study.leaderboard()) == 1
    answer = predict(study.name, [str(own_images / "light" / "0.png")])
    assert {name for name, _ in answer[0].classes} == {"dark", "light"}
    assert sum(p for _, p in answer[0].classes) == pytest.approx(1)


def test_a_failed_run_says_why_in_one_message(ray_cluster, small_file, tmp_path):
    path = small_file(**CONVNET | {"optim.lr": 1e30, "optim.warmup_epochs": 0})
    failed = call("train", path)
    assert failed.status == 1
    reason = r"the loss is (nan|inf) at step \d+"
    assert re.search(rf"^error: short-1: the training failed: {reason}", failed.err, re.M), failed.err
    assert "Traceback" not in failed.err


def test_a_model_of_other_classes_is_not_evaluated(ray_cluster, tints_teacher, tmp_path):
    write_colours(str(tmp_path / "noise"), {"train": 20, "test": 20}, classes=10)
    with pytest.raises(UserError, match=r"knows 3 classes, but the data set .* has 10"):
        evaluate(tints_teacher, str(tmp_path / "noise"))


def test_a_file_of_another_origin_is_no_model(tmp_path):
    buffer = io.BytesIO()
    torch.save({}, buffer)
    (tmp_path / "x.pth").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="does not say which model and classes"):
        predict(str(tmp_path / "x.pth"), [])
