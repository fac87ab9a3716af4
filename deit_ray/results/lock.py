"""One driver at a time: who drives a run or a study holds a lock on its folder, which the system lets go of however that one ends."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from deit_ray import storage
from deit_ray.errors import UnavailableError, UserError

LOCK = "driver.lock"
LOOKING_S = 1.0  # longer than anybody holds it who only looks


@contextlib.contextmanager
def driving(folder: str, name: str) -> Iterator[None]:
    """Holds a folder while it is driven. On an object store there are no locks, and it holds nothing.

    Raises:
        UserError: another process drives it.
        UnavailableError: the folder cannot be written.
    """
    if not storage.is_local(folder):
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
                    who = driver_of(folder) or {}
                    raise UserError(
                        f"{name}: is running already, on {who.get('host')} as process {who.get('pid')}; wait for its end, or end it"
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(json.dumps({"host": os.uname().nodename, "pid": os.getpid(), "since": time.time()}))
        file.flush()
        yield


def driver_of(folder: str) -> dict | None:
    """Who drives a folder now: host, pid, and since when; None where nobody does."""
    path = Path(storage.local_path(folder)) / LOCK
    if not path.exists():
        return None
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return json.loads(file.read() or "{}")
        return None
