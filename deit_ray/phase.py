"""What a thread is doing, shown to whoever looks from outside (`top -H`, py-spy, bench/chaos.py): its name in the OS."""

import contextlib
import threading
from pathlib import Path


def show_phase(name: str) -> None:
    """Names the calling thread; 15 characters at most are kept. Does nothing where there is no /proc."""
    with contextlib.suppress(OSError):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
