"""RandAugment: operations give the same pixels as timm's PIL operations, and are drawn as timm draws them."""

import random
from collections import Counter

import numpy as np
import pytest
import timm.data.auto_augment as timms
import torch
from PIL import Image
from scipy.stats import chi2_contingency, ks_2samp

from deit_ray.augment import kernel_cv2, kernel_torch, randaugment, table
from deit_ray.augment.levels import Levels
from deit_ray.augment.policy import Draws, Photometric
from deit_ray.experiment.config import Augment
from tests.support.photographs import SOURCES, photographs

FILL = (124, 116, 104)
HPARAMS = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
CANVAS = table.Canvas(224, 224, FILL)
MAGNITUDES = (0.0, 2.2, 5.0, 9.0, 10.0)
BY_NAME = dict(zip(timms._RAND_INCREASING_TRANSFORMS, table.RANDAUGMENT, strict=True))
BLENDS = ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing")
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
MEAN = [0.485, 0.456, 0.406]


def by_cv2(images: np.ndarray, stages) -> np.ndarray:
    images = images.copy()
    kernel_cv2.augment_images(images, stages)
    return images


def by_torch(images: np.ndarray, stages) -> np.ndarray:
    return kernel_torch.augment_images(torch.from_numpy(images), stages).numpy()


KERNELS = pytest.mark.parametrize("kernel", [by_cv2, by_torch])


def stages_of(name: str, images: np.ndarray, magnitude: float, sign: float) -> list[table.Stage]:
    """One operation for all images."""
    all_alike = np.full(len(images), magnitude), np.full(len(images), sign)
    return [table.Stage(np.arange(len(images)), BY_NAME[name](*all_alike, CANVAS))]


def differences(name: str, kernel, images: np.ndarray, monkeypatch) -> list[np.ndarray]:
    """Our pixels minus timm's, at several magnitudes and both signs."""
    found = []
    for magnitude in MAGNITUDES:
        for sign in (1.0, -1.0):
            monkeypatch.setattr(timms, "_randomly_negate", lambda value, sign=sign: sign * value)
            operation = timms.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=HPARAMS)
            expected = np.stack([np.asarray(operation(Image.fromarray(image))) for image in images])
            found.append(kernel(images, stages_of(name, images, magnitude, sign)).astype(int) - expected)
    return found


@KERNELS
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in BLENDS + GEOMETRIC])
def test_lookups_are_timms_to_the_bit(name, source, kernel, monkeypatch):
    for difference in differences(name, kernel, photographs(source), monkeypatch):
        np.testing.assert_array_equal(difference, 0)


@KERNELS
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", BLENDS)
def test_blends_are_timms_within_a_grey_level(name, source, kernel, monkeypatch):
    for difference in differences(name, kernel, photographs(source), monkeypatch):
        assert np.abs(difference).max() <= 1


@KERNELS
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_are_timms_to_one_and_a_half_grey_levels_inside_the_border(
    name, source, kernel, monkeypatch
):
    for difference in differences(name, kernel, photographs(source), monkeypatch):
        assert np.abs(difference[:, 2:-2, 2:-2]).mean(axis=(1, 2, 3)).max() <= 1.5


@KERNELS
def test_lookups_of_hard_histograms_are_timms_to_the_bit(kernel, monkeypatch):
    rng = np.random.default_rng(0)
    flat, two = np.full((64, 64, 3), 77), np.where(rng.random((64, 64, 3)) < 0.01, 200, 201)
    few = rng.integers(100, 104, (64, 64, 3))
    few[0, :8] = 255
    images = np.stack(
        [flat, two, few, rng.integers(0, 256, (64, 64, 3)), rng.integers(3, 250, (64, 64, 3))]
    ).astype(np.uint8)
    for name in ("AutoContrast", "Equalize"):
        for difference in differences(name, kernel, images, monkeypatch):
            np.testing.assert_array_equal(difference, 0)


@KERNELS
def test_pixels_do_not_depend_on_the_batch(kernel):
    images = np.tile(photographs(), (12, 1, 1, 1))
    images += np.arange(24, dtype=np.uint8)[:, None, None, None]
    ids, views = np.arange(24), np.arange(24) % 3
    photometric = Photometric.of(Augment(strength=2.0, force_color_jitter=True), MEAN, 0)
    whole = kernel(images, photometric.stages(1, ids, views, 224, 224))
    for part in (slice(0, 1), slice(1, 9), slice(9, 24)):
        np.testing.assert_array_equal(
            kernel(images[part], photometric.stages(1, ids[part], views[part], 224, 224)), whole[part]
        )
    assert (whole != images).any((1, 2, 3)).sum() > 20


def test_the_two_kernels_agree():
    images, ids = np.tile(photographs(), (20, 1, 1, 1)), np.arange(40)
    stages = Photometric.of(Augment(), MEAN, 0).stages(0, ids, ids, 224, 224)
    difference = np.abs(by_cv2(images, stages).astype(int) - by_torch(images, stages))
    assert difference.mean() < 0.1
    assert np.quantile(difference, 0.999) <= 2


COUNT = 6000


class Spy:
    """Takes the place of an operation of timm; records its arguments, and changes no pixels."""

    def __init__(self, name: str, calls: list):
        self.name, self.calls = name, calls

    def __call__(self, image, *arguments, **_):
        self.calls.append((self.name, float(arguments[0]) if arguments else 0.0))
        return image


def timms_calls(monkeypatch) -> list[list]:
    """The operations that timm's transform of DeiT applies to each of COUNT images, with arguments."""
    np.random.seed(0)
    random.seed(0)
    transform, calls = timms.rand_augment_transform("rand-m9-mstd0.5-inc1", dict(HPARAMS)), []
    for operation in transform.ops:
        monkeypatch.setattr(operation, "aug_fn", Spy(operation.name, calls))
    found = []
    for _ in range(COUNT):
        calls.clear()
        transform(None)
        found.append(list(calls))
    return found


def our_calls(augment: Augment, count: int = COUNT) -> list[list]:
    """The operations that we draw for each image, with timm's arguments at our magnitudes and signs."""
    levels, draws = Levels.of(augment), Draws(1, 0, np.arange(count), np.zeros(count, int))
    found, names = [[] for _ in range(count)], list(BY_NAME)
    with pytest.MonkeyPatch.context() as patch:
        for layer in range(int(np.ceil(levels.num_ops))):
            for i, (index, applied, magnitude, sign) in enumerate(
                zip(*randaugment.draw_layer(draws, levels, layer, len(names)), strict=True)
            ):
                if applied:
                    patch.setattr(timms, "_randomly_negate", lambda value, sign=sign: sign * value)
                    argument = timms.LEVEL_TO_ARG[names[index]]
                    found[i].append((names[index], float(argument(magnitude, {})[0]) if argument else 0.0))
    return found


def disagreements(ours: list[list], theirs: list[list]) -> list[float]:
    """p-values of tests that compare numbers of operations, operations, ordered pairs, and arguments."""
    p_values = [chi_square_p([len(calls) for calls in ours], [len(calls) for calls in theirs])]
    p_values.append(
        chi_square_p(*([name for calls in found for name, _ in calls] for found in (ours, theirs)))
    )
    pairs = [
        [(calls[0][0] in GEOMETRIC, calls[1][0] in GEOMETRIC) for calls in found if len(calls) == 2]
        for found in (ours, theirs)
    ]
    p_values.append(chi_square_p(*pairs))
    for name in set(BY_NAME) - {"AutoContrast", "Equalize", "Invert"}:
        arguments = [
            [value for calls in found for called, value in calls if called == name]
            for found in (ours, theirs)
        ]
        p_values.append(ks_2samp(*arguments).pvalue if all(arguments) else 0.0)
    return p_values


def chi_square_p(ours: list, theirs: list) -> float:
    counts = Counter(ours), Counter(theirs)
    return chi2_contingency(
        [[count[key] for key in sorted(counts[0] | counts[1])] for count in counts]
    ).pvalue


def test_operations_and_arguments_are_drawn_as_timm_draws_them(monkeypatch):
    theirs = timms_calls(monkeypatch)
    assert (
        min(disagreements(our_calls(Augment()), theirs)) > 0.001
    )  # of 15 p-values, below by chance once in 67


@pytest.mark.parametrize(
    "wrong",
    [
        {"randaugment": {"p": 0.55}},
        {"randaugment": {"magnitude": 8.8}},
        {"randaugment": {"num_ops": 3}},
        {"strength": 1.1},
    ],
)
def test_the_test_of_the_distribution_notices_a_wrong_one(wrong, monkeypatch):
    assert min(disagreements(our_calls(Augment(**wrong)), timms_calls(monkeypatch))) < 0.001


def test_the_same_test_notices_a_missing_operation_an_unfair_coin_and_a_missing_deviation(monkeypatch):
    theirs, draw = timms_calls(monkeypatch), randaugment.draw_layer
    for wrong in (
        lambda index, applied, magnitude, sign: (np.where(index == 14, 13, index), applied, magnitude, sign),
        lambda index, applied, magnitude, sign: (index, applied, magnitude, np.abs(sign)),
        lambda index, applied, magnitude, sign: (index, applied, np.full_like(magnitude, 9), sign),
    ):
        monkeypatch.setattr(randaugment, "draw_layer", lambda *a, wrong=wrong: wrong(*draw(*a)))
        assert min(disagreements(our_calls(Augment()), theirs)) < 0.001


def test_strength_keeps_which_operations_are_drawn():
    draws = Draws(0, 0, np.arange(500), np.zeros(500, int))
    weak, strong = (randaugment.draw_layer(draws, Levels.of(Augment(strength=s)), 1, 15) for s in (0.5, 2.0))
    np.testing.assert_array_equal(weak[0], strong[0])
    np.testing.assert_array_equal(weak[3], strong[3])
    assert (weak[1] <= strong[1]).all()  # what the weak one applies, the strong one does
    assert (weak[2] <= strong[2]).all()
