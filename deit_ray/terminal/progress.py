"""Shows the progress of a long command and the time left: a bar on a terminal, else a line now and then."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from deit_ray.terminal.console import Console
from deit_ray.terminal.format import duration

LINE_S = 10  # between lines, if the output is not a terminal

# Takes a name and the total number of items; returns a context in which the progress is shown. The value of
# the context is a function that takes the number of items done since its last call.
ShowProgress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]]


@contextlib.contextmanager
def silent(name: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


def shown_on(console: Console) -> ShowProgress:
    """Shows progress on a console."""

    @contextlib.contextmanager
    def show(name: str, total: int) -> Iterator[Callable[[int], None]]:
        if not console.out.is_terminal:
            yield _Lines(console, name, total)
            return
        with Progress(*_columns(name, total, console.out.width), console=console.out, transient=True) as bar:
            task, begin, count = bar.add_task(name, total=total, rate=""), time.monotonic(), 0

            def advance(done: int) -> None:
                nonlocal count
                count += done
                elapsed_s = time.monotonic() - begin
                rate = f"{count / elapsed_s:,.0f}/s" if elapsed_s > 1 else ""
                bar.update(task, advance=done, rate=rate)

            yield advance

    return show


def _columns(name: str, total: int, width: int) -> list[ProgressColumn]:
    """The columns of a bar: name and counts, and what else fits into the width without being cut."""
    room = width - len(name) - len(f" {total}/{total}")
    optional = ((TimeRemainingColumn(), 8), (TextColumn("{task.fields[rate]}"), 12), (BarColumn(None), 8))
    fitting: list[ProgressColumn] = []
    for column, needed in optional:
        if room > needed:
            room -= needed + 1
            fitting.insert(0, column)
    bar = [column for column in fitting if isinstance(column, BarColumn)]
    others = [column for column in fitting if column not in bar]
    return [TextColumn("{task.description}"), *bar, MofNCompleteColumn(), *others]


class _Lines:
    def __init__(self, console: Console, name: str, total: int):
        self.console, self.name, self.total, self.done = console, name, total, 0
        self.begin = self.said = time.monotonic()

    def __call__(self, done: int) -> None:
        self.done += done
        now = time.monotonic()
        if now - self.said > LINE_S:
            self.said, rate = now, self.done / (now - self.begin)
            left = duration((self.total - self.done) / rate)
            counts = f"{self.done:,} of {self.total:,}"
            self.console.say(f"  {self.name}: {counts}, {rate:,.0f}/s, about {left} left")
