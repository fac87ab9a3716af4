"""The photometric work on a sample after its crop: a policy, then colour jitter.

A policy is a function `(draws, levels, canvas) -> list of stages`. `augment.policy` may name a policy of any
importable module as package.module:function (docs/augmentation.md).
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from deit_ray import rng
from deit_ray.augment import jitter, randaugment, three_augment
from deit_ray.augment.levels import Levels
from deit_ray.augment.table import Canvas, Stage
from deit_ray.errors import UserError


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch's samples. Each is a hash of its sample's coordinates.

    Attributes:
        seed: the experiment's.
        epoch: the samples'.
        ids, views: int64 [batch].
    """

    seed: int
    epoch: int
    ids: np.ndarray
    views: np.ndarray

    def uniform(self, purpose: str, count: int, *coordinates: int) -> np.ndarray:
        """Uniform numbers [batch, count] in [0, 1).

        Every purpose, with its coordinates, has its own random numbers.
        """
        return rng.uniform(
            self.seed,
            purpose,
            self.epoch,
            self.ids[:, None],
            self.views[:, None],
            *coordinates,
            np.arange(count),
        )


@dataclass(frozen=True)
class Photometric:
    """The photometric work: everything that changes a sample's pixels between its crop and the erasing.

    Attributes:
        policy: a function, see the module's docstring.
        levels: its arguments, scaled by the strength.
        fill: RGB of the pixels that a geometric operation leaves empty.
        seed: the experiment's.
    """

    policy: Callable[[Draws, Levels, Canvas], list[Stage]]
    levels: Levels
    fill: tuple[int, int, int]
    seed: int

    @classmethod
    def of(cls, augment, mean: list[float], seed: int) -> "Photometric":
        """Reads an `augment` section. Empty pixels get the mean of the student's normalisation, as in timm.

        Raises:
            UserError: augment.policy cannot be imported.
        """
        return cls(
            find_policy(augment.policy),
            Levels.of(augment),
            tuple(min(255, max(0, round(255 * m))) for m in mean),
            seed,
        )

    def stages(self, epoch: int, ids: np.ndarray, views: np.ndarray, height: int, width: int) -> list[Stage]:
        """The stages that a kernel must apply, in order, to the samples with these coordinates."""
        if self.levels.strength == 0:
            return []
        draws, canvas = Draws(self.seed, epoch, ids, views), Canvas(height, width, self.fill)
        return [*self.policy(draws, self.levels, canvas), *jitter.stages(draws, self.levels, canvas)]


def find_policy(name: str) -> Callable[[Draws, Levels, Canvas], list[Stage]]:
    """Returns the policy that `augment.policy` names.

    Raises:
        UserError: its module or function cannot be found.
    """
    known = {"randaugment": randaugment.stages, "three_augment": three_augment.stages, "none": no_stages}
    if name in known:
        return known[name]
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"augment.policy: {name!r} cannot be found: {error}; allowed: {', '.join(known)}, or "
            "package.module:function of a module that can be imported wherever the stream and the workers run"
        ) from None


def no_stages(draws: Draws, levels: Levels, canvas: Canvas) -> list[Stage]:
    """The policy `none`."""
    return []


def place_of(place: str, device_type: str) -> str:
    """Where photometric work happens: `stream` or `device`. `auto` is the device if that is a GPU."""
    if place != "auto":
        return place
    return "device" if device_type == "cuda" else "stream"
