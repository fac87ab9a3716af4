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
        super().__init__(signal.Signals(number).name)
        self.number = number


def interrupt_at_signals() -> None:
    """Has SIGTERM (kill, Slurm, a container that stops) and SIGHUP (a closed terminal) raise `Ended` in the
    main thread. A signal that this process was told to ignore, as by nohup, stays ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _raise)


def _raise(number: int, frame) -> None:
    raise Ended(number)


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """Puts back, at its end, the handlers that this process had set: `ray.init` replaces them.

    A process that has set no handler keeps Ray's.
    """
    own = {}
    if threading.current_thread() is threading.main_thread():
        own = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in own.items():
            if callable(handler) or handler == signal.SIG_IGN:
                signal.signal(number, handler)


def exit_status(error: BaseException) -> int:
    """The exit status after an interruption: 143 after SIGTERM, 129 after SIGHUP, 130 after Ctrl-C."""
    found = _first_of(Ended, error)
    return 128 + (found.number if found else signal.SIGINT)


def interruption_of(error: BaseException) -> Interrupted | None:
    """The message of an interruption: a second signal, while the first one's ends, raises its own exception
    over it."""
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
