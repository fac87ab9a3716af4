"""The terminal: messages and warnings."""

from rich.console import Console as RichConsole

PIPED_WIDTH = 200  # columns, if the output is not a terminal


class Console:
    """Prints messages and warnings.

    Args:
        quiet: whether to print only warnings.

    Attributes:
        out, err: standard output and standard error.
    """

    def __init__(self, quiet: bool = False):
        self.out = RichConsole(highlight=False, soft_wrap=True)
        if not (self.out.is_terminal or self.out.is_jupyter):
            self.out.width = PIPED_WIDTH
        self.err = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = quiet

    def say(self, text: str, style: str | None = None) -> None:
        if not self.quiet:
            self.out.print(text, style=style, markup=False)

    def warn(self, text: str) -> None:
        self.err.print(f"warning: {text}", style="yellow", markup=False)
