"""A table of inputs that people have, with what must become of each; see tests/data/test_inputs.py."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deit_ray.data import shards
from tests.support.commands import call
from tests.support.sources import snapshot

RAW = re.compile(r"Traceback|\b\w+(Error|Exception)\b|b'|<class|\bNone\b")


@dataclass(frozen=True)
class Case:
    """An input and what must become of it.

    Attributes:
        make: writes it into a folder; may return the source's path, by default the folder.
        says: texts that stdout or stderr must have.
        train, test: the number of images; both None where it is refused.
        classes: the names of the classes.
        options: further arguments of `data prepare`.
    """

    make: Callable[[Path], Path | None]
    says: tuple[str, ...] = ()
    train: int | None = None
    test: int | None = None
    classes: tuple[str, ...] | None = None
    options: tuple[str, ...] = ()


class Inputs(dict[str, Case]):
    """The cases by name. Its methods are decorators of the functions that write the inputs."""

    def accepted(self, train: int, test: int, *says: str, classes: tuple[str, ...] | None = None, options=()):
        """The function writes an input that is prepared."""

        def register(make):
            self[make.__name__] = Case(make, says, train, test, classes, options)
            return make

        return register

    def refused(self, *says: str, options=()):
        """The function writes an input that is refused."""

        def register(make):
            self[make.__name__] = Case(make, says, options=options)
            return make

        return register


def check_input(case: Case, folder: Path) -> None:
    """Prepares a case's input, and compares what happens with what must happen."""
    source, out = folder / "source", folder / "out"
    source.mkdir()
    given = case.make(source) or source
    before = snapshot(source)
    ended = call("data", "prepare", given, "--out", out, *case.options)
    assert snapshot(source) == before
    assert not RAW.search(ended.out + ended.err), ended
    for text in case.says:
        assert text in ended.out + ended.err, ended
    if case.train is None:
        assert ended.status, ended
        assert ended.error
        assert set(os.listdir(out) if out.exists() else ()) <= {".parts", "unreadable.csv"}
        return
    assert ended.status == 0, ended
    manifest = shards.read_manifest(str(out))
    assert {split: manifest.rows(split) for split in manifest.splits} == {
        "train": case.train,
        "test": case.test,
    }
    assert case.classes in (None, tuple(manifest.classes))
    assert f"recognised as {manifest.source['format']}" in ended.out
