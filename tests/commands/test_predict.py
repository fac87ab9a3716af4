"""`predict`: folders, images that cannot be read, and the rotation that the model's training images had."""

import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from deit_ray.commands.predict import predict
from deit_ray.data.listing import Unreadable
from deit_ray.errors import UserError
from deit_ray.models.student import save_model
from deit_ray.models.weights import read_description
from deit_ray.results.folders import MODEL
from deit_ray.training.view import EvaluationView
from tests.support.commands import call
from tests.support.pictures import image_file, smooth, turned

CLASSES = ["cat", "dog"]


def write_model(folder, **described) -> str:
    """Writes a model of random weights that sees images of 32 pixels; returns its path."""
    torch.manual_seed(0)
    arguments = {
        "num_classes": 2,
        "img_size": 32,
        "patch_size": 8,
        "depth": 1,
        "embed_dim": 48,
        "num_heads": 3,
    }
    network = timm.create_model("vit_tiny_patch16_224", **arguments)
    network.head.weight.data *= 20  # so that probabilities differ
    description = {
        "model": "vit_tiny_patch16_224",
        "arguments": arguments,
        "classes": CLASSES,
        "image_size": 32,
        "eval_crop": 1.0,
        "mean": [0.5] * 3,
        "std": [0.1] * 3,
        **described,
    }
    save_model(folder / MODEL, network.state_dict(), description)
    return str(folder / MODEL)


@pytest.fixture
def pictures(tmp_path):
    """A folder of two images, a broken one, a deep one, a thin one, and files that are no images."""
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(image_file("JPEG"))
    (folder / "inner" / "b.PNG").write_bytes(image_file("PNG"))
    (folder / "broken.jpg").write_bytes(image_file("JPEG")[:500])
    (folder / "float.tif").write_bytes(image_file("TIFF", smooth()[..., 0] / np.float32(255)))
    (folder / "thin.png").write_bytes(image_file("PNG", smooth(1, 6000)))
    (folder / "wide.png").write_bytes(image_file("PNG", smooth()[..., 0].astype(np.uint16) * 257))
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.jpg").write_bytes(b"x")
    return folder


def test_a_folder_is_read_and_a_bad_image_costs_only_its_own_answer(tmp_path, pictures):
    model = write_model(tmp_path)
    answered = call("predict", model, pictures, tmp_path / "missing.png", pictures / "a.jpg")
    assert answered.status == 1
    answers = re.findall(r"^(\S+): (?:cat|dog) \d+\.\d%, (?:cat|dog) \d+\.\d%$", answered.out, re.MULTILINE)
    names = ["a.jpg", "inner/b.PNG", "thin.png", "wide.png", "a.jpg"]
    assert answers == [str(pictures / name) for name in names]
    problems = [line for line in answered.err.splitlines() if not line.startswith(("warning: ", model))]
    assert problems[0].startswith(f"{pictures}/broken.jpg: damaged: ")
    assert problems[1].startswith(f"{pictures}/float.tif: floating-point pixels, whose range is not declared")
    assert problems[2] == f"{tmp_path}/missing.png: cannot be read: No such file or directory"
    assert (
        f"warning: {pictures}: 1 file is not used (no image that Pillow reads: .txt): notes.txt"
        in answered.err
    )
    assert f"warning: {pictures}: 1 file is not used (hidden): .hidden.jpg" in answered.err
    deep = "1 image has more than 8 bits; its declared range became 0 to 255"
    assert f"warning: {deep}; it is {pictures}/wide.png" in answered.err


@pytest.mark.parametrize(
    ("said", "rotation"),
    [
        ({"exif": False}, "not applied, as to the images that the model was trained on"),
        ({"exif": True}, "applied, as to the images that the model was trained on"),
        ({}, "applied, except to JPEGs, as by the earlier version that made the model"),
    ],
)
def test_what_was_done_to_the_images_is_said_once_with_counts(tmp_path, said, rotation):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(turned("JPEG", 6))
    (folder / "b.png").write_bytes(turned("PNG", 3))
    (folder / "c.png").write_bytes(image_file("PNG", mode="RGBA"))
    (folder / "d").write_bytes(image_file("PNG", mode="LA"))
    (folder / "plain.png").write_bytes(image_file("PNG"))
    answered = call("predict", write_model(tmp_path, **said), folder)
    assert answered.status == 0
    assert len(answered.out.splitlines()) == 5
    assert [line for line in answered.err.splitlines() if line.startswith("warning: ")] == [
        f"warning: 2 images ask for a rotation in EXIF, which was {rotation}; the first is {folder}/a.jpg",
        f"warning: 2 images have transparency, which was dropped; the first is {folder}/c.png",
    ]


def test_good_images_alone_end_with_status_0(tmp_path, pictures):
    assert call("predict", write_model(tmp_path), pictures / "a.jpg", pictures / "inner").status == 0


@pytest.mark.parametrize("paths", [["missing.png"], ["empty"]])
def test_no_image_at_all_is_refused(tmp_path, paths):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no such file|the folder holds no image files, such as"):
        predict(write_model(tmp_path), [str(tmp_path / path) for path in paths])


def test_an_image_that_pil_has_opened_becomes_the_same_input_as_its_file(tmp_path, pictures):
    files = [
        path for path in pictures.rglob("*.*") if path.name in ("a.jpg", "b.PNG", "thin.png", "wide.png")
    ]
    for number, (format, mode) in enumerate((("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "L"))):
        files.append(tmp_path / f"{number}.{format}")
        files[-1].write_bytes(image_file(format, mode=mode))
    for format in ("JPEG", "PNG"):
        files.append(tmp_path / f"turned.{format}")
        files[-1].write_bytes(turned(format, 6))
    for said in ({"exif": True}, {"exif": False}, {}):
        view_of = EvaluationView(read_description(write_model(tmp_path, **said)))
        for path in files:
            with Image.open(path) as image:
                assert torch.equal(view_of(image), view_of.of_file(path.read_bytes())[0]), (path, said)
    assert view_of(Image.fromarray(smooth())).shape == (3, 32, 32)
    with (
        pytest.raises(Unreadable, match="floating-point pixels"),
        Image.open(pictures / "float.tif") as image,
    ):
        view_of(image)
    content = image_file("JPEG")
    (tmp_path / "half.jpg").write_bytes(content[: 3 * len(content) // 4])
    with pytest.raises(Unreadable, match="damaged"), Image.open(tmp_path / "half.jpg") as image:
        view_of(image)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_images_are_turned_as_the_models_training_images_were(tmp_path, format):
    """A model of an earlier version does not say it: it turned a PNG, but no JPEG."""
    upright = smooth(60, 60)
    stored = np.rot90(upright)  # EXIF's 6 turns it back
    for name, content in (("turned", turned(format, 6, stored)), ("stored", turned(format, 1, stored))):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "upright").write_bytes(turned(format, 1, upright))
    found = {}
    for said in (True, False, None):
        model = write_model(tmp_path, **({} if said is None else {"exif": said}))
        answers = predict(model, [str(tmp_path / name) for name in ("turned", "upright", "stored")])
        turned_p, upright_p, stored_p = (dict(answer.classes)["cat"] for answer in answers)
        assert abs(upright_p - stored_p) > 0.02  # the model sees a difference
        found[said] = abs(turned_p - upright_p) < abs(turned_p - stored_p)
    assert found == {True: True, False: False, None: format == "PNG"}
