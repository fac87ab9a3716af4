"""The terminal: messages, warnings and signs of life."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable
from typing import TextIO

from rich.console import Console as RichConsole

PIPED_WIDTH = 200  # columns, if the output is not a terminal
CLOSED = (errno.EPIPE, errno.EIO)  # the reader of a pipe has ended, or the terminal is gone


class Console:
    """Prints messages and warnings. An output that can no longer be written ends no command.

    Args:
        quiet: whether to print only warnings.

    Attributes:
        out, err: standard output and standard error.
    """

    def __init__(self, quiet: bool = False):
        self.err = RichConsole(file=_Lasting(sys.stderr), highlight=False, soft_wrap=True)
        lasting = _Lasting(sys.stdout, self._note_closed)
        self.out = RichConsole(file=lasting, highlight=False, soft_wrap=True)
        if not (self.out.is_terminal or self.out.is_jupyter):
            self.out.width, lasting.trims = PIPED_WIDTH, True
        self.quiet = quiet
        self._warned: set[str] = set()

    def say(self, text: str, style: str | None = None) -> None:
        if not self.quiet:
            self.out.print(text, style=style, markup=False)

    def begin(self, text: str) -> None:
        """Says on standard error what begins now, so that nobody looks at an empty screen."""
        if not self.quiet:
            self.err.print(text, style="dim", markup=False)

    def warn(self, text: str) -> None:
        self.err.print(f"warning: {text}", style="yellow", markup=False)

    def confirms(self, question: str) -> bool:
        """Asks a person; everything but y and yes is no."""
        self.err.print(f"{question} [y/N] ", end="", style="bold", markup=False)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def warn_once(self, text: str) -> None:
        """Warns, if this text has not been a warning of this method before."""
        if text not in self._warned:
            self._warned.add(text)
            self.warn(text)

    def _note_closed(self, reason: str) -> None:
        self.warn(
            f"standard output cannot be written any more ({reason}); the command continues, and its results "
            "are kept: deit-ray status shows them"
        )


class _Lasting:
    """A stream that becomes silent when it can no longer be written: what reads it has ended, the terminal is
    closed, or its disk is full.

    Args:
        stream: the stream.
        tell: called once with the reason, if more is written afterwards or the disk is full.

    Attributes:
        trims: whether the spaces at the ends of lines, with which tables are padded, are left out.
    """

    def __init__(self, stream: TextIO, tell: Callable[[str], None] = lambda reason: None):
        self.stream, self.tell = stream, tell
        self.reason: str | None = None
        self.trims = False

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if self.reason is not None:
            self._tell()
            return len(text)
        try:
            self.stream.write(re.sub(" +\n", "\n", text) if self.trims else text)
            return len(text)
        except OSError as error:
            self._end(error)
            return len(text)

    def flush(self) -> None:
        if self.reason is None:
            try:
                self.stream.flush()
            except OSError as error:
                self._end(error)

    def _end(self, error: OSError) -> None:
        self.reason = error.strerror or str(error)
        with contextlib.suppress(OSError, ValueError):  # the stream has no descriptor
            # what it still holds is written when Python exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        if error.errno not in CLOSED:
            self._tell()

    def _tell(self) -> None:
        tell, self.tell = self.tell, lambda reason: None
        tell(self.reason)
