"""Mixup, cutmix and random erasing equal timm's for the same draws, and are drawn as timm draws them."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data.mixup
import timm.data.random_erasing
import torch
from scipy.stats import ks_2samp
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

from deit_ray import rng
from deit_ray.augment import erasing, mixing, normal
from deit_ray.augment.levels import Levels
from deit_ray.experiment.config import Augment

PLAIN = (
    torch.zeros(3, 1, 1),
    torch.ones(3, 1, 1),
)  # a mean and a standard deviation that leave the noise as it is
QUANTILES = torch.from_numpy(normal.quantiles())


def levels(**keys) -> Levels:
    return Levels.of(Augment(**keys))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_gives_timms_images_and_targets_for_the_same_draws(kind, monkeypatch):
    images, labels = torch.rand(6, 3, 33, 48), torch.tensor([0, 1, 2, 0, 1, 1])
    for lam, y, x in ((0.3, 10, 20), (0.9, 0, 47), (0.5, 32, 0), (0.62, 16, 24)):
        draws = SimpleNamespace(rand=lambda: 0.0, beta=lambda *a, lam=lam: lam, randint=iter_of(y, x))
        monkeypatch.setattr(timm.data.mixup, "np", SimpleNamespace(random=draws, sqrt=np.sqrt, clip=np.clip))
        theirs = Mixup(
            mixup_alpha=float(kind == "mixup"),
            cutmix_alpha=float(kind == "cutmix"),
            label_smoothing=0.1,
            num_classes=3,
        )
        expected = theirs(images.clone(), labels)
        mix = mixing.Mix(lam) if kind == "mixup" else mixing.cut(33, 48, lam, y, x)
        batch = mixing.BatchMix((mixing.Group(mix),))
        torch.testing.assert_close(batch.images(images), expected[0])
        torch.testing.assert_close(batch.targets(mixing.smooth_targets(labels, 3, 0.1)), expected[1])


def iter_of(*values):
    found = iter(values)
    return lambda *a, **k: next(found)


def test_the_shares_are_drawn_as_timm_draws_them():
    np.random.seed(0)
    theirs = [Mixup(mixup_alpha=0.8, cutmix_alpha=1.0)._params_per_batch() for _ in range(2000)]
    ours = [mixing.draw(levels(), 0, step, 0, 0, 4, 4) for step in range(2000)]
    blends = [mix.lam for mix in ours if mix.box is None]
    assert 900 < len(blends) < 1100  # binomial(2000, 1/2): 100 is 4.5 standard deviations
    assert ks_2samp(blends, [lam for lam, cutmix in theirs if not cutmix]).pvalue > 0.001
    assert ks_2samp(blends, np.random.beta(1.6, 1.6, 1000)).pvalue < 0.001  # the test can fail


def test_cutmix_pastes_the_box_whose_share_is_in_the_target():
    images, labels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    for step in range(20):
        mix = batch_mix(levels(mixup=0.0), step, np.zeros(4, int), size=32)
        mixed, targets = mix.images(images), mix.targets(mixing.smooth_targets(labels, 3, 0.0))
        pasted = (mixed[0, 0] == 3).float().mean().item()  # of image 3 in image 0
        assert torch.equal((mixed[0] == 0) | (mixed[0] == 3), torch.ones_like(mixed[0], dtype=torch.bool))
        torch.testing.assert_close(targets[1], torch.tensor([0.0, 1 - pasted, pasted]))


def batch_mix(drawn: Levels, step: int, views: np.ndarray, valid=None, size: int = 4, rank: int = 0):
    valid = np.ones(len(views), bool) if valid is None else valid
    return mixing.draw_batch(drawn, 0, step, rank, views, valid, size, size, torch.device("cpu"))


@pytest.mark.parametrize("begin", [0, 2])  # a batch may begin between two views of an image
def test_views_are_mixed_as_on_the_references_ranks(begin):
    """RASampler repeats each image and gives rank r every third sample from r on: there, view r."""
    places = np.arange(begin, begin + 18)
    images, views = places // 3, places % 3
    pixels = torch.rand(18, 3, 16, 16)
    drawn = set()
    for step in range(20):
        mix = batch_mix(levels(), step, views, size=16, rank=5)
        mixed, one_hot = mix.images(pixels), mix.targets(torch.eye(18))
        for view in range(3):
            on_rank = np.flatnonzero(views == view)
            own = mixing.draw(levels(), 0, step, 5, view, 16, 16)
            alone = mixing.BatchMix((mixing.Group(own),))  # timm's, by the test above
            torch.testing.assert_close(mixed[on_rank], alone.images(pixels[on_rank]))
            torch.testing.assert_close(one_hot[on_rank], alone.targets(torch.eye(18)[on_rank]))
            drawn.add(own)
        for sample in range(18):
            mixed_in = set(one_hot[sample].numpy().nonzero()[0]) - {sample}
            assert all(images[other] != images[sample] for other in mixed_in)
            assert all(views[other] == views[sample] for other in mixed_in)
    assert len(drawn) == 60  # each step and view has a draw of its own


def test_view_0_and_a_batch_of_one_view_draw_as_they_did_before_views_were_told_apart():
    for step in range(20):
        draws = rng.generator(0, "mix", step, 2)
        use_cutmix, lam = draws.random() < 0.5, draws.beta(1.0, 1.0)
        mix = mixing.draw(levels(mixup=1.0), 0, step, 2, 0, 8, 8)
        assert (mix.box is not None) == use_cutmix
        assert use_cutmix or mix.lam == lam
        whole = batch_mix(levels(mixup=1.0), step, np.zeros(6, int), size=8, rank=2)
        assert whole.groups == (mixing.Group(mix),)
    pixels = torch.rand(6, 3, 8, 8)
    blend = mixing.BatchMix((mixing.Group(mixing.Mix(0.3)),))
    assert torch.equal(blend.images(pixels), pixels.flip(0).lerp_(pixels, 0.3))


@pytest.mark.parametrize(("count", "partner"), [(1, 4), (2, 5)])  # 3 meets 4; by view 1-7, 3-5 and 0-6, 2-4
def test_the_partner_of_an_image_that_cannot_be_decoded_stays_unmixed(count, partner):
    views, valid = np.arange(8) % count, np.arange(8) != 3
    pixels, one_hot = torch.rand(8, 3, 4, 4), torch.eye(8)
    for step in range(10):
        mix = batch_mix(levels(cutmix=0.0), step, views, valid)
        torch.testing.assert_close(mix.targets(one_hot)[partner], one_hot[partner])
        torch.testing.assert_close(mix.images(pixels)[partner], pixels[partner])
        assert mix.targets(one_hot)[0].count_nonzero() == 2


def test_erasing_gives_timms_images_for_the_same_draws(monkeypatch):
    ids, views = np.arange(40), np.zeros(40, int)
    images = torch.rand(40, 3, 48, 32)
    ours = images.clone()
    erasing.erase(ours, 5, 2, ids, views, 0.5, *PLAIN)
    draws = rng.uniform(5, "erase", 2, ids[:, None], views[:, None], np.arange(23))
    states = torch.from_numpy(rng.bits(5, "erase noise", 2, ids, views).view(np.int64))
    for i in range(40):
        area_and_aspect, places = iter(draws[i, :20]), iter(draws[i, 20:22])
        boxes = []

        def randint(low, high, places=places, boxes=boxes):
            boxes.append(low + int(next(places) * (high - low + 1)))
            return boxes[-1]

        def noise(per_pixel, rand_color, patch_size, dtype, device, i=i, boxes=boxes):
            (top, left), (_, h, w) = boxes, patch_size
            pixels = (torch.arange(top, top + h)[:, None] * 32 + torch.arange(left, left + w)).flatten()
            return erasing.pixel_noise(states[i].expand(len(pixels)), pixels, QUANTILES).T.reshape(patch_size)

        fed = SimpleNamespace(
            random=lambda i=i: draws[i, 22],
            uniform=lambda a, b, d=area_and_aspect: a + (b - a) * next(d),
            randint=randint,
        )
        monkeypatch.setattr(timm.data.random_erasing, "random", fed)
        monkeypatch.setattr(timm.data.random_erasing, "_get_pixels", noise)
        assert torch.equal(RandomErasing(0.5, mode="pixel", device="cpu")(images[i].clone()), ours[i])
    assert 8 < (ours != images).flatten(1).any(1).sum() < 32


def test_erasing_draws_boxes_as_timms_does():
    size, count = 64, 1500
    random.seed(0)
    eraser = RandomErasing(probability=1.0, mode="const", device="cpu")
    theirs = [(eraser(torch.ones(3, size, size))[0] == 0).float().sum().item() for _ in range(count)]
    _, boxes = erasing.draw_boxes(size, size, 0, 0, np.arange(count), np.zeros(count, int), 1.0)
    assert ks_2samp(boxes[:, 2] * boxes[:, 3], theirs).pvalue > 0.001


def test_erasing_hits_its_share_of_images_with_normal_noise():
    images = torch.zeros(2000, 3, 16, 16)
    ids, views = np.arange(2000), np.zeros(2000, int)
    erasing.erase(images, 0, 0, ids, views, 0.25, torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25))
    hit = images.flatten(1).ne(0).any(1)
    assert 400 < hit.sum() < 600  # five standard deviations of binomial(2000, 1/4) are 97
    noise = images[images != 0]
    assert noise.mean().item() == pytest.approx(0.5, abs=0.01)
    assert noise.std().item() == pytest.approx(0.25, abs=0.01)


def test_noise_is_normal_and_its_channels_and_pixels_are_independent():
    states = torch.from_numpy(rng.bits(0, "erase noise", 0, np.arange(40), 0).view(np.int64))
    noise = (
        erasing.pixel_noise(states.repeat_interleave(1000), torch.arange(1000).repeat(40), QUANTILES)
        .view(40, 1000, 3)
        .double()
    )
    assert ks_2samp(noise.flatten(), np.random.default_rng(0).standard_normal(120_000)).pvalue > 0.001
    streams = torch.stack(
        [
            noise[:, :-1, 0].flatten(),
            noise[:, :-1, 1].flatten(),
            noise[:, :-1, 2].flatten(),
            noise[:, 1:, 0].flatten(),
        ]
    )
    assert (torch.corrcoef(streams) - torch.eye(4)).abs().max() < 5 / np.sqrt(
        streams.shape[1]
    )  # five standard errors


def test_noise_is_the_hash_that_rng_makes_of_the_same_coordinates():
    state = torch.from_numpy(rng.bits(3, "erase noise", 1, np.array([8]), 2).view(np.int64)).expand(500)
    bits = rng.bits(3, "erase noise", 1, np.array([8]), 2, np.arange(500))
    expected = [normal.quantiles()[(bits >> np.uint64(16 * c)).astype(np.int64) & 65535] for c in range(3)]
    np.testing.assert_array_equal(
        erasing.pixel_noise(state, torch.arange(500), QUANTILES), np.stack(expected, axis=1)
    )


def test_erasing_does_not_depend_on_the_batch():
    ids, views = np.arange(30), np.arange(30) % 3
    whole, parts = torch.zeros(30, 3, 20, 24), torch.zeros(30, 3, 20, 24)
    erasing.erase(whole, 0, 1, ids, views, 0.7, *PLAIN)
    for part in (slice(0, 7), slice(7, 8), slice(8, 30)):
        erasing.erase(parts[part], 0, 1, ids[part], views[part], 0.7, *PLAIN)
    assert torch.equal(whole, parts)


def test_all_boxes_at_once_as_on_a_gpu_are_each_box_alone():
    ids, one_by_one, at_once = np.arange(30), torch.zeros(30, 3, 20, 24), torch.zeros(30, 3, 20, 24)
    erasing.erase(one_by_one, 0, 1, ids, ids, 0.7, *PLAIN)
    places, boxes = erasing.draw_boxes(20, 24, 0, 1, ids, ids, 0.7)
    rows = np.column_stack([places, boxes, rng.bits(0, "erase noise", 1, places, places).view(np.int64)])
    erasing._fill(at_once.permute(0, 2, 3, 1), rows, QUANTILES, *(value.view(3) for value in PLAIN))
    assert torch.equal(one_by_one, at_once)
