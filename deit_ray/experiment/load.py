"""Experiment files: YAML with `extends`, and overrides on top.

Errors name the file, the key, the value and what is allowed.
"""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deit_ray.errors import UserError
from deit_ray.experiment.added import with_added_keys
from deit_ray.experiment.config import Experiment, field_keys, set_key
from deit_ray.experiment.searched import check_searched


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
        return key.strip(), yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: the value is not valid YAML: {_one_line(error)}") from None


def _read(path: Path, below: tuple[Path, ...]) -> tuple[dict, dict[str, str]]:
    """The tree of a file, merged with the files that it extends; and by dotted key, the file that set it."""
    if path.resolve() in below:
        chain = " -> ".join(p.name for p in (*below, path.resolve()))
        raise UserError(f"{path}: extends: the files extend one another: {chain}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_nearby(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not a valid experiment file: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: an experiment file is a mapping of keys to values, not {type(tree).__name__}"
        )
    parent = tree.pop("extends", None)
    if parent is None:
        return tree, dict.fromkeys(_leaves(tree), str(path))
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends: must be the path of one file, not {parent!r}")
    base, origins = _read(path.parent / parent, (*below, path.resolve()))
    base.pop("name", None)  # a name is the file's own
    return _merge(base, tree), origins | dict.fromkeys(_leaves(tree), str(path))


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
        near = difflib.get_close_matches(key, field_keys(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"allowed here: {_siblings(key)}"
        return f"{where}: no such key; {hint}"
    if error["type"] == "missing":
        return f"{where}: missing; it must be set"
    if not key:
        return f"{where}: {message}"
    return f"{where}: {error['input']!r} is not allowed: {message[:1].lower()}{message[1:]}"


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def _siblings(key: str) -> str:
    prefix = key.rpartition(".")[0]
    return ", ".join(k for k in field_keys() if k.rpartition(".")[0] == prefix)


def _nearby(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())


class _Loader(yaml.SafeLoader):
    """YAML that refuses Python tags and repeated keys, and in which 1e-3 is a number."""

    def construct_mapping(self, node, deep=False):
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} must be text", key_node.start_mark
                )
            if key in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is repeated", key_node.start_mark
                )
            keys.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
