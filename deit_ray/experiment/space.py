"""The search space: which fields of an experiment a study varies, and how."""

import itertools
import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer, model_validator

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
MAX_CORNERS = 256  # with more combinations of bounds, each bound is checked alone


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


def check_space(experiment) -> None:
    """Checks that the experiment at every corner of its search space could run.

    Raises:
        ValueError: naming the key, the value that was given, and what is allowed.
    """
    space = experiment.search.space
    if not space:
        return
    for key in space:
        if any(key == fixed or key.startswith(fixed + ".") for fixed in UNSEARCHABLE):
            raise ValueError(f"search.space.{key}: cannot be searched; all trials of a study share it")
    for overrides in _corners(space):
        try:
            experiment.with_overrides({"search.space": {}, **overrides})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            culprit = next((key for key in overrides if where == key or where.startswith(key)), None)
            if first["type"] == "extra_forbidden":
                raise ValueError(f"search.space.{culprit or where}: no such key in an experiment") from None
            given = ", ".join(f"{key}={overrides[key]!r}" for key in ([culprit] if culprit else overrides))
            message = first["msg"].removeprefix("Value error, ")
            where = f"search.space.{culprit}" if culprit else "search.space"
            raise ValueError(f"{where}: {given} is not allowed: {message}") from None


def _corners(space: dict) -> list[dict]:
    if math.prod(len(d.values) for d in space.values()) <= MAX_CORNERS:
        return [
            dict(zip(space, values, strict=True))
            for values in itertools.product(*(d.values for d in space.values()))
        ]
    return [{key: value} for key, d in space.items() for value in d.values]
