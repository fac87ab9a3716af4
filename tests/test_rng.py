"""Draws are functions of their coordinates: uniform, independent between purposes, equal for any batch."""

import numpy as np

from deit_ray import rng


def chi_square(draws: np.ndarray, bins: int = 256) -> float:
    counts = np.histogram(draws, bins, (0, 1))[0]
    expected = len(draws) / bins
    return float(((counts - expected) ** 2 / expected).sum())


def test_draws_are_uniform_over_consecutive_ids():
    # chi-square with 255 degrees of freedom: mean 255, deviation sqrt(2 x 255) = 22.6; 255 + 5 x 22.6 = 368
    for purpose in ("crop", "erase", "color jitter", "randaugment", "three_augment", "erase noise"):
        assert 142 < chi_square(rng.uniform(1, purpose, 0, np.arange(100_000), 0, 0)) < 368
    assert chi_square(rng.uniform(1, "crop", 0, np.arange(100_000), 0, 0) ** 1.05) > 368  # the test can fail


def test_purposes_seeds_and_coordinates_are_independent():
    ids = np.arange(50_000)
    streams = [
        rng.uniform(1, "crop", 0, ids, 0),
        rng.uniform(1, "erase", 0, ids, 0),
        rng.uniform(2, "crop", 0, ids, 0),
        rng.uniform(1, "crop", 1, ids, 0),
        rng.uniform(1, "crop", 0, ids, 1),
        rng.uniform(1, "crop", 0, ids + 1, 0),
        *(rng.uniform(1, "randaugment", 0, ids, 0, layer, k) for layer in range(2) for k in range(4)),
        *(
            rng.uniform(1, purpose, 0, ids, 0, 0)
            for purpose in ("color jitter", "three_augment", "erase noise")
        ),
    ]
    correlation = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlation).max() < 5 / np.sqrt(
        len(ids)
    )  # five standard errors of a correlation of independent samples


def test_a_draw_does_not_depend_on_the_batch_it_is_drawn_in():
    ids, views = np.arange(64), np.arange(64) % 3
    whole = rng.uniform(7, "crop", 3, ids[:, None], views[:, None], np.arange(5))
    alone = np.stack([rng.uniform(7, "crop", 3, i, v, np.arange(5)) for i, v in zip(ids, views, strict=True)])
    np.testing.assert_array_equal(whole, alone)


def test_a_permutation_has_every_index_once():
    order = rng.permutation(0, "rows", 1000, 4)
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert not np.array_equal(order, rng.permutation(0, "rows", 1000, 5))


def test_the_mixer_is_splitmix64():
    # the reference: the first outputs of splitmix64 seeded with 1234567, from its author's test vector
    state, outputs = np.uint64(1234567), []
    with np.errstate(over="ignore"):
        for _ in range(3):
            state = state + rng.GAMMA
            outputs.append(int(rng._mix(state)))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]
