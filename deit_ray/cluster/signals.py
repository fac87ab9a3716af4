"""Signals that end a command: they interrupt it as Ctrl-C does, so that it says how to resume."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from deit_ray.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Received:
    """The signals that have asked this process to end.

    Attributes:
        first: the first one's number; Ctrl-C's until one has come.
    """

    def __init__(self):
        self.first = signal.SIGINT
        self.count = 0

    def handle(self, number: int, frame) -> None:
        """Raises KeyboardInterrupt, which Ray passes on; it would replace an exception of our own."""
        if self.count == 0:
            self.first = number
        self.count += 1
        raise KeyboardInterrupt

    @property
    def exit_status(self) -> int:
        """143 after SIGTERM, 129 after SIGHUP, 130 after Ctrl-C."""
        return 128 + self.first


@contextlib.contextmanager
def handling_signals() -> Iterator[Received]:
    """While it is entered, SIGTERM (kill, Slurm, a container that stops) and SIGHUP (a closed terminal) raise
    KeyboardInterrupt in the main thread, as Ctrl-C does.

    A signal that this process was told to ignore, as by nohup, stays ignored.
    """
    before, received = _handlers(), Received()
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, received.handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            # after a signal this process is about to end, and another one must not cut that short
            after = signal.SIG_IGN if received.count else (handler or signal.SIG_DFL)
            signal.signal(number, after)


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """Puts back, at its end, the handlers that this process had set: `ray.init` replaces them, and turns
    SIGTERM into an abort. A process that has set none keeps Ray's."""
    before = _handlers()
    own = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_DFL)}
    try:
        yield
    except SystemExit:  # raised by Ray's handler
        if callable(own.get(signal.SIGTERM)):
            own[signal.SIGTERM](signal.SIGTERM, None)
        raise
    finally:
        for number, handler in own.items():
            signal.signal(number, handler)


def _handlers() -> dict[int, object]:
    """The handlers of this process's signals; empty in another thread than the main one, which has none."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in SIGNALS}


def interruption_of(error: BaseException | None) -> Interrupted | None:
    """The message of an interruption. A second signal, while the command still ends because of the first,
    raises its own exception over it."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Interrupted):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None
