"""One step: each searched key turns its own screw and no other; mixing and erasing do what timm's do."""

import numpy as np
import pytest
import timm.data.mixup
import torch

from deit_ray import rng
from deit_ray.augment import erasing, kernel_cv2, kernel_torch, mixing, table
from deit_ray.augment.levels import Levels
from deit_ray.step import Batch
from tests.training import CPU, local_batches, make_step, train_locally

# every trial of these tests learns from the digits teacher without the demo's mixing, so that one key changes one thing
PLAIN = {"augment.mixup": 0.0, "augment.random_erasing": 0.0, "train.epochs": 4}


@pytest.fixture
def student(experiment, teacher_file):
    return lambda **keys: experiment("digits_student", PLAIN | {"distillation.teacher": {"weights": teacher_file}} | keys)


def first_step(experiment):
    """(batch pixels, coordinates, loss parts, first update of the weights) of an experiment's first step."""
    step, samples = make_step(experiment), next(local_batches(experiment))
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    parts = step(Batch.of(samples, CPU), 40)  # past the warm-up, where the learning rate says something
    update = {name: p.detach() - before[name] for name, p in step.model.named_parameters()}
    return samples, parts, update


def crops(experiment):
    """The samples as the crop leaves them: with the photometric work left to the device."""
    return next(local_batches(experiment.with_overrides({"augment.place": "device"}))).images


def test_strength_changes_pixels_and_leaves_every_crop_as_it_is(student):
    weak, strong = student(**{"augment.strength": 0.5}), student(**{"augment.strength": 1.5})
    np.testing.assert_array_equal(crops(weak), crops(strong))
    a, b = first_step(weak)[0], first_step(strong)[0]
    np.testing.assert_array_equal(a.ids, b.ids)
    changed = np.abs(a.images.astype(int) - b.images).mean()
    assert changed > 1
    none = first_step(student(**{"augment.strength": 0.0}))[0]
    np.testing.assert_array_equal(none.images, crops(weak))
    assert np.abs(a.images.astype(int) - none.images).mean() < np.abs(b.images.astype(int) - none.images).mean()


def test_the_learning_rate_changes_the_first_update_in_proportion_and_nothing_before_it(student):
    (a, parts_a, update_a), (b, parts_b, update_b) = (first_step(student(**{"optim.lr": lr})) for lr in (1e-3, 2e-3))
    np.testing.assert_array_equal(a.images, b.images)
    assert parts_a["loss"] == parts_b["loss"]
    assert parts_b["lr"] / parts_a["lr"] == pytest.approx(2, rel=0.02)  # min_lr is the same for both
    ratio = update_b["head.weight"].abs().mean() / update_a["head.weight"].abs().mean()
    assert ratio == pytest.approx(2, rel=0.02)


def test_the_weight_changes_the_loss_and_neither_pixels_nor_its_parts(student):
    (a, parts_a, update_a), (b, parts_b, update_b) = (first_step(student(**{"distillation.weight": w})) for w in (0.2, 0.8))
    np.testing.assert_array_equal(a.images, b.images)
    assert parts_a["loss_label"] == parts_b["loss_label"]
    assert parts_a["loss_teacher"] == parts_b["loss_teacher"]
    for parts, weight in ((parts_a, 0.2), (parts_b, 0.8)):
        torch.testing.assert_close(parts["loss"], (1 - weight) * parts["loss_label"] + weight * parts["loss_teacher"])
    assert not torch.equal(update_a["blocks.0.attn.qkv.weight"], update_b["blocks.0.attn.qkv.weight"])


def test_mixing_and_erasing_follow_the_strength(student):
    both = {"augment.mixup": 0.8, "augment.cutmix": 1.0, "augment.random_erasing": 0.25}
    levels = [Levels.of(student(**both, **{"augment.strength": s}).augment) for s in (0.0, 1.0, 2.0)]
    assert [(v.mixup, v.cutmix, v.random_erasing) for v in levels] == [(0, 0, 0), (0.8, 1.0, 0.25), (1.6, 2.0, 0.5)]


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(experiment):
    keys = {"distillation.kind": "none", "train.epochs": 1, "optim.warmup_epochs": 0, "student.drop_path": 0.2}
    a, b, other = (train_locally(experiment("digits_student", keys | {"seed": seed})) for seed in (0, 0, 1))
    assert a.losses == b.losses
    assert a.metrics == b.metrics
    assert a.losses != other.losses


def test_the_place_of_augmentation_changes_no_bit_on_the_cpu(student):
    in_stream, on_device = student(**{"augment.place": "stream"}), student(**{"augment.place": "device"})
    (_, parts_a, update_a), (_, parts_b, update_b) = first_step(in_stream), first_step(on_device)
    assert parts_a["loss"] == parts_b["loss"]
    assert all(torch.equal(update_a[name], update_b[name]) for name in update_a)


def test_the_two_kernels_are_within_a_grey_level():
    images = np.random.default_rng(0).integers(0, 256, (16, 24, 24, 3), dtype=np.uint8)
    ids, views = np.arange(16), np.zeros(16, int)
    by_torch = kernel_torch.augment_images(torch.from_numpy(images), 0, 0, ids, views, 0.4).numpy()
    by_cv2 = images.copy()
    kernel_cv2.augment_images(by_cv2, 0, 0, ids, views, 0.4)
    difference = np.abs(by_cv2.astype(int) - by_torch)
    assert difference.mean() < 0.5
    assert difference.max() <= 3  # three operations, each rounding to within one


def test_each_jitter_is_pils_within_a_grey_level(monkeypatch):
    from PIL import Image, ImageEnhance
    from sklearn.datasets import load_sample_image

    photo = load_sample_image("flower.jpg")[:200, :200]
    enhancers = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}
    for index, name in enumerate(table.OPERATIONS):
        for factor in (0.6, 1.4):
            factors = np.ones((1, 3))
            factors[0, index] = factor
            monkeypatch.setattr(table, "draw", lambda *a, f=factors: (f, np.array([[0, 1, 2]])))
            expected = np.asarray(enhancers[name](Image.fromarray(photo)).enhance(factor)).astype(int)
            ours = photo[None].copy()
            kernel_cv2.augment_images(ours, 0, 0, np.zeros(1, int), np.zeros(1, int), 0.4)
            assert np.abs(ours[0] - expected).max() <= 1, name


def test_mixup_gives_timms_values_and_targets_for_the_same_draws():
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    lam = rng.generator(0, "mix", 3, 0)
    lam.random()
    lam = float(lam.beta(0.8, 0.8))
    levels = Levels(0, 0, mixup=0.8, cutmix=1.0, mixup_switch=0.0)
    ours = mixing.mix(images, mixing.smooth_targets(labels, 3, 0.1), levels, 0, 3, 0)
    torch.testing.assert_close(ours[0], images * lam + images.flip(0) * (1 - lam))
    torch.testing.assert_close(ours[1], timm.data.mixup.mixup_target(labels, 3, lam, 0.1))


def test_cutmix_pastes_the_box_whose_share_is_in_the_target():
    images, labels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    for step in range(20):
        mixed, targets = mixing.mix(images, mixing.smooth_targets(labels, 3, 0.0), Levels(0, 0, 0.0, 1.0, 0.5), 0, step, 0)
        pasted = (mixed[0, 0] == 3).float().mean().item()  # of image 3 in image 0
        assert torch.equal((mixed[0] == 0) | (mixed[0] == 3), torch.ones_like(mixed[0], dtype=torch.bool))
        torch.testing.assert_close(targets[1], torch.tensor([0.0, 1 - pasted, pasted]))


def test_erasing_draws_boxes_as_timms_does():
    from scipy.stats import ks_2samp
    from timm.data.random_erasing import RandomErasing

    torch.manual_seed(0)
    size, count = 64, 1500
    theirs = []
    import random

    random.seed(0)
    eraser = RandomErasing(probability=1.0, mode="const", device="cpu")
    for _ in range(count):
        theirs.append((eraser(torch.ones(3, size, size))[0] == 0).float().sum().item())
    draws = rng.uniform(0, "erase", 0, np.arange(count)[:, None], 0, np.arange(23))
    ours = [box[2] * box[3] for box in (erasing.erase_box(size, size, d) for d in draws) if box]
    assert ks_2samp(ours, theirs).pvalue > 0.001


def test_erasing_hits_its_share_of_images_with_normal_noise():
    images = torch.zeros(2000, 3, 16, 16)
    ids, views = np.arange(2000), np.zeros(2000, int)
    erasing.erase(images, 0, 0, ids, views, 0.25, mean=0.5, std=0.25)
    hit = images.flatten(1).ne(0).any(1)
    assert 400 < hit.sum() < 600  # five standard deviations of binomial(2000, 1/4) are 97
    noise = images[images != 0]
    assert noise.mean().item() == pytest.approx(0.5, abs=0.01)
    assert noise.std().item() == pytest.approx(0.25, abs=0.01)
    again = torch.zeros(1, 3, 16, 16)
    chosen = int(hit.nonzero()[3])
    erasing.erase(again, 0, 0, ids[chosen : chosen + 1], views[:1], 0.25, 0.5, 0.25)
    assert torch.equal(again[0], images[chosen])


def test_a_distilled_student_learns_the_digits(student):
    trained = train_locally(student(**{"train.epochs": 10, "augment.strength": 0.0}))
    assert trained.metrics["test/top1"] > 0.6  # a guess is right once in ten
