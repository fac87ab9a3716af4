"""Strength, Three-Augment, colour jitter and own policies, compared with timm, torchvision and the docs."""

import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import timm.data.auto_augment as timms
import torch
from PIL import Image, ImageEnhance, ImageFilter
from scipy.stats import chisquare, ks_2samp
from timm.data.transforms_factory import transforms_imagenet_train

from deit_ray.augment import jitter, table, three_augment
from deit_ray.augment.levels import Levels
from deit_ray.augment.picture import draw_strengths
from deit_ray.augment.policy import Draws, Photometric, find_policy
from deit_ray.errors import UserError
from deit_ray.experiment.config import Augment
from deit_ray.experiment.load import load_experiment
from tests.augment.test_randaugment import CANVAS, KERNELS, MEAN, by_cv2
from tests.support.photographs import SOURCES, photographs

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "augmentation.md").read_text()


def test_every_argument_at_every_strength_is_as_documented():
    header, rows = table_of("At strength")
    assert header == ["0", "0.5", "1", "1.5", "2"]
    for strength, column in zip(header, zip(*rows.values(), strict=True), strict=True):
        forced = Levels.of(Augment(strength=float(strength), force_color_jitter=True))
        for key, documented in zip(rows, column, strict=True):
            assert getattr(
                forced, key.removeprefix("augment.").removeprefix("randaugment.")
            ) == pytest.approx(float(documented)), key


def table_of(first: str) -> tuple[list[str], dict[str, list[str]]]:
    """The header and the rows, by first cell, of the documented table whose header begins with `first`."""
    lines = DOC[DOC.index(f"| {first}") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip().strip("`") for cell in line.strip("| ").split("|")] for line in lines]
    return cells[0][1:], {row[0]: row[1:] for row in cells[2:]}


def test_strength_is_continuous():
    def applied(strength):  # operations an image gets on average
        levels = Levels.of(Augment(strength=strength))
        return levels.p * levels.num_ops

    for strength in np.arange(0, 2, 0.05):
        assert 0 < applied(strength + 0.001) - applied(strength) < 0.01
    assert applied(1.0) == 1.0


@pytest.mark.parametrize("policy", ["randaugment", "three_augment", "none"])
def test_strength_0_does_nothing(policy):
    assert (
        Photometric.of(Augment(policy=policy, strength=0.0), MEAN, 0).stages(
            0, np.arange(9), np.arange(9), 32, 32
        )
        == []
    )


@pytest.mark.parametrize(
    ("keys", "theirs"),
    [
        ({"policy": "randaugment"}, {"auto_augment": "rand-m9-mstd0.5-inc1"}),
        (
            {"policy": "randaugment", "force_color_jitter": True},
            {"auto_augment": "rand-m9-mstd0.5-inc1", "force_color_jitter": True},
        ),
        ({"policy": "three_augment"}, {"auto_augment": "3a"}),
        ({"policy": "none"}, {"auto_augment": None}),
    ],
)
def test_colour_jitter_is_used_with_the_same_policies_as_in_timm(keys, theirs):
    _, secondary, _ = timms_transforms(**theirs)
    steps = [type(step).__name__ for step in secondary.transforms]
    assert (Levels.of(Augment(**keys)).color_jitter > 0) == ("ColorJitter" in steps)


def timms_transforms(**keys):
    return transforms_imagenet_train(224, color_jitter=0.3, interpolation="bicubic", separate=True, **keys)


def test_the_fill_is_the_mean_as_timm_rounds_it():
    _, secondary, _ = timms_transforms(auto_augment="rand-m9-mstd0.5-inc1")
    assert (
        Photometric.of(Augment(), MEAN, 0).fill
        == secondary.transforms[0].ops[0].kwargs["fillcolor"]
        == (124, 116, 104)
    )


def one_stage(primitive) -> list[table.Stage]:
    return [table.Stage(np.zeros(1, int), primitive)]


@KERNELS
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("operation", "enhancer"),
    [
        (jitter.brightness, ImageEnhance.Brightness),
        (jitter.contrast, ImageEnhance.Contrast),
        (jitter.saturation, ImageEnhance.Color),
    ],
)
def test_each_jitter_is_pils_within_a_grey_level(operation, enhancer, source, kernel):
    for photo in photographs(source):
        for factor in (0.0, 0.6, 1.0, 1.4, 2.0):
            expected = np.asarray(enhancer(Image.fromarray(photo)).enhance(factor)).astype(int)
            ours = kernel(photo[None], one_stage(operation(np.array([factor]), None, CANVAS)))[0]
            assert np.abs(ours - expected).max() <= 1


def test_jitter_comes_in_every_order_with_factors_around_one():
    factors, order = jitter.draw(Draws(0, 0, np.arange(6000), np.zeros(6000, int)), 0.3)
    assert (
        chisquare(np.unique(order, axis=0, return_counts=True)[1]).pvalue > 0.001
    )  # six orders, as torch.randperm gives
    for column in factors.T:
        assert ks_2samp(column, np.random.default_rng(0).uniform(0.7, 1.3, 6000)).pvalue > 0.001
    assert (
        ks_2samp(factors[:, 0], np.random.default_rng(0).uniform(0.67, 1.33, 6000)).pvalue < 0.001
    )  # the test can fail


@KERNELS
@pytest.mark.parametrize("source", SOURCES)
def test_the_three_operations_of_three_augment_are_timms(source, kernel, monkeypatch):
    solarize, grey, blur = (policy[0] for policy in timms.auto_augment_policy_3a({}))
    for photo in photographs(source):
        image = Image.fromarray(photo)
        nothing = np.zeros(1), np.ones(1), CANVAS
        np.testing.assert_array_equal(
            kernel(photo[None], one_stage(three_augment.solarize_half(*nothing)))[0], solarize(image)
        )
        np.testing.assert_array_equal(
            kernel(photo[None], one_stage(three_augment.grey(*nothing)))[0], grey(image)
        )
        for sigma in (0.1, 0.7, 1.3, 2.0):
            monkeypatch.setattr(timms.random, "uniform", lambda low, high, sigma=sigma: sigma)
            amount = np.array([(sigma - 0.1) / 1.9])
            ours = kernel(photo[None], one_stage(three_augment.blur(amount, np.ones(1), CANVAS)))[0]
            difference = np.abs(ours - np.asarray(blur(image)).astype(int))[
                6:-6, 6:-6
            ]  # where no edge goes on
            assert difference.max() <= 3  # PIL rounds after each of its six passes
            assert difference.mean() < 0.6


def test_the_blurs_taps_are_a_gaussians():
    for sigma in (0.5, 1.0, 1.5, 2.0):
        taps, places = three_augment.gaussian_taps(sigma), np.arange(-6, 7)
        assert taps.sum() == pytest.approx(1)
        assert math.sqrt((taps * places**2).sum()) == pytest.approx(sigma, rel=1e-6)


def test_three_augment_draws_one_of_three_and_a_second_above_strength_1():
    ids = np.arange(3000)
    draws = Draws(0, 0, ids, np.zeros(3000, int))
    for strength, expected in ((0.5, 1500), (1.0, 3000), (1.5, 4500)):
        stages = three_augment.stages(
            draws, Levels.of(Augment(policy="three_augment", strength=strength)), CANVAS
        )
        assert (
            abs(sum(len(stage.chosen) for stage in stages) - expected) < 140
        )  # binomial(3000, 1/2): five deviations are 137
    once = three_augment.stages(draws, Levels.of(Augment(policy="three_augment")), CANVAS)
    assert sorted(np.concatenate([stage.chosen for stage in once])) == list(ids)
    assert chisquare([len(stage.chosen) for stage in once]).pvalue > 0.001
    random.seed(0)
    radii = [random.uniform(0.1, 2.0) for _ in range(1000)]
    (filters,) = (stage.primitive.taps for stage in once if isinstance(stage.primitive, table.Filter))
    assert ks_2samp(np.sqrt((filters * np.arange(-6, 7) ** 2).sum(1)), radii).pvalue > 0.001


@pytest.mark.parametrize("policy", ["three_augment", "none"])
@KERNELS
def test_pixels_of_the_other_policies_do_not_depend_on_the_batch(policy, kernel):
    images, ids, views = np.tile(photographs(), (6, 1, 1, 1)), np.arange(12), np.arange(12) % 3
    photometric = Photometric.of(Augment(policy=policy), MEAN, 0)
    whole = kernel(images, photometric.stages(1, ids, views, 224, 224))
    for i in range(0, 12, 3):
        part = slice(i, i + 3)
        np.testing.assert_array_equal(
            kernel(images[part], photometric.stages(1, ids[part], views[part], 224, 224)), whole[part]
        )


def test_the_documented_operation_works_as_it_stands_there(tmp_path, monkeypatch):
    (source,) = re.findall(r"```python\n# gamma_policy.py\n(.*?)```", DOC, re.DOTALL)
    assert len(source.splitlines()) < 30
    (tmp_path / "gamma_policy.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    (name,) = re.findall(r"policy: (\w+:\w+)", DOC)
    photometric = Photometric.of(Augment(policy=name, strength=2.0), MEAN, 0)
    images, ids = np.tile(photographs(), (32, 1, 1, 1)), np.arange(64)
    import gamma_policy

    stages = photometric.stages(0, ids, ids, 224, 224)
    assert (by_cv2(images, stages) != images).any((1, 2, 3)).sum() > 32
    levels = gamma_policy.gamma(np.array([10.0]), np.array([1.0]), CANVAS).tables[0]
    np.testing.assert_array_equal(
        levels, np.round(255 * (np.arange(256) / 255) ** 2)
    )  # what its docstring says
    draws = Draws(0, 0, ids, ids)
    assert sum(len(stage.chosen) for stage in gamma_policy.policy(draws, photometric.levels, CANVAS)) == sum(
        len(stage.chosen) for stage in stages
    )


@pytest.mark.parametrize("name", ["no_such_module:policy", "math:no_such_policy"])
def test_a_policy_that_cannot_be_imported_is_refused_by_its_name(name):
    with pytest.raises(
        UserError,
        match=f"augment.policy: '{name}' cannot be found: .*; allowed: randaugment, three_augment, none",
    ):
        find_policy(name)


def test_a_policy_that_is_no_name_is_refused_in_the_file(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("data: {uri: data}\ndistillation: {kind: none}\naugment: {policy: autoaugment}\n")
    with pytest.raises(
        UserError,
        match=r"augment\.policy: 'autoaugment' is not allowed: must be one of "
        "randaugment, three_augment, none",
    ):
        load_experiment(path)


@pytest.mark.parametrize(
    ("policy", "key", "message"),
    [
        ("none", "augment.randaugment.magnitude", "augment.policy is none: it would change nothing"),
        (
            "randaugment",
            "augment.color_jitter",
            "which takes no colour jitter; set augment.force_color_jitter",
        ),
    ],
)
def test_a_search_of_a_key_that_the_policy_does_not_use_is_refused(policy, key, message, experiment):
    with pytest.raises(UserError, match=f"search.space.{key}: is searched, but .*{message}"):
        experiment("digits_search", {"augment.policy": policy, "search.space": {key: {"float": [0.1, 0.9]}}})
    experiment(
        "digits_search",
        {"search.space": {key: {"float": [0.1, 0.9]}, "augment.policy": {"choice": ["none", "randaugment"]}}},
    )


def test_a_new_experiment_file_has_the_papers_recipe(tmp_path):
    (tmp_path / "x.yaml").write_text("data: {uri: data}\ndistillation: {kind: none}\n")
    augment = load_experiment(tmp_path / "x.yaml").augment
    # DeiT, table 9: rand augment 9/0.5, mixup 0.8, cutmix 1.0, erasing probability 0.25
    assert (augment.policy, augment.randaugment.magnitude) == ("randaugment", 9)
    assert (augment.mixup, augment.cutmix, augment.random_erasing) == (0.8, 1, 0.25)


@pytest.mark.parametrize("place", ["stream", "device"])
def test_a_digits_batch_is_augmented_alike_in_both_places(experiment, place):
    from deit_ray.training.step import Batch
    from tests.support.training import CPU, local_batches, make_step

    keys = {"distillation.kind": "none", "augment.policy": "randaugment", "augment.place": place}
    exp = experiment("digits_student", keys)
    images = make_step(exp).inputs(Batch.of(next(local_batches(exp)), CPU), 0)[0]
    in_stream = experiment("digits_student", keys | {"augment.place": "stream"})
    assert torch.equal(
        images, make_step(in_stream).inputs(Batch.of(next(local_batches(in_stream)), CPU), 0)[0]
    )


def test_strengths_are_drawn_as_one_picture():
    picture = draw_strengths(photographs(), Augment(), MEAN, [0.229, 0.224, 0.225], strengths=(0.0, 1.0, 2.0))
    assert isinstance(picture, Image.Image)
    pixels = np.asarray(picture)
    assert pixels.shape[0] > 2 * 224
    assert pixels.shape[1] > 3 * 224
    (at,) = np.argwhere(
        [np.array_equal(pixels[-224:, x : x + 224], photographs()[-1]) for x in range(20)]
    )  # strength 0, last row
    assert not np.array_equal(pixels[-224:, -224:], photographs()[-1])
    assert at >= 0


def test_pil_blurs_with_the_same_boxes():
    step = np.zeros((1, 64, 3), np.uint8)
    step[:, 32:] = 255
    wide = np.repeat(step, 64, axis=0)
    expected = np.asarray(Image.fromarray(wide).filter(ImageFilter.GaussianBlur(2.0)))[32, :, 0].astype(int)
    edge = np.convolve(np.pad(step[0, :, 0], 6, mode="edge"), three_augment.gaussian_taps(2.0), mode="valid")
    assert np.abs(expected - edge).max() <= 2
