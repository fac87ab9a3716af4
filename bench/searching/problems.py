"""Functions that stand for trainings in virtual time: an accuracy after each epoch, for any searched values.

A problem is one instance of such a function: its seed places the optimum, so that no method can be tuned to
one place. All methods of a seed search the same instance with the same noise.
"""

import math
import zlib
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from deit_ray import rng
from deit_ray.experiment.space import Distribution

EPOCHS = 30
TOLERANCE = 0.01  # a trial is good enough within 1% of the best reachable value


class Problem(ABC):
    """A function of searched values and epochs, to be maximised.

    Attributes:
        seed: places the optimum, and is the seed of the noise.
        space: the search space by key, as in an experiment file.
        recipe: the values with which every method begins.
        best: the best reachable value.
    """

    epochs = EPOCHS
    space: ClassVar[dict[str, dict]]
    recipe: dict[str, float]
    best: float

    def __init__(self, seed: int):
        self.seed = seed
        self._distributions = {key: Distribution.model_validate(d) for key, d in self.space.items()}

    @abstractmethod
    def true(self, params: dict) -> np.ndarray:
        """The values without noise after epochs 1, 2, ..., a float64 array of `epochs` elements."""

    @abstractmethod
    def observed(self, params: dict) -> np.ndarray:
        """The values that a training would report after epochs 1, 2, ..., a float64 array."""

    def is_reached(self, value: float) -> bool:
        """Whether a value without noise is within 1% of the best reachable one."""
        return value >= (1 - TOLERANCE) * self.best

    def pace(self, params: dict) -> float:
        """The virtual time of one epoch of a trial, 0.8 to 1.25: trials overtake each other."""
        return 0.8 * 1.5625 ** float(rng.uniform(self.seed, "pace", self._key(params)))

    def unit(self, params: dict) -> np.ndarray:
        """The values as places between their bounds, 0 to 1, on the scale on which they are searched."""
        return np.array([self._place(key, params[key]) for key in self.space])

    def at(self, places: np.ndarray) -> dict[str, float]:
        """The values at places between their bounds: the inverse of `unit`, whole numbers rounded."""
        return {key: self._value(key, float(place)) for key, place in zip(self.space, places, strict=True)}

    def noise(self, purpose: str, params: dict, count: int) -> np.ndarray:
        """Draws from a standard normal distribution; equal for equal values, whoever proposed them."""
        epochs = np.arange(count)
        first, second = (
            rng.uniform(self.seed, f"{purpose} {half}", self._key(params), epochs) for half in (1, 2)
        )
        return np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)  # Box and Muller

    def _key(self, params: dict) -> int:
        return zlib.crc32(repr([float(params[key]) for key in self.space]).encode())

    def _place(self, key: str, value: float) -> float:
        distribution = self._distributions[key]
        low, high = distribution.values
        if distribution.kind == "log":
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)

    def _value(self, key: str, place: float) -> float:
        distribution = self._distributions[key]
        low, high = distribution.values
        if distribution.kind == "log":
            value = math.exp(math.log(low) + place * (math.log(high) - math.log(low)))
        else:
            value = low + place * (high - low)
        return round(value) if distribution.kind == "int" else min(max(value, low), high)


class LearningCurves(Problem):
    """Accuracies as small vision transformers have them, for five settings, of which one changes nothing.

    The accuracy after the last epoch is 0.8 at the optimum. Each setting lowers it by its `COST` times
    z^2 / (1 + |z|), where z is its distance from the optimum in units of its `WIDTH`: a parabola near the
    optimum, a straight line far from it. The best learning rate is narrow, and depends on weight decay.

    The accuracy rises from 0.1 towards the last one by an exponential whose time constant is 3 epochs, longer
    with a lower learning rate. The first epochs are deceptive: strong augmentation and depth lower the
    accuracy there, by an amount that fades with a time constant of 2 epochs, wherever their optimum is. So
    curves cross. A rate that is far too high diverges: it learns fastest, then falls to 0.1.

    A reported accuracy has two kinds of normal noise: 0.004 for each evaluation (as on 10,000 images at
    0.8), and 0.003 for the whole training, as another seed would give.
    """

    space: ClassVar = {
        "optim.lr": {"log": [1e-5, 1e-2]},
        "optim.weight_decay": {"log": [1e-3, 1.0]},
        "augment.strength": {"float": [0, 2]},
        "student.depth": {"int": [2, 12]},
        "augment.random_erasing": {"float": [0, 0.5]},  # changes nothing
    }
    best = 0.8
    CHANCE = 0.1
    COST = np.array([0.045, 0.012, 0.02, 0.015])
    WIDTH = np.array([0.10, 0.35, 0.35, 0.35])
    RIDGE = 0.2  # a larger weight decay wants a lower rate
    TIME, FADES = 3.0, 2.0  # epochs
    BURDEN = 0.2
    DIVERGES = 0.45  # distance of the rate above the best one, as part of its range
    NOISE, SEED_NOISE = 0.004, 0.003

    def __init__(self, seed: int):
        super().__init__(seed)
        self.after = np.arange(1, self.epochs + 1)
        draws = rng.uniform(seed, "optimum", np.arange(len(self.space)))
        # whole depths, so that the optimum can be reached
        self.optimum = self.unit(self.at(0.25 + 0.5 * draws))
        self.recipe = self._near_optimum()

    def true(self, params: dict) -> np.ndarray:
        distance = self._distance(params)
        z = distance / self.WIDTH
        final = self.best - float(np.sum(self.COST * z**2 / (1 + np.abs(z))))
        constant = self.TIME * math.exp(-0.5 * distance[0])
        missing = np.exp(-self.after / constant) * (final - self.CHANCE)
        _, _, strength, depth, _ = self.unit(params)
        burden = self.BURDEN * (0.6 * strength + 0.4 * depth) * np.exp(-self.after / self.FADES)
        values = final - missing - burden
        if distance[0] > self.DIVERGES:
            values[self._last_good_epoch(params) :] = self.CHANCE
        return np.maximum(values, self.CHANCE)

    def observed(self, params: dict) -> np.ndarray:
        noise = self.NOISE * self.noise("evaluation", params, self.epochs)
        return self.true(params) + noise + self.SEED_NOISE * self.noise("training", params, 1)

    def _distance(self, params: dict) -> np.ndarray:
        """The signed distances of lr, weight decay, strength and depth from their optimum."""
        distance = (self.unit(params) - self.optimum)[:4]
        distance[0] += self.RIDGE * distance[1]
        return distance

    def _last_good_epoch(self, params: dict) -> int:
        return 2 + int(8 * rng.uniform(self.seed, "divergence", self._key(params)))

    def _near_optimum(self) -> dict[str, float]:
        """A usable recipe: each setting is 0.15 to 0.35 of its range away from the optimum."""
        count = len(self.space)
        away = 0.15 + 0.2 * rng.uniform(self.seed, "recipe", np.arange(count))
        sign = np.where(rng.uniform(self.seed, "side", np.arange(count)) < 0.5, -1, 1)
        places = self.optimum + sign * away
        inside = (places >= 0) & (places <= 1)
        return self.at(np.where(inside, places, self.optimum - sign * away))


class MFHartmann(Problem):
    """MFHartmann3 of mf-prior-bench 1.10.0 (github.com/automl/mf-prior-bench, Apache-2.0), preset `good`.

    The formula is in its src/mfpbench/synthetic/hartmann/generators.py: the Hartmann function of three
    dimensions, flattened by a bias and disturbed by the absolute value of normal noise, both of which shrink
    with the logarithm of the fidelity and vanish at the highest one. Here it is negated, a fidelity is an
    epoch, there are 30 of them instead of 100 (the formula takes any number), and each seed has its own
    noise. The recipe is a random point.
    """

    space: ClassVar = {
        "augment.strength": {"float": [0, 1]},
        "augment.mixup": {"float": [0, 1]},
        "augment.random_erasing": {"float": [0, 1]},
    }
    BIAS, NOISE = 2.5, 2.0
    ALPHA = np.array([1.0, 1.2, 3.0, 3.2])
    A = np.array([[3.0, 10, 30], [0.1, 10, 35], [3.0, 10, 30], [0.1, 10, 35]])
    P = 1e-4 * np.array([[3689, 1170, 2673], [4699, 4387, 7470], [1091, 8732, 5547], [381, 5743, 8828]])
    optimum = (0.114614, 0.555649, 0.852547)
    best = 3.86278

    def __init__(self, seed: int):
        super().__init__(seed)
        self.recipe = self.at(rng.uniform(seed, "recipe", np.arange(len(self.space))))
        self.shortfall = 1 - np.log(np.arange(1, self.epochs + 1)) / math.log(self.epochs)

    def true(self, params: dict) -> np.ndarray:
        inner = np.exp(-np.sum(self.A * (self.unit(params) - self.P) ** 2, axis=1))
        return (self.ALPHA - self.BIAS * self.shortfall[:, np.newaxis]) @ inner

    def observed(self, params: dict) -> np.ndarray:
        noise = np.abs(self.noise("evaluation", params, self.epochs))
        return self.true(params) - self.NOISE * noise * self.shortfall


PROBLEMS = {"curves": LearningCurves, "mfhartmann": MFHartmann}
