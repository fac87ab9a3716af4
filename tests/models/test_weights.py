"""Files that people take for weights: read safely, or refused in one sentence that names key and file."""

import argparse
import json
import time

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from deit_ray.errors import UserError
from deit_ray.experiment.config import Distillation, Student
from deit_ray.models import student
from deit_ray.models.classes import check_classes
from deit_ray.models.shapes import shape_of
from deit_ray.models.teacher import read_teacher
from deit_ray.models.weights import create_pretrained, load_described, read_weights

RESNET = "test_resnet"
SMALL = {"patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2, "img_size": 8, "num_classes": 3}
DISTILLED, PLAIN = "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"


def plain(tensors: dict) -> dict:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def write_broken(path, kind: str) -> None:
    """Writes a file that holds no weights, or none that can be read."""
    state = plain(timm.create_model(RESNET, num_classes=3).state_dict())
    if kind == "cut":
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "cut pickle":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "numpy scalar":
        torch.save({"model": state, "best": np.float64(0.5)}, path)
    elif kind == "whole model":
        torch.save(timm.create_model(RESNET, num_classes=3), path)
    elif kind == "no tensors":
        torch.save({"epoch": 3}, path)
    elif kind == "list":
        torch.save([torch.ones(2)], path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(kind.encode())


BROKEN = {
    "cut": "cut or damaged",
    "cut pickle": "cut or damaged",
    "numpy scalar": "beside the tensors, which may run code",
    "whole model": "beside the tensors, which may run code",
    "no tensors": "has no tensors",
    "list": "has a list, not weights by name",
    "folder": "is a folder",
    "missing": "no such file",
    "<!DOCTYPE html><html>": "is a web page",
    "version https://git-lfs.github.com/spec/v1": "Git's pointer",
    '{"a": 1}': "is not a file of weights",
    "": "the file is empty",
}


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_holds_no_weights_is_refused_in_one_sentence(tmp_path, kind, suffix):
    path = tmp_path / f"weights.{suffix}"
    write_broken(path, kind)
    teacher = Distillation(teacher={"weights": str(path), "model": RESNET}).teacher
    for key, use in {
        "distillation.teacher.weights": lambda: read_teacher(teacher, str(path), 16, 3),
        "student.init": lambda: student.create_student(
            Student(model=RESNET, init=str(path), drop_path=0.0), 16, 3
        ),
        "MODEL": lambda: load_described(path),
    }.items():
        with pytest.raises(UserError) as error:
            use()
        text = str(error.value)
        assert text.startswith(f"{key}: {path}: ")
        assert BROKEN[kind] in text or (key == "MODEL" and "not a model.safetensors" in text)
        assert "\n" not in text
        assert not any(word in text for word in ("Error", "weights_only", "Traceback", "<class"))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "args": argparse.Namespace(lr=1), "epoch": 3},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"model": {name: 0 * tensor for name, tensor in state.items()}, "model_ema": state},
    ],
)
def test_weights_lie_where_training_scripts_put_them(tmp_path, wrap):
    torch.manual_seed(0)
    state = timm.create_model(RESNET, num_classes=3).state_dict()
    torch.save(wrap(state), tmp_path / "w.bin")
    teacher = Distillation(teacher={"weights": str(tmp_path / "w.bin"), "model": RESNET}).teacher
    found = read_teacher(teacher, teacher.weights, 16, 3).state
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_the_content_decides_not_the_suffix(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "w.pth")
    torch.save({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    assert [list(read_weights(tmp_path / name, "k")) for name in ("w.pth", "w.safetensors")] == [["a"], ["a"]]


@pytest.mark.parametrize(("model", "other"), [(DISTILLED, PLAIN), (PLAIN, DISTILLED)])
def test_a_teachers_weights_with_and_without_the_distillation_token_are_told_apart(tmp_path, model, other):
    path = tmp_path / "w.safetensors"
    save_file(plain(timm.create_model(other, **SMALL).state_dict()), path)
    section = Distillation(teacher={"weights": str(path), "model": model}).teacher
    with pytest.raises(
        UserError, match=r"teacher\.weights: .*dist_token\), which this model (has|lacks); name"
    ):
        read_teacher(section, section.weights, 224, 3)


def test_a_transformer_as_teacher_needs_its_own_size_of_images(tmp_path):
    path = tmp_path / "model.safetensors"
    model = timm.create_model(PLAIN, **SMALL)
    description = {
        "model": PLAIN,
        "arguments": SMALL,
        "classes": list("abc"),
        "mean": [0.5] * 3,
        "std": [1.0] * 3,
    }
    student.save_model(path, model.state_dict(), description)
    teacher = Distillation(teacher={"weights": str(path)}).teacher
    assert read_teacher(teacher, str(path), 8, 3).classes == list("abc")
    with pytest.raises(UserError, match=r"takes images of 8 pixels only, but data\.image_size is 16; set"):
        read_teacher(teacher, str(path), 16, 3)


@pytest.mark.parametrize(
    ("name", "arguments", "size", "batch", "why"),
    [
        (PLAIN, SMALL, 8, 2, None),
        (PLAIN, SMALL | {"img_size": 10}, 10, 2, "last 2 rows and columns would never be seen; .* 8 or 12"),
        (
            PLAIN,
            SMALL | {"embed_dim": 13},
            8,
            2,
            r"student\.width 13 is not divisible by student\.heads \(2\)",
        ),
        (
            PLAIN,
            {"embed_dim": 55, "img_size": 8, "patch_size": 4},
            8,
            2,
            "dim should be divisible by num_heads",
        ),
        (PLAIN, SMALL | {"img_size": 12}, 8, 2, "cannot take images of 8x8 pixels"),
        (RESNET, {"patch_size": 4}, 32, 2, r"takes no student\.patch_size"),
        (RESNET, {"num_classes": 3}, 16, 1, "cannot take images of 16x16 pixels, 1 at a time"),
        ("vgg11", {"num_classes": 3}, 16, 2, "cannot take images of 16x16"),
        ("resnet999", {}, 16, 2, "timm has no model named 'resnet999'; near: "),
        ("vgg11", {"num_classes": 3}, 32, 2, None),
    ],
)
def test_what_a_model_cannot_do_is_known_without_building_it(name, arguments, size, batch, why):
    import re

    found = shape_of(name, arguments, size, batch, trains=True).refusal
    assert found is None if why is None else re.search(why, found), found


def test_class_names_are_compared_by_place():
    names = ["cat", "dog", "owl"]
    assert check_classes(names, names, "m") == []
    with pytest.raises(
        UserError, match=r"m: .*in another order: class 0 is dog, in the data set cat, class 1 is cat"
    ):
        check_classes(["dog", "cat", "owl"], names, "m")
    with pytest.raises(
        UserError, match=r"other classes than the data set has: class 2 is emu, in the data set owl"
    ):
        check_classes(["cat", "dog", "emu"], names, "m")
    with pytest.raises(UserError, match="in another order"):  # sorted as text, and as numbers
        check_classes(["0", "1", "10", *"23456789"], [str(n) for n in range(11)], "m")
    assert "no class names" in check_classes(None, names, "m")[0]
    (note,) = check_classes(["0", "1", "2"], names, "m")
    assert "only their count is compared, and not their order: class 0 is 0, in the data set cat, " in note
    for known in (["0", "1", "two"], ["1", "2", "3"]):  # some of the numbers are names
        with pytest.raises(UserError, match=f"class 2 is {known[2]}, in the data set 2|class 0 is 1"):
            check_classes(known, ["0", "1", "2"], "m")


def test_pretrained_weights_without_a_network_are_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr("deit_ray.models.weights.constants.ENDPOINT", "http://127.0.0.1:1")
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        create_pretrained("test_vit", {}, "student.init")
    assert time.monotonic() - began < 10
    assert "http://127.0.0.1:1 cannot be reached (Connection refused)" in str(error.value)
    assert "download http://127.0.0.1:1/timm/test_vit.r160_in1k, and name the file in student.init" in str(
        error.value
    )
    monkeypatch.setattr("timm.get_pretrained_cfg", lambda name: timm.models.PretrainedCfg())
    with pytest.raises(UserError, match="timm has no pretrained weights of deit_tiny_nothing"):
        create_pretrained("deit_tiny_nothing", {}, "student.init")


def test_a_description_that_lacks_something_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"deit_ray": json.dumps({"model": PLAIN})})
    with pytest.raises(UserError, match=r"model\.safetensors: its description has no arguments, classes"):
        load_described(path)
