"""The clock divides a run's time into shares, so that a run knows what it waits for."""

import time

import pytest
import torch

from deit_ray.training.clock import PARTS, Clock, split_training


class Waiting:
    """The part of a slow stream that a clock reads."""

    wait_s = 0.0

    def wait(self, seconds: float) -> None:
        begin = time.perf_counter()
        time.sleep(seconds)
        self.wait_s += time.perf_counter() - begin


def work(clock: Clock, stream: Waiting, wait_s: float, step_s: float, other_s: float) -> None:
    stream.wait(wait_s)
    with clock.step():
        time.sleep(step_s)
    clock.count(8, 1)
    time.sleep(other_s)


def shares(metrics: dict) -> dict[str, float]:
    return {part: metrics[f"perf/{part}_frac"] for part in PARTS}


def test_every_part_gets_its_time_and_the_shares_sum_to_one():
    begin, stream = time.perf_counter(), Waiting()
    clock = Clock(stream, torch.device("cpu"))
    work(clock, stream, 0.1, 0.05, 0.02)
    work(clock, stream, 0.1, 0.05, 0.02)
    clock.enter("evaluation")
    stream.wait(0.05)  # an evaluation's own
    clock.enter("checkpoint")
    assert (clock.images, clock.bad) == (16, 2)
    metrics, whole = clock.read(), time.perf_counter() - begin
    # no sleep is shorter than it was told, and the clock ran for `whole` seconds at most
    slept = {"data_wait": 0.2, "step": 0.1, "evaluation": 0.05, "checkpoint": 0.0, "other": 0.04}
    found = shares(metrics)
    assert all(found[part] >= slept[part] / whole for part in PARTS)
    assert found["checkpoint"] == 0  # none was made yet
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    assert 0 < metrics["perf/images_per_s"] <= 16 / (0.2 + 0.1 + 0.04)

    time.sleep(0.05)
    clock.enter("training")
    work(clock, stream, 0.0, 0.01, 0.0)
    clock.enter("evaluation")
    clock.enter("checkpoint")
    found = shares(clock.read())  # since the last read only
    assert found["checkpoint"] > found["step"] > found["data_wait"]  # slept 0.05, 0.01 and 0
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    assert clock.images == 0


def test_waiting_for_the_stream_costs_nothing_while_the_device_computes():
    # of 10 s the device computed 8, while the host waited 5 for batches: 2 at most held it up
    assert split_training(10, 8, 5) == {"data_wait": 2, "step": 8, "other": 0}
    # the host waited 1 s, the device was idle 2: the other second went elsewhere
    assert split_training(10, 8, 1) == {"data_wait": 1, "step": 8, "other": 1}
    assert split_training(10, 10.1, 1) == {
        "data_wait": 0,
        "step": 10,
        "other": 0,
    }  # a device's clock is not the host's


def test_a_step_lasts_as_long_as_the_device_computes(device):
    torch.set_num_threads(1)
    stream, size = Waiting(), 4096 if device.type == "cuda" else 512
    matrix = torch.randn(size, size, device=device)
    (matrix @ matrix).sum().item()
    clock = Clock(stream, device)
    for _ in range(8):
        with clock.step():
            for _ in range(20):
                product = matrix @ matrix
        stream.wait(0.0005)  # shorter than the step's computation, behind which it hides
    product.sum().item()
    clock.settle()
    clock.enter("evaluation")
    found = shares(clock.read())
    assert found["step"] > 0.9  # on a GPU, the host only queued work and slept
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
