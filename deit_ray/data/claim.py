"""One preparation at a time writes a folder.

On a disk the operating system holds the lock, and releases it however the process ends. An object store has
no locks: there a preparation leaves a claim, an object that it renews while it runs. It gives way to any
other live claim. A claim that was not renewed for LEASE_S seconds counts as left behind.
"""

import contextlib
import json
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from deit_ray import storage
from deit_ray.errors import UnavailableError, UserError

LOCK = ".prepare.lock"
CLAIM = re.compile(re.escape(LOCK) + r"-[0-9a-f]{32}")
LEASE_S = 60.0
RENEW_S = 10.0
TRIES = 4
PAUSE_S = (0.2, 2.0)  # between tries


@contextlib.contextmanager
def claimed(out: str) -> Iterator[Callable[[], None]]:
    """Claims a folder, which is made if it is missing; yields a function that raises if the claim was lost.

    Raises:
        UserError: another preparation writes the folder.
        UnavailableError: the folder cannot be written.
    """
    with _locked(out) if storage.is_local(out) else _leased(out) as check:
        yield check


@contextlib.contextmanager
def _locked(out: str) -> Iterator[Callable[[], None]]:
    folder = Path(storage.local_path(out))
    path = folder / LOCK
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError(_busy(out, _read_holder(path))) from None
    except OSError as error:
        raise UnavailableError(f"--out {out}: cannot be written: {error.strerror or error}") from None
    try:
        path.write_text(json.dumps(_me()))
        yield lambda: None
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever waits for it notices, and makes a new one
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):  # it holds what was prepared
                folder.rmdir()


def check_unclaimed(out: str) -> None:
    """Refuses a folder on a disk that another preparation writes now. A later look is taken by `claimed`."""
    path = Path(storage.local_path(out)) / LOCK
    if not storage.is_local(out) or not path.exists():
        return
    try:
        with FileLock(path, timeout=0):
            return
    except Timeout:
        raise UserError(_busy(out, _read_holder(path))) from None
    except OSError as error:
        raise UnavailableError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def _me() -> dict:
    return {"host": os.uname().nodename, "pid": os.getpid(), "since": time.time()}


def _read_holder(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _busy(out: str, holder: dict) -> str:
    who = f" (process {holder['pid']} on {holder['host']})" if {"pid", "host"} <= holder.keys() else ""
    return (
        f"--out {out}: another data prepare{who} writes there now; wait for its end, or choose another --out"
    )


@contextlib.contextmanager
def _leased(out: str) -> Iterator[Callable[[], None]]:
    token = uuid.uuid4().hex
    uri = storage.join(out, f"{LOCK}-{token}")
    content = json.dumps(_me()).encode()
    for left in range(TRIES, 0, -1):
        storage.write_bytes(uri, content)
        others = _live_claims(out, uri)
        if not others:
            break
        storage.remove(uri)
        if left == 1 or time.time() - others[0].get("since", 0) > RENEW_S:
            raise UserError(
                _busy(out, others[0]) + f" (after a kill: {LEASE_S:.0f} s, until its claim has expired)"
            )
        time.sleep(random.uniform(*PAUSE_S))  # two that came at once give way to each other
    over, renewed = threading.Event(), [time.monotonic()]

    def renew() -> None:
        while not over.wait(RENEW_S):
            with contextlib.suppress(OSError, UnavailableError):  # `check` finds a claim that is too old
                storage.write_bytes(uri, content)
                renewed[0] = time.monotonic()

    def check() -> None:
        if time.monotonic() - renewed[0] > LEASE_S:
            raise UnavailableError(
                f"--out {out}: could not be reached for {LEASE_S:.0f} s; run the command again"
            )

    thread = threading.Thread(target=renew, name=f"claim {token}", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(UnavailableError, OSError):  # it expires
            storage.remove(uri)


def _live_claims(out: str, mine: str) -> list[dict]:
    """The other claims that are renewed, by the store's clock, and whose process is not known to be gone."""
    found, now = [], storage.modified_ns(mine)
    for name in storage.list_names(out):
        uri = storage.join(out, name)
        if not CLAIM.fullmatch(name) or uri == mine:
            continue
        try:
            holder, written = json.loads(storage.read_bytes(uri)), storage.modified_ns(uri)
        except (FileNotFoundError, ValueError):  # it was withdrawn
            continue
        if written is None or (now - written) / 1e9 > LEASE_S or _has_ended(holder, name):
            storage.remove(uri)
        else:
            found.append(holder)
    return found


def _has_ended(holder: dict, name: str) -> bool:
    """Whether a claim's process, or its thread in this process, is known to have ended."""
    if holder.get("host") != os.uname().nodename:
        return False
    if holder.get("pid") == os.getpid():
        token = name.rpartition("-")[2]
        return not any(thread.name == f"claim {token}" for thread in threading.enumerate())
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (PermissionError, KeyError, TypeError):
        return False
    return False
