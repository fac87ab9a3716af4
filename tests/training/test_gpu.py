"""What a GPU must compute as the CPU does, and what must not hold it up. Without a GPU, the CPU is tested."""

import contextlib
import dataclasses
import traceback

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.step import TINY, make_train_step, our_batches
from deit_ray.augment import kernel_cv2, kernel_torch
from deit_ray.augment.policy import Photometric
from deit_ray.experiment.config import Augment
from deit_ray.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from deit_ray.training.step import TrainStep
from tests.augment.test_randaugment import MEAN
from tests.support.photographs import photographs
from tests.support.training import CPU

DESCRIPTION = {"model": "none"}  # a checkpoint's


def make_step(device: torch.device, **keys) -> TrainStep:
    """A small distilled step with every part: on the device it augments, erases, mixes, clips, averages."""
    torch.set_num_threads(1)
    keys = {
        "augment.place": "device",
        "optim.clip_grad": 1.0,
        "optim.warmup_epochs": 0,
        "train.compile": "never",  # tests/training/test_compiled.py compiles
    } | keys
    return make_train_step(dataclasses.replace(TINY, device=device, batch=8), keys)


def batches(device: torch.device) -> list:
    return our_batches(dataclasses.replace(TINY, device=device, batch=8))


def losses(step: TrainStep, first: int, last: int) -> list[float]:
    made = batches(step.device)
    return [step(made[number % len(made)], number)["loss"].item() for number in range(first, last)]


@pytest.mark.parametrize("policy", ["randaugment", "three_augment", "none"])
def test_the_kernel_of_the_device_agrees_with_the_streams(device, policy):
    torch.set_num_threads(1)
    images, ids = np.tile(photographs(), (16, 1, 1, 1)), np.arange(32)
    augment = Augment(policy=policy, force_color_jitter=True, strength=1.5)
    stages = Photometric.of(augment, MEAN, 0).stages(0, ids, ids, 224, 224)
    by_stream = images.copy()
    kernel_cv2.augment_images(by_stream, stages)
    on_device = kernel_torch.augment_images(torch.from_numpy(images).to(device), stages).cpu().numpy()
    difference = np.abs(by_stream.astype(int) - on_device)
    assert (by_stream != images).any((1, 2, 3)).mean() > 0.5
    assert difference.mean() < 0.2
    assert np.quantile(difference, 0.999) <= 3


def test_inputs_are_the_same_on_every_device(device):
    keys = {"augment.policy": "none", "augment.color_jitter": 0.0, "augment.random_erasing": 0.9}
    found, expected = (make_step(d, **keys).inputs(batches(d)[0], 1) for d in (device, CPU))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-5)


def test_a_step_in_bfloat16_is_close_to_one_in_float32(device):
    steps = [make_step(device, **{"train.precision": name}) for name in ("float32", "bfloat16")]
    exact, rounded = (losses(step, 0, 1)[0] for step in steps)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.01)
    exact, rounded = (
        torch.cat([parameter.grad.flatten() for parameter in step.model.parameters()]) for step in steps
    )
    assert (rounded - exact).norm() / exact.norm() < 0.1


def test_a_resumed_step_equals_an_uninterrupted_one_and_does_not_wait_more(device, tmp_path):
    keys = {"optim.lr": 0.01, "train.precision": "float32"}
    whole, saved, resumed = (make_step(device, **keys) for _ in range(3))
    expected = losses(whole, 0, 6)
    losses(saved, 0, 3)
    save_checkpoint(tmp_path, saved, Progress(3), DESCRIPTION)
    assert load_checkpoint(tmp_path, resumed) == Progress(3)
    # a GPU adds in any order; without the optimizer's state the losses would be 0.006 and 0.015 away
    tolerance = 1e-3 if device.type == "cuda" else 0
    assert losses(resumed, 3, 6) == pytest.approx(expected[3:], rel=tolerance, abs=0)
    with nothing_waits(device):
        resumed(batches(device)[0], 6)


def test_the_host_never_waits_for_the_device_inside_a_step(device):
    step, made = make_step(device), batches(device)
    step(made[0], 0)  # the first step initialises libraries
    with nothing_waits(device):
        scalars = step(made[1], 1)
        with pytest.raises(RuntimeError, match="synchroniz"):
            scalars["loss"].item()
    assert scalars["loss"].item() > 0


@contextlib.contextmanager
def nothing_waits(device: torch.device):
    """Raises where the host would wait for a GPU."""
    if device.type != "cuda":
        with RefuseToWait():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class RefuseToWait(TorchDispatchMode):
    """Refuses the operations for whose results the host would wait if the tensors were on a GPU."""

    WAIT = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2")

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.__name__.partition(".")[0]
        by_mask = name in ("index", "index_put_") and any(
            place is not None and place.dtype == torch.bool for place in arguments[1]
        )
        if (name in self.WAIT or by_mask) and not _waits_only_for_the_cpu():
            raise RuntimeError(f"a synchronizing operation on a GPU: {function}")
        return function(*arguments, **(keywords or {}))


def _waits_only_for_the_cpu() -> bool:
    """Whether the caller would not do so on a GPU.

    torch's optimizers count steps in tensors on the CPU, and its `one_hot` checks labels on a CPU only.
    """
    stack = traceback.extract_stack()
    return any("torch/optim/" in frame.filename or frame.name == "smooth_targets" for frame in stack)
