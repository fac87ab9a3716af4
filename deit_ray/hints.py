"""Commands that messages name: each can be typed as it stands, in any folder."""

import os
import shlex
import shutil
import sys

from deit_ray import storage

PROGRAM = "deit-ray"
DEFAULT_RESULTS = "results"  # a folder below the working directory


def command(*words: str, results: str | None = None, address: str | None = None) -> str:
    """A command of deit-ray that can be copied into a terminal.

    Args:
        words: the command's name and arguments.
        results: URI of the results that it needs; the option is left out for the default folder `results`
            of the working directory.
        address: of the Ray cluster that it needs.
    """
    options = []
    if results is not None and storage.absolute(results) != os.path.abspath(DEFAULT_RESULTS):
        options += ["--results", storage.absolute(results)]
    if address is not None:
        options += ["--address", address]
    return shlex.join([_program(), *map(str, words), *options])


def anywhere(*words: str, results: str | None = None) -> str:
    """A command of deit-ray as text that people read later, in any folder: it names the results always.

    Args:
        words: the command's name and arguments.
        results: URI of the results that it needs.
    """
    options = [] if results is None else ["--results", storage.absolute(results)]
    return shlex.join([PROGRAM, *words, *options])


def line(*words: str) -> str:
    """A command of another program that can be copied into a terminal."""
    return shlex.join(words)


def _program() -> str:
    """The name or path by which this machine's shell finds deit-ray."""
    called = sys.argv[0]
    if os.path.basename(called) == PROGRAM and shutil.which(PROGRAM) is None:
        return os.path.abspath(called)  # the virtual environment is not active
    return PROGRAM
