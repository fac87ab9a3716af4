"""How a worker spends its time from one report to the next: shares that sum to 1."""

import contextlib
import time
from collections.abc import Iterator

import torch

PARTS = ("data_wait", "step", "evaluation", "checkpoint", "other")


class Clock:
    """Divides a worker's time into `data_wait`, `step`, `evaluation`, `checkpoint`, and `other`, the rest.

    A GPU computes while the host continues. So the host's time inside a step says little about a GPU, and the
    host's wait for its next batch costs nothing while the GPU is busy. On a GPU, the time of a step is the
    time between its first and its last operation on the device. Two events in the device's queue measure this
    time. They are read when the loop waits for the loss anyway. A wait of the host counts only while the
    device is idle.

    `evaluation` includes the waits for the evaluation's batches. A checkpoint is written after the shares of
    its report were read, so its time counts in the next report.

    Args:
        stream: an object whose `wait_s` is the number of seconds spent waiting so far.
        device: the device of the steps.

    Attributes:
        images: number of images in the steps since the last `read`.
        bad: number of these images that could not be decoded.
    """

    def __init__(self, stream, device: torch.device):
        self.stream, self.on_gpu = stream, device.type == "cuda"
        self.images = self.bad = 0
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple] = []
        self._start("training", time.perf_counter())

    def _start(self, part: str, now: float) -> None:
        self._part, self._since = part, now
        self._waited, self._step_s = self.stream.wait_s, 0.0

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A context for one optimizer step, including the transfer of its batch to the device."""
        if self.on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            begin = time.perf_counter()
            yield
            self._step_s += time.perf_counter() - begin

    def count(self, images: int, bad: int) -> None:
        """Counts the images of a step, and how many of them could not be decoded."""
        self.images += images
        self.bad += bad

    def settle(self) -> None:
        """Reads the events of the steps so far. To be called when the loop has just waited for the device."""
        if self._events:
            self._events[-1][1].synchronize()
            self._step_s += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._events.clear()

    def enter(self, part: str) -> None:
        """Starts a part: `training` (the steps and the time between them), `evaluation` or `checkpoint`."""
        self.settle()
        now = time.perf_counter()
        elapsed = now - self._since
        if self._part == "training":
            spent = split_training(elapsed, self._step_s, self.stream.wait_s - self._waited)
        else:
            spent = {self._part: elapsed}
        for name, seconds in spent.items():
            self._spent[name] += seconds
        self._start(part, now)

    def read(self) -> dict[str, float]:
        """The shares of the time since the last `read`, up to the last `enter`, and the images per second."""
        total = max(sum(self._spent.values()), 1e-9)
        training = max(sum(self._spent[part] for part in ("data_wait", "step", "other")), 1e-9)
        metrics = {"perf/images_per_s": self.images / training} | {
            f"perf/{part}_frac": s / total for part, s in self._spent.items()
        }
        self._spent, self.images, self.bad = dict.fromkeys(PARTS, 0.0), 0, 0
        return metrics


def split_training(elapsed_s: float, step_s: float, waited_s: float) -> dict[str, float]:
    """Splits the time of the training part into `data_wait`, `step` and `other`.

    Steps on the device come first; waits count only while no step ran.
    """
    step_s = min(step_s, elapsed_s)
    data_wait = min(waited_s, elapsed_s - step_s)
    return {"data_wait": data_wait, "step": step_s, "other": elapsed_s - step_s - data_wait}
