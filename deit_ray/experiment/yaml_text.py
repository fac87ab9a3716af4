"""YAML as people write it for experiments: read strictly, with one line about what is wrong.

Beside YAML's own rules: no Python tags, no repeated keys, and 1e-3 is a number. A number with a leading zero,
a time or a date is text, since YAML 1.1 would silently read 010 as 8 and 1:30 as 90.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from deit_ray.errors import UserError

MOST_NODES = 10_000  # values of a file; anchors can make more of a few lines
READ_AS_TEXT = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
NULL = "tag:yaml.org,2002:null"
MERGE = "tag:yaml.org,2002:merge"
PROBLEMS = (  # what is probably wrong, by YAML's words for it and the line up to the place
    (r"'\\t'", "a tab; indent with spaces"),
    (r"mapping values .* after .*: ", "a second colon; put a value that holds a colon into quotes"),
    (r"mapping values", "a key that is indented further than the key above, or the line above has no colon"),
    (r"but found '<block mapping start>'", "keys of one section must begin in the same column"),
    (r"but found '<scalar>'", "text behind a closing quote; put the whole value into quotes"),
    (r"<block end>, but found '[-?]'", "keys and list entries (-) cannot be mixed"),
    (r"end of stream", "a quote is not closed; it begins"),
    (r"expected ',' or", "a bracket is not closed, or a comma is missing; it begins"),
    (r"found '[]}]'", "a closing bracket without an opening one"),
    (r"cannot start any token", "put a value that begins with this character into quotes"),
)
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # how such a file begins


def read_yaml(path: Path) -> Any:
    """The value of a YAML file: UTF-8 or UTF-16, with or without a byte order mark.

    Raises:
        UserError: it cannot be read, is not text, or is not YAML.
    """
    try:
        content = path.read_bytes()
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name an experiment file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    encoding = "utf-16" if content.startswith(UTF_16) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line}: is not UTF-8; save the file as UTF-8") from None
    try:
        found = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not a valid experiment file: {explain_yaml(error)}") from None
    if count_nodes(found) > MOST_NODES:
        raise UserError(
            f"{path}: not a valid experiment file: more than {MOST_NODES} values, or an anchor in itself"
        )
    return found


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML, or has a Python tag or a repeated key.
    """
    return yaml.load(text, _Loader)


def explain_yaml(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML text, in one line: place and problem."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        reason = str(getattr(error, "reason", "") or str(error)).splitlines()[0]
        return f"{reason} (character {error.position})" if hasattr(error, "position") else reason
    place = f"line {mark.line + 1}, column {mark.column + 1}: "
    before = mark.buffer.splitlines()[mark.line][: mark.column] if mark.column else ""
    begun = getattr(error, "context_mark", None)
    for pattern, words in PROBLEMS:
        if re.search(pattern, f"{problem} after {before}"):
            return place + words + (f" in line {begun.line + 1}" if words.endswith("begins") else "")
    return place + problem


def show(value: Any, most: int = 80) -> str:
    """A value in one short line, lists and sections as YAML writes them."""
    if isinstance(value, (dict, list)):
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).strip()
    else:
        text = "nothing (null)" if value is None else repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def count_nodes(value: Any) -> int:
    """The number of values in nested lists and mappings; at most one more than `MOST_NODES`."""
    left, count = [value], 0
    while left and count <= MOST_NODES:
        node, count = left.pop(), count + 1
        if isinstance(node, dict):
            left += node.values()
        elif isinstance(node, (list, tuple)):
            left += node
    return count


class _Loader(yaml.SafeLoader):
    """YAML that refuses Python tags and repeated keys."""

    def construct_mapping(self, node, deep=False):
        keys = set()
        for key_node, value_node in node.value:
            if key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if str(key).isdecimal() and value_node.tag == NULL:
                raise yaml.constructor.ConstructorError(
                    None, None, "a comma in a number; write a decimal point, as in 0.5", key_node.start_mark
                )
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {show(key)} must be text", key_node.start_mark
                )
            if key in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is repeated", key_node.start_mark
                )
            keys.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in READ_AS_TEXT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?((0|[1-9][0-9_]*)\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?\d+)?$"
        r"|^[-+]?\d+[eE][-+]?\d+$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)
