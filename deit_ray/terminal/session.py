"""The settings of a call: which Ray it uses, where it looks for results, and where its messages go."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from deit_ray.terminal.console import Console


@dataclass(frozen=True)
class Session:
    """The settings that the functions of this package take besides their subject.

    Attributes:
        address: address of a Ray cluster; by default RAY_ADDRESS, or a local Ray for the call.
        results: folder in which existing runs and studies are looked up. New ones go where `results.uri` of
            their experiment says.
        console: where messages go; by default only warnings are shown.
        verbose: whether Ray's own output is shown too.

    Example:
        >>> import deit_ray
        >>> deit_ray.Session(address="auto").results
        'results'
    """

    address: str | None = None
    results: str = "results"
    console: Console = field(default_factory=lambda: Console(quiet=True))
    verbose: bool = False

    def warn_of(self, notes: Iterable[str]) -> None:
        """Shows each note as a warning."""
        for note in notes:
            self.console.warn(note)

    def connected(self, modules: tuple[str, ...] = ()) -> contextlib.AbstractContextManager[None]:
        """A context with a Ray to work with; see `connect.connected`.

        Args:
            modules: dotted names of what the processes of a local Ray import before they are needed.

        Raises:
            UserError: there is no Ray at the address.
        """
        from deit_ray.cluster import connect  # here, since most calls need no Ray

        console = self.console
        return connect.connected(self.address, self.verbose, console.warn, modules, console.begin)
