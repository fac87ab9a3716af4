"""Experiment files: YAML with `extends`, and overrides on top.

Errors name the file, the key, the value and what is allowed.
"""

import difflib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deit_ray.errors import UserError
from deit_ray.experiment.added import with_added_keys
from deit_ray.experiment.config import Experiment, field_keys, set_key
from deit_ray.experiment.nearest import nearest_key
from deit_ray.experiment.searched import check_searched
from deit_ray.experiment.yaml_text import explain_yaml, parse_yaml, read_yaml, show

DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+(e[-+]?\d+)?", re.IGNORECASE)
SECTIONS = frozenset(key.rpartition(".")[0] for key in field_keys()) - {"", "distillation.teacher"}


def load_experiment(path: str | Path, overrides: dict[str, Any] | None = None) -> Experiment:
    """The experiment that a YAML file describes.

    Args:
        path: the file. Its key `extends` names a base file, by a path relative to the file. The values of the
            file replace those of the base, key by key.
        overrides: dotted keys and values that replace the file's, such as {"optim.lr": 1e-3}.

    Raises:
        UserError: naming file, key, value and what is allowed.

    Example:
        >>> load_experiment("experiments/digits_student.yaml", {"optim.lr": 1e-3}).optim.lr
        0.001
    """
    tree, origins = _read(Path(path), ())
    tree.setdefault("name", Path(path).stem)
    experiment = _validate(tree, origins, str(path), overrides or {})
    check_searched(experiment, str(path))
    return experiment


def load_recorded(path: str | Path, overrides: dict[str, Any] | None = None) -> Experiment:
    """The experiment in a file that deit-ray, perhaps an earlier version, wrote into the results.

    Keys that were added since have the values of the earlier behaviour; see `added.ADDED_KEYS`.

    Raises:
        UserError: as `load_experiment`.
    """
    tree, origins = _read(Path(path), ())
    return _validate(with_added_keys(tree), origins, str(path), overrides or {})


def default_experiment(overrides: dict[str, Any] | None = None) -> Experiment:
    """The default experiment, without a data set or a teacher, with dotted keys replaced.

    Raises:
        UserError: naming key, value and what is allowed.
    """
    tree = {"name": "default", "data": {"uri": ""}, "distillation": {"kind": "none"}}
    return _validate(tree, {}, "the defaults", overrides or {})


def _validate(tree: dict, origins: dict[str, str], source: str, overrides: dict[str, Any]) -> Experiment:
    """The experiment of a tree with dotted keys replaced; errors name the file or --set."""
    for key, value in overrides.items():
        set_key(tree, key, value)
        origins = {k: o for k, o in origins.items() if k != key and not k.startswith(key + ".")}
        origins[key] = "override"
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(e, source, origins) for e in error.errors())) from None


def dump_experiment(experiment: Experiment, comment: str = "") -> str:
    """The experiment as the text of a file that `load_experiment` reads back to an equal one."""
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + yaml.safe_dump(experiment.as_dict(), sort_keys=False, default_flow_style=None, width=100)


def parse_override(text: str) -> tuple[str, Any]:
    """The key and the value of `a.b=value` from a command line; the value is read as YAML.

    Raises:
        UserError: the text has no key, or its value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text}: must be KEY=VALUE, such as optim.lr=1e-3")
    try:
        return key.strip(), parse_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: the value is not valid YAML: {explain_yaml(error)}") from None


def parse_overrides(texts: list[str]) -> dict[str, Any]:
    """The values of several `KEY=VALUE` by dotted key. The keys of a section replace those of the file one by
    one, as in a file that extends it.

    Raises:
        UserError: as `parse_override`.
    """
    parsed = [parse_override(text) for text in texts]
    return dict(leaf for key, value in parsed for leaf in _leaves_of_sections(key, value))


def _leaves_of_sections(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and key in SECTIONS:
        for name, own in value.items():
            yield from _leaves_of_sections(f"{key}.{name}", own)
    else:
        yield key, value


def _read(path: Path, below: tuple[Path, ...]) -> tuple[dict, dict[str, str]]:
    """The tree of a file, merged with the files that it extends; and by dotted key, the file that set it."""
    if path.resolve() in below:
        chain = " -> ".join(p.name for p in (*below, path.resolve()))
        raise UserError(f"{path}: extends: the files extend one another: {chain}")
    if not path.exists():
        by = f" ({below[-1]} extends it)" if below else ""
        raise UserError(f"{path}: no such file{_nearby(path)}{by}")
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        what = "empty" if tree is None else f"a {'list' if isinstance(tree, list) else 'single value'}"
        raise UserError(
            f"{path}: an experiment file is a mapping of keys to values, such as name: mine; "
            f"this one is {what}"
        )
    tree = _without_empty_sections(tree, SECTIONS)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree, dict.fromkeys(_leaves(tree), str(path))
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends: must be the path of one file, not {show(parent)}")
    base, origins = _read(path.parent / Path(parent).expanduser(), (*below, path.resolve()))
    base.pop("name", None)  # a name is the file's own
    return _merge(base, tree), origins | dict.fromkeys(_leaves(tree), str(path))


def _without_empty_sections(tree: dict, sections: frozenset[str], prefix: str = "") -> dict:
    """The tree without sections that have no keys, as where all of them are commented out."""
    return {
        key: _without_empty_sections(value, sections, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in tree.items()
        if value is not None or f"{prefix}{key}" not in sections
    }


def _merge(base: dict, top: dict) -> dict:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        # a search space replaces that of the base as a whole
        merged[key] = _merge(base[key], value) if both and key != "space" else value
    return merged


def _leaves(tree: dict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _leaves(value, f"{prefix}{key}.")
    return keys


def _explain(error: dict, path: str, origins: dict[str, str]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    origin = next((origins[k] for k in (key, *_parents(key)) if k in origins), path)
    where = f"{origin}: {key}" if key else path
    if origin == "override":
        where = f"{path}, --set {key}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        inner, near = _meant(key, error["input"], origin != "override")
        hint = f"did you mean {near}?" if near else f"allowed here: {_siblings(key)}"
        return f"{where}{inner}: no such key; {hint}"
    if error["type"] == "missing":
        return f"{where}: missing; it must be set"
    if not key:
        return f"{where}: {message}"
    if error["type"] in ("model_type", "dict_type"):
        message = f"must be a section of keys: {_children(key)}"
        if isinstance(error["input"], str) and re.match(r"\w+:\S", error["input"]):
            message += "; a space is missing after the colon"
    return f"{where}: {show(error['input'])} is not allowed: {message[:1].lower()}{message[1:]}{_hint(error)}"


def _meant(key: str, value: Any, in_file: bool) -> tuple[str, str | None]:
    """The key that is meant by an unknown one; for a section, by its first key: optimizer.lr means optim.lr.

    Args:
        in_file: whether the key is in a file, where `extends` may be meant.

    Returns:
        What follows `key` in the unknown key; the key that is meant, None if none is near.
    """
    near = nearest_key(key, [*field_keys(), "extends"] if in_file and "." not in key else field_keys())
    inner, section = "", near or key
    while isinstance(value, dict) and value and (near is None or _is_section(near)):
        first, value = next(iter(value.items()))
        inner += f".{first}"
        found = nearest_key(f"{section}{inner}", field_keys())
        if found and not _is_section(found):
            return inner, found
    return "", near


def _is_section(key: str) -> bool:
    return any(known.startswith(f"{key}.") for known in field_keys())


def _hint(error: dict) -> str:
    """How YAML may have read something else than a person meant."""
    value, kind = error["input"], error["type"]
    if isinstance(value, bool) and kind in ("literal_error", "string_type"):
        return "; YAML reads yes, no, on and off as true and false: put the word into quotes"
    if isinstance(value, str) and kind in ("float_type", "int_type", "bool_type") and _is_number(value):
        return "; write the number without quotes" if not re.match(r"[-+]?0\d|.*:", value) else ""
    if isinstance(value, str) and kind in ("float_type", "int_type") and DECIMAL_COMMA.fullmatch(value):
        written = value.replace(",", "." if kind == "float_type" else "")
        return f"; write {written}: a comma is no part of a number"
    if kind == "int_type" and isinstance(value, float) and value == value // 1:
        return f"; write {value:.0f}"
    if isinstance(value, (int, float)) and kind == "string_type":
        return "; put the text into quotes"
    if kind == "string_pattern_mismatch":
        return " (letters, digits, _, . and -, beginning with a letter or digit)"
    return ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def _siblings(key: str) -> str:
    prefix = key.rpartition(".")[0]
    return ", ".join(k for k in field_keys() if k.rpartition(".")[0] == prefix)


def _children(key: str) -> str:
    names = [known.removeprefix(f"{key}.") for known in field_keys() if known.startswith(f"{key}.")]
    return ", ".join(name for name in names if "." not in name) or "KEY: value"


def _nearby(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
