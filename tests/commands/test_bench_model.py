"""`bench model` measures models of timm, of files, of runs and of studies, and draws them."""

import io
import json
import re

import pytest
import torch
from PIL import Image

from deit_ray.commands.bench_model import (
    PLOTTED_BY,
    Accuracy,
    Measured,
    ModelBench,
    bench_model,
    draw,
    find_models,
)
from deit_ray.errors import UserError
from deit_ray.models.shapes import count_multiply_adds
from tests.support.commands import call

SMALL = ["test_vit", "test_resnet"]
QUICK = {"seconds": 0.1, "batch_size": 2}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads of a busy machine wait for one another."""
    torch.set_num_threads(1)


# README_revenge.md of facebookresearch/deit, "GFLOPs"; deit_tiny: arXiv:2012.12877, and timm's own tables
@pytest.mark.parametrize(
    ("model", "size", "billions"),
    [
        ("deit3_small_patch16_224", 224, 4.6),
        ("deit3_small_patch16_224", 384, 15.5),
        ("deit3_base_patch16_224", 224, 17.5),
        ("deit3_base_patch16_224", 384, 55.5),
        ("regnety_160", 224, 16.0),
    ],
)
def test_multiply_adds_are_those_that_papers_publish(model, size, billions):
    arguments = {"img_size": size} if "deit" in model else {}
    counted = count_multiply_adds(model, arguments, size)
    assert counted / 1e9 == pytest.approx(billions, rel=0.01)


def test_models_of_timm_are_measured_fastest_first():
    found = bench_model(SMALL, image_size=64, **QUICK)
    assert sorted(model.name for model in found.models) == sorted(SMALL)
    speeds = [model.images_per_s for model in found.models]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[-1] > 0
    assert all(model.parameters > 1e5 and model.multiply_adds > 1e6 for model in found.models)
    assert (found.device, found.precision, found.batch_size) == ("cpu", "float32", 2)
    of_timm = {model.name: model for name in SMALL for model in find_models(name, "none")}
    for model in found.models:  # timm's are for 160 pixels
        own = of_timm[model.name]
        larger = count_multiply_adds(own.model, own.arguments, own.image_size)
        assert larger == pytest.approx(model.multiply_adds * (160 / 64) ** 2, rel=0.2)


def test_a_run_and_its_file_are_measured_with_their_accuracy(experiment, teacher_file, tmp_path):
    own = experiment("digits_teacher")
    folder = tmp_path / "results" / "digits_teacher-1"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(f"name: digits_teacher\ndata: {{uri: {own.data.uri}}}\n")
    results = str(tmp_path / "results")
    with pytest.raises(
        UserError, match=r"digits_teacher: has no model\.safetensors: it has not finished yet"
    ):
        find_models("digits_teacher", results)
    with open(teacher_file, "rb") as file:
        (folder / "model.safetensors").write_bytes(file.read())
    (folder / "run.json").write_text(json.dumps({"metrics": {"test/top1": 0.98, "test/images": 359}}))
    run, file = bench_model(["digits_teacher", teacher_file], results=results, **QUICK).models
    if run.name != "digits_teacher":
        run, file = file, run
    assert str(run.accuracy) == "test/top1 0.9800 (0.960-0.990)"
    assert file.accuracy is None
    assert (run.model, run.image_size, run.parameters) == (own.student.model, 16, file.parameters)


def test_what_cannot_be_measured_is_one_sentence(tmp_path):
    (tmp_path / "mine.png").write_bytes(b"a picture of mine")
    results = str(tmp_path)
    for arguments, said in (
        (
            {"names": ["deit_tny"]},
            "no model named 'deit_tny'; near: .*; and there is no such run or study in",
        ),
        ({"names": ["study/3"]}, "study: no such run, study or trial"),
        ({"names": ["test_vit"], "image_size": 50}, "test_vit: test_vit .*would never be seen"),
        ({"names": ["test_vit"], "plot": "x.gif"}, r"--plot x\.gif: must end with \.png"),
        (
            {"names": ["test_vit"], "plot": str(tmp_path / "mine.png")},
            "mine.png: exists, and bench model has not made it",
        ),
    ):
        with pytest.raises(UserError, match=said) as error:
            bench_model(**arguments, **QUICK, results=results)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("accuracy", [None, Accuracy("val/top1", 0.8, 500)])
def test_the_picture_is_written_again_and_says_who_made_it(accuracy, tmp_path):
    models = [
        Measured(f"m{i}", f"m{i}", {}, 32, accuracy, 10**i, 10 ** (i + 3), 100.0 / i, i == 1) for i in (1, 2)
    ]
    with Image.open(io.BytesIO(draw(ModelBench(models, "cpu", "float32", 2)))) as image:
        assert image.info["Software"] == PLOTTED_BY
        assert (image.width > 1.5 * image.height) is (accuracy is None)  # two panels without accuracies
        assert len(set(image.convert("RGB").getdata())) > 100
    plot = str(tmp_path / "models.png")
    for _ in range(2):
        bench_model(["test_vit"], image_size=32, plot=plot, **QUICK)


def test_a_study_is_measured_by_the_best_trial_of_each_architecture(finished_study):
    results = str(finished_study.results)
    (model,) = find_models("short", results)  # its trials have one architecture
    assert model.name == "short-1/0"
    assert model.accuracy.metric == "val/top1_ema"
    plot = f"{results}/../models.png"
    found = call(
        "bench", "model", "short", "test_vit", "--results", results, "--seconds", 0.1, "--plot", plot
    )
    assert found.status == 0, found
    assert re.search(r"inference on cpu, float32, 16 images at once", found.out)
    assert re.search(rf"{model.model} +[\d,.]+ +0\.\d\d M +[\d.]+ G +val/top1_ema [\d.]+ \(", found.out), (
        found
    )
    assert re.search(r"test_vit +[\d,.]+ .* -", found.out)
