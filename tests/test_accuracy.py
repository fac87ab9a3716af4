"""How sure an accuracy is: intervals that hold at 0 and 1, ties, chance, and uneven classes."""

import math

import pytest
from scipy.stats import binomtest, norm

from deit_ray.accuracy import (
    chance_remark,
    few_images_warning,
    images_for,
    interval,
    is_clearly_better,
    is_uneven,
    largest_share,
    show_accuracy,
)


@pytest.mark.parametrize(("right", "images"), [(0, 25), (25, 25), (24, 25), (1, 3), (1, 1), (38_000, 50_000)])
@pytest.mark.parametrize("choices", [1, 30])
def test_the_interval_is_wilsons_widened_for_the_choice_among_evaluations(right, images, choices):
    low, high = interval(right / images, images, choices)
    # SciPy's own Wilson interval, at the confidence that Bonferroni's correction asks for
    expected = binomtest(right, images).proportion_ci(1 - 0.05 / choices, "wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert low <= right / images <= high
    assert high - low > 0


def test_a_perfect_accuracy_on_few_images_is_shown_with_an_error():
    # all of 25 right: 25 / (25 + 1.96^2) = 0.867
    assert show_accuracy(1.0, 25) == "1.0000 (0.867-1.000)"
    assert show_accuracy(0.0, 25) == "0.0000 (0.000-0.133)"
    assert show_accuracy(0.5, None) == "0.5000"
    assert show_accuracy(math.nan, 25) == "nan"


def test_ties_are_judged_by_the_intervals_of_both():
    def differ(a: float, b: float, images: int) -> bool:
        return is_clearly_better(a, interval(a, images), b, interval(b, images))

    assert not differ(1.0, 1.0, 25)
    assert not differ(1.0, 0.96, 25)  # one image of 25
    assert differ(1.0, 0.6, 25)
    assert not differ(0.76, 0.75, 1000)
    assert differ(0.76, 0.75, 50_000)


@pytest.mark.parametrize("difference", [0.1, 0.05, 0.02])
def test_so_many_images_tell_a_difference_apart(difference):
    images = images_for(difference, 0.9)
    error = math.sqrt(2 * 0.9 * 0.1 / images)  # standard error of the difference of two such accuracies
    assert norm.cdf(difference / error) == pytest.approx(0.975, abs=0.002)


def test_few_val_images_are_warned_of_and_enough_are_not():
    assert few_images_warning("val", 200) is few_images_warning("val", 0) is None
    warning = few_images_warning("val", 24)
    assert "val has only 24 images: where 0.9 is measured, the accuracy lies between 0.72 and 0.97" in warning
    assert "277 images to see a difference of 0.05" in warning  # 1.96^2 x 2 x 0.9 x 0.1 / 0.05^2 = 276.6


def test_not_better_than_the_largest_class_is_said_where_it_is_true():
    assert largest_share([60, 20, 20]) == 0.6
    assert largest_share([]) == 0
    assert chance_remark("test/top1", 0.55, 60, 0.6) == (
        "test/top1 is not better than always answering the largest class (0.6000)"
    )
    # 39 of 60: the interval reaches from 0.52 to 0.76
    assert chance_remark("test/top1", 0.65, 60, 0.6).endswith("(0.6000), within its error")
    assert chance_remark("test/top1", 0.9, 60, 0.6) is None
    assert chance_remark("test/top1", 0.1, 60, None) is None  # a study of an earlier version


@pytest.mark.parametrize(
    ("counts", "uneven"), [([30, 20], False), ([31, 20], True), ([9, 9, 0], False), ([5], False), ([], False)]
)
def test_classes_are_uneven_if_one_has_more_than_one_and_a_half_times_the_images_of_another(counts, uneven):
    assert is_uneven(counts) is uneven
