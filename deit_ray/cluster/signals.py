"""Signals that end a command: they interrupt it as Ctrl-C does, so that it says how to resume."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from deit_ray.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Ended(KeyboardInterrupt):
    """A signal asks this process to end.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int):
        super().__init__("interrupted by " + signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def handling_signals() -> Iterator[None]:
    """While it is entered, SIGTERM (kill, Slurm, a container that stops) and SIGHUP (a closed terminal) raise
    `Ended` in the main thread.

    A signal that this process was told to ignore, as by nohup, stays ignored.
    """
    before = _handlers()
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _raise(number: int, frame) -> None:
    raise Ended(number)


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """Puts back, at its end, the handlers that this process had set: `ray.init` replaces them, and turns
    SIGTERM into an abort. A process that has set none keeps Ray's."""
    before = _handlers()
    try:
        yield
    finally:
        for number, handler in before.items():
            if callable(handler) or handler == signal.SIG_IGN:
                signal.signal(number, handler)


def _handlers() -> dict[int, object]:
    """The handlers of this process's signals; empty in another thread than the main one, which has none."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in SIGNALS}


def exit_status(error: BaseException) -> int:
    """The exit status after an interruption: 143 after SIGTERM, 129 after SIGHUP, 130 after Ctrl-C."""
    found = _first_of(Ended, error)
    return 128 + (found.number if found else signal.SIGINT)


def interruption_of(error: BaseException) -> Interrupted | None:
    """The message of an interruption. A second signal, while the command still ends because of the first,
    raises its own exception over it."""
    return _first_of(Interrupted, error)


def _first_of(kind: type, error: BaseException | None):
    """The first exception of a kind in the chain of what led to an exception."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, kind):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None
