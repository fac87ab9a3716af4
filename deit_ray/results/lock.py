"""One driver at a time: the process that drives a run or study locks its folder.

However the process ends, the operating system releases the lock. On S3 the process keeps a lease instead.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from deit_ray import storage
from deit_ray.errors import UnavailableError, UserError
from deit_ray.results import lease

LOCK = "driver.lock"
LOOKING_S = 1.0  # longer than `driver_of` holds the lock


@contextlib.contextmanager
def driving(folder: str, name: str) -> Iterator[None]:
    """Locks a folder while it is driven. On S3 it keeps the folder's lease, if the store can; other object
    stores have no locks, so folders there are not locked.

    Raises:
        UserError: another process drives the run or study.
        UnavailableError: the folder cannot be written.
    """
    if not storage.is_local(folder):
        with contextlib.ExitStack() as stack:
            if lease.is_possible(folder):
                with contextlib.suppress(storage.NoConditionsError):
                    stack.enter_context(lease.driving(folder, name, lambda: 0))
            yield
        return
    path = Path(storage.local_path(folder)) / LOCK
    try:
        path.touch()
    except OSError as error:
        raise UnavailableError(f"results.uri: {folder}: cannot be written: {error.strerror}") from None
    with path.open("r+") as file:
        deadline = time.monotonic() + LOOKING_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    driver = driver_of(folder) or {}
                    raise UserError(
                        f"{name}: is running already, on {driver.get('host')} as process "
                        f"{driver.get('pid')}; wait for its end, or end it"
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(json.dumps({"host": os.uname().nodename, "pid": os.getpid(), "since": time.time()}))
        file.flush()
        yield


def driver_of(folder: str) -> dict | None:
    """The process that drives a folder now: its host, pid and start time; None where none is known."""
    if not storage.is_local(folder):
        return lease.driver_of(folder) if lease.is_possible(folder) else None
    path = Path(storage.local_path(folder)) / LOCK
    if not path.exists():
        return None
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return json.loads(file.read() or "{}")
        return None
