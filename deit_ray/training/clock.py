"""What a worker's time goes to, from one report to the next: shares that sum to 1."""

import contextlib
import time
from collections.abc import Iterator

import torch

PARTS = ("data_wait", "step", "evaluation", "checkpoint", "other")


class Clock:
    """Keeps a worker's time by parts: `data_wait`, `step`, `evaluation`, `checkpoint`, and `other`, the rest.

    A GPU computes while the host goes on, so on one the host's time inside a step says little, and a wait of the host for
    its next batch costs nothing while the device is busy. There a step lasts from its begin to its end on the device, by
    two events in its queue, which are read where the loop waits for the loss anyway; and of the host's waiting counts what
    the device stood idle. An evaluation's part holds what it waits for. A checkpoint is made after its report, so it
    counts in the next one.

    Args:
        stream: `wait_s` of it is the seconds spent waiting so far.
        device: that steps run on.

    Attributes:
        images, bad: of the steps since the last `read`; bad ones could not be decoded.
    """

    def __init__(self, stream, device: torch.device):
        self.stream, self.on_gpu = stream, device.type == "cuda"
        self.images = self.bad = 0
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple] = []
        self._part, self._since, self._waited, self._step_s = (
            "training",
            time.perf_counter(),
            stream.wait_s,
            0.0,
        )

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Surrounds an optimizer step, its batch's way to the device included."""
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
        self.images += images
        self.bad += bad

    def settle(self) -> None:
        """Reads the events of the steps so far; to be called where the device has just been waited for."""
        if self._events:
            self._events[-1][1].synchronize()
            self._step_s += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._events.clear()

    def enter(self, part: str) -> None:
        """From now on the time is that of `training` (steps and what is between them), `evaluation` or `checkpoint`."""
        self.settle()
        now = time.perf_counter()
        elapsed = now - self._since
        if self._part == "training":
            spent = split_training(elapsed, self._step_s, self.stream.wait_s - self._waited)
        else:
            spent = {self._part: elapsed}
        for name, seconds in spent.items():
            self._spent[name] += seconds
        self._part, self._since, self._waited, self._step_s = part, now, self.stream.wait_s, 0.0

    def read(self) -> dict[str, float]:
        """The shares since the last `read`, up to the last `enter`, and the images trained on per second of training."""
        total = max(sum(self._spent.values()), 1e-9)
        training = max(sum(self._spent[part] for part in ("data_wait", "step", "other")), 1e-9)
        metrics = {"perf/images_per_s": self.images / training} | {
            f"perf/{part}_frac": s / total for part, s in self._spent.items()
        }
        self._spent, self.images, self.bad = dict.fromkeys(PARTS, 0.0), 0, 0
        return metrics


def split_training(elapsed_s: float, step_s: float, waited_s: float) -> dict[str, float]:
    """A stretch of training by parts: a step on the device comes first, and the host's waiting counts where no step ran."""
    step_s = min(step_s, elapsed_s)
    data_wait = min(waited_s, elapsed_s - step_s)
    return {"data_wait": data_wait, "step": step_s, "other": elapsed_s - step_s - data_wait}
