"""Names a thread after what it is doing, for whoever looks at the machine: top -H, ps -L, or a test that
waits for a moment."""

import contextlib
import threading
from pathlib import Path


def show_phase(name: str) -> None:
    """Names the calling thread; Linux keeps the first 15 characters."""
    with contextlib.suppress(OSError):  # only Linux has the file, and nothing depends on it
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
