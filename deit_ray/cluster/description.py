"""cluster.yaml on a laptop: it is read and checked without Ray, and says where a cluster keeps its files."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from deit_ray import storage
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment
from deit_ray.experiment.yaml_text import read_yaml

FILL_IN = "FILL_IN"
NEEDED = ("cluster_name", "provider.type", "auth.ssh_user")
WEIGHTS = ("distillation.teacher.weights", "student.init")


@dataclass(frozen=True)
class Description:
    """The description of a cluster, as `ray up` reads it.

    Attributes:
        path: of the file, as a person has written it.
        tree: the values of the file.
    """

    path: str
    tree: dict

    @property
    def name(self) -> str:
        return str(self.tree["cluster_name"])

    @property
    def bucket(self) -> str | None:
        """The S3 bucket of the cluster's data and results; None if the file names none."""
        bucket = self.tree["provider"].get("bucket")
        return None if bucket is None else str(bucket)

    @property
    def remedy(self) -> str:
        """The command that starts the cluster, or brings it up to date."""
        return f"ray up {shlex.quote(self.path)}"

    def place(self, key: str, uri: str) -> str:
        """A URI as the cluster sees it: a relative path means the bucket, anything else stays.

        data/NAME, where `deit-ray data prepare` writes on a laptop, is NAME in the bucket.

        Args:
            key: names the setting in messages.

        Raises:
            UserError: it is relative, and the file names no bucket; or it leads out of the bucket.
        """
        if "://" in uri or uri.startswith(("/", "~")) or not uri:
            return uri
        if self.bucket is None:
            raise UserError(
                f"{self.path}: provider.bucket: missing, so {key} {uri} cannot be placed; add the name of an "
                f"S3 bucket, or give {key} as s3://BUCKET/PATH"
            )
        parts = PurePosixPath(uri).parts
        if ".." in parts:
            raise UserError(f"{key}: {uri}: is outside this folder; give it as s3://BUCKET/PATH")
        if key == "data.uri" and len(parts) > 1 and parts[0] == "data":
            parts = parts[1:]
        return storage.join(f"s3://{self.bucket}", *parts)


def read_description(path: str) -> Description:
    """Reads and checks a cluster's description.

    Raises:
        UserError: naming the file, and the key that is missing or not filled in.
    """
    tree = read_tree(path)
    for key, value in _texts(tree):
        if FILL_IN in value:
            how = f"deit-ray doctor {shlex.quote(path)} says how to find its value"
            raise UserError(f"{path}: {key}: {value} is not filled in; {how}")
    return Description(path, tree)


def read_tree(path: str) -> dict:
    """The values of a cluster's description, which need not all be filled in.

    Raises:
        UserError: there is no such file, or it is no description of a cluster.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; name the cluster.yaml that `ray up` takes")
    tree = read_yaml(Path(path))
    for key in NEEDED:
        if not _value_of(tree, key):
            raise UserError(f"{path}: {key}: missing, so this is no description of a cluster for `ray up`")
    return tree


def move_to_cluster(experiment: Experiment, description: Description) -> tuple[Experiment, str | None]:
    """The experiment with data and results where the cluster keeps them, and a sentence about what moved.

    Raises:
        UserError: as `Description.place`; or the weights to begin with are a file of this machine.
    """
    for key in WEIGHTS:
        weights = experiment.get(key) if experiment.distils or key == "student.init" else None
        if (
            weights
            and not weights.startswith(("run:", "/", "~"))
            and weights not in ("scratch", "pretrained")
        ):
            raise UserError(
                f"{key}: {weights}: is a file of this machine, which the cluster cannot read; name a run on "
                "the cluster (run:NAME), pretrained, or an absolute path that its machines have"
            )
    moved = {}
    for key in ("data.uri", "results.uri"):
        uri = experiment.get(key)
        if (placed := description.place(key, uri)) != uri:
            moved[key] = placed
    if not moved:
        return experiment, None
    shown = ", ".join(f"{key} {experiment.get(key)} is {uri}" for key, uri in moved.items())
    return experiment.with_overrides(moved), f"on the cluster, {shown}"


def _value_of(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts of nested mappings and lists, with their dotted keys."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _texts(value, f"{key}.{name}".lstrip("."))
    elif isinstance(tree, list):
        for place, value in enumerate(tree):
            yield from _texts(value, f"{key}.{place}")
    elif isinstance(tree, str):
        yield key, tree
