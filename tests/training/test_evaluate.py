"""Evaluation: balanced accuracy where classes are uneven, and the answers for each image."""

import contextlib
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from deit_ray.data import shards
from deit_ray.data.blocks import Samples
from deit_ray.training.evaluate import evaluate
from deit_ray.training.step import Normalise
from deit_ray.trial.answers import Answers
from deit_ray.trial.reading import largest_shares, uneven_splits

CPU = torch.device("cpu")
LABELS = [0] * 6 + [1] * 2 + [2]  # the last class of four has no image


class AnswersByBrightness(nn.Module):
    """Answers class 0 for dark images, and class 1 for bright ones."""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        bright_B = images_BCHW.mean((1, 2, 3))
        zeros_B = torch.zeros_like(bright_B)
        return torch.stack([zeros_B, 10 * bright_B, zeros_B - 5, zeros_B - 5], dim=1)


def samples(brightness: list[int]) -> Samples:
    """The labelled images in a batch, with one more row that is padding."""
    images = np.zeros((len(LABELS) + 1, 4, 4, 3), np.uint8)
    images[: len(LABELS)] = np.array(brightness, np.uint8)[:, None, None, None]
    arrays = {
        "images": images,
        "labels": np.array([*LABELS, 0]),
        "ids": np.array([*reversed(range(len(LABELS))), -1]),
        "views": np.zeros(len(images), np.int64),
        "valid": np.array([True] * len(LABELS) + [False]),
    }
    return Samples(arrays, "test", 0, 0)


def test_the_balanced_accuracy_is_the_mean_over_classes_that_have_images():
    # one of the six images of class 0 is bright, and so is one of the two of class 1
    brightness = [255, 0, 0, 0, 0, 0, 255, 0, 255]
    run = partial(
        evaluate, "test", AnswersByBrightness(), None,
        steps=1, normalise=Normalise([0.5] * 3, [0.5] * 3, CPU), autocast=contextlib.nullcontext(),
    )  # fmt: skip
    answered: list = []
    metrics = run(iter([samples(brightness)]), balanced=True, answered=answered)
    assert metrics["test/top1"] == pytest.approx(6 / 9)
    assert metrics["test/top1_balanced"] == pytest.approx((5 / 6 + 1 / 2 + 0) / 3)
    plain = run(iter([samples(brightness)]))
    assert plain == {name: value for name, value in metrics.items() if name != "test/top1_balanced"}

    answers = Answers.of(list("abcd"), answered)
    assert answers.ids.tolist() == list(range(len(LABELS)))  # without the padding, in the order of ids
    assert answers.labels.tolist() == LABELS[::-1]
    assert answers.answers.tolist() == [int(b > 0) for b in brightness[::-1]]
    assert [(c.images, c.right) for c in answers.by_class()] == [(6, 5), (2, 1), (1, 0), (0, 0)]
    assert answers.probabilities == pytest.approx(
        np.where(answers.labels == answers.answers, answers.of_labels, answers.probabilities)
    )


def test_uneven_splits_and_largest_classes_follow_from_the_manifest():
    counts = {"train": [30, 10, 20], "test": [5, 5, 5]}
    manifest = shards.Manifest(list("abc"), {}, counts, "")
    assert uneven_splits(manifest) == {"train", "val"}
    assert largest_shares(manifest) == {"train": 0.5, "val": 0.5, "test": 1 / 3}
    only_test = shards.Manifest(list("ab"), {}, {"test": [2, 1]}, "")
    assert uneven_splits(only_test) == {"test"}
    assert largest_shares(only_test) == {"test": 2 / 3}
