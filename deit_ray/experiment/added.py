"""Settings that later versions added, and the values with which they change nothing.

Every experiment file in the results has all keys of the version that wrote it. A key that it lacks was added
later: a study or run then goes on with the value in this table, whatever the default of new experiments is.
"""

from typing import Any

# A new field in config.py needs one row here: its dotted key, and the value of the earlier behaviour.
ADDED_KEYS: dict[str, Any] = {
    "optim.ema_warmup": "ramp",
    "optim.label_loss": "cross_entropy",
    "optim.kind": "adamw",
    "optim.schedule_per": "step",
    "student.layer_scale": None,
    "train.compile": "never",
    "train.gpus_per_worker": 1.0,
    "student.drop_path_rule": "linear",
    "results.keep": "all",
}


def with_added_keys(tree: dict) -> dict:
    """A recorded experiment, as nested mappings, with the keys that it lacks and `ADDED_KEYS` has.

    A key of a section that is null, such as a missing teacher's, is not added.
    """
    completed = tree
    for key, value in ADDED_KEYS.items():
        completed = _with_key(completed, key.split("."), value)
    return completed


def _with_key(tree: dict, path: list[str], value: Any) -> dict:
    first, *rest = path
    if not rest:
        return tree if first in tree else {**tree, first: value}
    section = tree.get(first, {})
    return {**tree, first: _with_key(section, rest, value)} if isinstance(section, dict) else tree
