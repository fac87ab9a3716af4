"""Shows the progress of a long command and the time left: a bar on a terminal, else a line now and then."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),  # takes what is left of the width
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console.out, transient=True, expand=True) as bar:
            task, begin, count = bar.add_task(name, total=total, rate=""), time.monotonic(), 0

            def advance(done: int) -> None:
                nonlocal count
                count += done
                bar.update(task, advance=done, rate=f"{count / (time.monotonic() - begin + 1e-9):,.0f}/s")

            yield advance

    return show


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
