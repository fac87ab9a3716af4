"""`data show`: the contact sheet shows the stored images, and the views that a run trains on."""

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from deit_ray.augment.picture import GAP as STRENGTH_GAP
from deit_ray.augment.picture import TITLE
from deit_ray.cli.main import app
from deit_ray.commands.show import CELL, GAP, LINE, show
from deit_ray.data import shards
from deit_ray.data.blocks import make_samples
from deit_ray.data.crop import decode
from deit_ray.errors import UserError
from deit_ray.training.step import Batch
from deit_ray.trial import assemble
from tests.conftest import EXPERIMENTS
from tests.support.commands import call
from tests.support.training import make_step


def test_a_row_for_each_image_and_a_column_for_each_view(digits, tmp_path):
    shown = call("data", "show", digits, "--out", tmp_path / "sheet.png", "--samples", 5)
    assert shown.status == 0, shown
    assert "5 images as stored and 3 views of each as the student sees them (224 pixels)" in shown.out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * (CELL + GAP) + GAP, 5 * (CELL + 2 * LINE + GAP) + GAP)


def test_the_views_are_those_of_the_first_step(experiment, digits, tmp_path):
    overrides = ["data.views=2", "augment.strength=2"]
    arguments = [
        "data",
        "show",
        digits,
        "--out",
        str(tmp_path / "sheet.png"),
        "--samples",
        "4",
        "--experiment",
        str(EXPERIMENTS / "digits_student.yaml"),
    ]
    result = CliRunner().invoke(app, [*arguments, *(word for o in overrides for word in ("--set", o))])
    assert result.exit_code == 0, result.exception
    exp = experiment(
        "digits_student",
        {"distillation.kind": "none", "data.views": 2, "augment.strength": 2, "train.batch_size": 8},
    )
    worklist = assemble.make_worklist(exp, shards.read_manifest(digits), digits, ())
    samples = next(
        iter(make_samples(next(iter(worklist.tasks_between(0, 1))), assemble.make_recipe(exp, "cpu"), 8, 1))
    ).slice(0, 8, 0)
    images, _, _ = make_step(exp).inputs(Batch.of(samples, torch.device("cpu")), 0)
    expected = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels, scale = np.asarray(sheet), CELL // 16
    for k in range(8):
        top, left = GAP + k // 2 * (CELL + 2 * LINE + GAP), GAP + (1 + k % 2) * (CELL + GAP)
        shown = pixels[top + scale // 2 : top + CELL : scale, left + scale // 2 : left + CELL : scale]
        np.testing.assert_array_equal(shown, expected[k])


def test_a_column_for_each_strength_of_which_the_first_changes_nothing(digits, tmp_path):
    arguments = [
        "data",
        "show",
        digits,
        "--strengths",
        "--samples",
        "3",
        "--set",
        "data.eval_crop=1.0",
        "--set",
        "data.image_size=32",
    ]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "strengths.png")])
    assert result.exit_code == 0, result.exception
    with Image.open(tmp_path / "strengths.png") as picture:
        pixels = np.asarray(picture)
    side = 3 * 32  # three times as large, for a title of 90 pixels
    assert pixels.shape == (
        TITLE + 3 * (side + STRENGTH_GAP) - STRENGTH_GAP,
        5 * (side + STRENGTH_GAP) - STRENGTH_GAP,
        3,
    )
    columns = [pixels[TITLE:, k * (side + STRENGTH_GAP) :][:, :side:3] for k in range(5)]
    stored = pq.read_table(f"{digits}/train-00000.parquet")["image"]
    known = [
        cv2.resize(decode(image.as_py()), (32, 32), interpolation=cv2.INTER_CUBIC).tobytes()
        for image in stored
    ]
    for row in range(3):
        top = row * (side + STRENGTH_GAP)
        assert columns[0][top : top + side : 3].tobytes() in known
    assert all((columns[k] != columns[0]).any() for k in (2, 3, 4))


def test_a_picture_of_an_unknown_kind_is_refused(digits, tmp_path):
    with pytest.raises(UserError, match=r"--out .*x.gif: must end with one of .png, .jpg, .jpeg"):
        show(digits, str(tmp_path / "x.gif"))


@pytest.mark.parametrize("name", ["mine.png", "mine.jpg"])
def test_a_picture_that_another_program_has_made_stays(digits, tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    mine = (tmp_path / name).read_bytes()
    with pytest.raises(UserError, match=f"{name}: exists, and data show has not made it; name another file"):
        show(digits, str(tmp_path / name))
    assert (tmp_path / name).read_bytes() == mine
    keys = {"data.image_size": 32, "data.views": 1}
    for _ in range(2):  # the second call writes over the first one's picture
        show(digits, str(tmp_path / f"ours-{name}"), overrides=keys, samples=1)
