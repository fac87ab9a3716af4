"""The search space: which fields of an experiment a study varies, and how."""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer, model_validator

from deit_ray.experiment.nearest import nearest_key

UNSEARCHABLE = (
    "name",
    "seed",
    "data.uri",
    "data.holdout",
    "train.workers",
    "train.epochs",
    "search",
    "cost",
    "tracking",
    "results",
)
KINDS = ("float", "log", "int", "choice")
SAMPLED = 256  # combinations of a space that are looked at; all of them, if it has no more
TRIES = 8  # combinations in which a value must have failed before it counts as one that can never run
Refusal = Callable[[dict], str | None]  # why an experiment with these values cannot run; None if it can


class Distribution(BaseModel):
    """One of `{float: [low, high]}`, `{log: [low, high]}`, `{int: [low, high]}`, `{choice: [a, b, ...]}`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: Literal["float", "log", "int", "choice"]
    values: list[Any]  # the choices, or the two bounds

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, given):
        if not isinstance(given, dict) or len(given) != 1 or next(iter(given)) not in KINDS:
            raise ValueError(
                "must be exactly one of {float: [low, high]}, {log: ...}, {int: ...}, {choice: [a, b]}"
            )
        kind, values = next(iter(given.items()))
        number = (int,) if kind == "int" else (int, float)
        plain = (str, int, float, bool, type(None))
        if not isinstance(values, list) or not values:
            raise ValueError(f"{kind} takes a list, not {values!r}")
        if kind == "choice":
            if not all(isinstance(value, plain) for value in values):
                raise ValueError(f"choice takes plain values, not {values!r}")
        elif len(values) != 2 or not all(isinstance(v, number) and not isinstance(v, bool) for v in values):
            raise ValueError(
                f"{kind} takes two {'whole ' if kind == 'int' else ''}numbers [low, high], not {values!r}"
            )
        elif not (math.isfinite(values[0]) and math.isfinite(values[1]) and values[0] < values[1]):
            raise ValueError(f"{kind} takes [low, high] with low below high, not {values!r}")
        elif kind == "log" and values[0] <= 0:
            raise ValueError(f"log takes bounds above 0, not {values!r}")
        return {"kind": kind, "values": values}

    @model_serializer
    def _as_yaml(self) -> dict[str, Any]:
        return {self.kind: self.values}

    @property
    def named(self) -> list[Any]:
        """The values that the file names: the choices, or the two bounds."""
        return self.values

    def contains(self, value: Any) -> bool:
        """Whether a trial could have this value. None lies in no range."""
        if self.kind == "choice":
            return any(value == choice and type(value) is type(choice) for choice in self.values)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        if self.kind == "int" and value != int(value):
            return False
        return self.values[0] <= value <= self.values[1]

    def draw(self, generator: random.Random) -> Any:
        """A random value."""
        if self.kind == "choice":
            return generator.choice(self.values)
        low, high = self.values
        if self.kind == "int":
            return generator.randint(low, high)
        if self.kind == "log":
            return math.exp(generator.uniform(math.log(low), math.log(high)))
        return generator.uniform(low, high)

    @property
    def size(self) -> float:
        """The number of different values."""
        if self.kind == "choice":
            return len({repr(value) for value in self.values})
        return self.values[1] - self.values[0] + 1 if self.kind == "int" else math.inf


def size_of(space: dict[str, Distribution]) -> float:
    """The number of combinations of values in a space."""
    return math.prod(d.size for d in space.values())


def combinations_of(space: dict[str, Distribution], most: int = SAMPLED) -> list[dict]:
    """All combinations of values in a space if there are at most so many, else random ones.

    The random ones are the same at every call.
    """
    if size_of(space) <= most:
        columns = [
            d.values if d.kind == "choice" else range(d.values[0], d.values[1] + 1) for d in space.values()
        ]
        return [dict(zip(space, values, strict=True)) for values in itertools.product(*columns)]
    generator = random.Random(0)
    return [{key: d.draw(generator) for key, d in space.items()} for _ in range(most)]


def impossible_values(space: dict[str, Distribution], refusal: Refusal) -> Iterator[tuple[str, Any, str]]:
    """Yields each value that the file names and that no trial can have: (key, value, why).

    A value is tried alone first, then with values of the other keys.
    """
    generator = random.Random(0)
    for key, distribution in space.items():
        others = {other: d for other, d in space.items() if other != key}
        for value in distribution.named:
            why = refusal({key: value})
            tries = 0
            while (
                why
                and others
                and tries < TRIES
                and refusal({key: value} | {other: d.draw(generator) for other, d in others.items()})
            ):
                tries += 1
            if why and (not others or tries == TRIES):
                yield key, value, why


def check_space(experiment, keys: list[str]) -> None:
    """Checks that the keys of a search space exist, and that some experiment can have each value it names.

    The bounds of a range must be allowed for the key. Whether they fit the other settings is not asked here:
    other values of the range may fit.

    Args:
        keys: all dotted keys of an experiment.

    Raises:
        ValueError: naming the key, the value that was given, and what is allowed.
    """
    space = experiment.search.space
    for key in space:
        if any(key == fixed or key.startswith(fixed + ".") for fixed in UNSEARCHABLE):
            raise ValueError(f"search.space.{key}: cannot be searched; all trials of a study share it")
        if key not in keys:
            near = nearest_key(key, keys)
            hint = f"; did you mean {near}?" if near else ""
            raise ValueError(f"search.space.{key}: no such key in an experiment{hint}")

    def refusal(overrides: dict) -> str | None:
        try:
            experiment.with_overrides({"search.space": {}, **overrides})
        except ValidationError as error:
            about_one_field = bool(error.errors()[0]["loc"])
            if about_one_field or any(space[key].kind == "choice" for key in overrides):
                return explain(error, overrides)
        return None

    for _, _, why in impossible_values(space, refusal):
        raise ValueError(why)


def explain(error: ValidationError, overrides: dict) -> str:
    """Why an experiment with these searched values is not allowed, in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    culprit = next((key for key in overrides if where == key or where.startswith(key + ".")), None)
    if culprit is None and len(overrides) == 1:
        (culprit,) = overrides
    given = ", ".join(f"{key}={overrides[key]!r}" for key in ([culprit] if culprit else overrides))
    message = first["msg"].removeprefix("Value error, ")
    return f"{f'search.space.{culprit}' if culprit else 'search.space'}: {given} is not allowed: {message}"
