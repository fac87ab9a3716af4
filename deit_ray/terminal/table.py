"""Tables that fit the terminal: columns are dropped from the right, and no cell is cut."""

from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

GAP = 2  # columns of the terminal between two columns of a table
LEAST = 16  # of a column that wraps


def wrapped(text: str, style: str = "") -> Table:
    """A text that takes as many lines as it needs, also where the console does not wrap."""
    grid = Table.grid()
    grid.add_column(overflow="fold")
    grid.add_row(Text(text, style))
    return grid


class FittedTable:
    """A table whose columns are dropped from the right until it fits. A line below it names them.

    Args:
        columns: the headings, the most important first.
        right: headings of the columns that are right-aligned.
        wraps: heading of a column whose text may take several lines, such as a sentence.
        keep: number of the first columns that are always shown; where even they do not fit, they wrap.
    """

    def __init__(self, *columns: str, right: tuple[str, ...] = (), wraps: str | None = None, keep: int = 1):
        self.columns, self.right, self.wraps, self.keep = list(columns), right, wraps, keep
        self.rows: list[tuple[list[Text], str | None]] = []

    def add_row(self, *cells: str | Text, style: str | None = None) -> None:
        """Adds a row. A text is shown as it is: brackets are no markup."""
        self.rows.append(([Text(c) if isinstance(c, str) else c for c in cells], style))

    def shown(self, width: int) -> int:
        """How many of the columns fit into a width."""
        widths = [self._least(i) for i in range(len(self.columns))]
        count = len(widths)
        while count > self.keep and sum(widths[:count]) + GAP * (count - 1) > width:
            count -= 1
        return count

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        count = self.shown(options.max_width)
        yield from self._table(count, options.max_width)
        if dropped := self.columns[count:]:
            yield wrapped(f"not shown, for want of room: {', '.join(dropped)}", "dim")

    def _table(self, count: int, width: int) -> Iterator[Table]:
        table = Table(box=None, pad_edge=False, header_style="bold")
        fits = sum(map(self._least, range(count))) + GAP * (count - 1) <= width
        for name in self.columns[:count]:
            may_wrap = name == self.wraps or not fits
            table.add_column(
                Text(name),
                justify="right" if name in self.right else "left",
                no_wrap=not may_wrap,
                overflow="fold",
            )
        for cells, style in self.rows:
            table.add_row(*cells[:count], style=style)
        yield table

    def _least(self, column: int) -> int:
        """The smallest width of a column in which nothing is cut."""
        texts = [self.columns[column], *(cells[column].plain for cells, _ in self.rows)]
        widest = max(map(cell_len, texts))
        return min(widest, LEAST) if self.columns[column] == self.wraps else widest


class PairTable:
    """Values of two things side by side, or below each other where the terminal is narrow.

    Args:
        title: heading of the column of keys.
        names: headings of the values.
        rows: both values by key.
    """

    def __init__(self, title: str, names: tuple[str, str], rows: dict[str, tuple[str, str]]):
        self.title, self.names, self.rows = title, names, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        keys = max(map(cell_len, [self.title, *self.rows]))
        room = (options.max_width - keys - 2 * GAP) // 2  # for one of the values, if they need all
        natural = [
            max(cell_len(name), *(cell_len(values[side]) for values in self.rows.values()))
            for side, name in enumerate(self.names)
        ]
        fits = keys + sum(natural) + 2 * GAP <= options.max_width
        if not fits and room < max(LEAST, *map(cell_len, self.names)):
            yield from self._stacked()
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(Text(self.title), no_wrap=True)
        for name, width in zip(self.names, natural, strict=True):
            table.add_column(Text(name), overflow="fold", max_width=None if fits else max(room, width - room))
        for key, values in self.rows.items():
            table.add_row(Text(key), *map(Text, values))
        yield table

    def _stacked(self) -> Iterator[Text]:
        yield Text(self.title, "bold")
        for key, values in self.rows.items():
            yield Text(key)
            for name, value in zip(self.names, values, strict=True):
                yield Text(f"  {name}: {value}")
