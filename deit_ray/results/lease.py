"""Who drives a study on an object store: the driver keeps a lease, an object that it renews.

A lease informs people and refuses a second driver, as `lock` does in a folder. It is no fence: a driver that
was cut off for LEASE_S seconds loses it. `study/object_log.py` has the fence. The lease also notes how many
entries the study's database has at least.
"""

import contextlib
import importlib.util
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from deit_ray import storage
from deit_ray.errors import UnavailableError, UserError

LEASE = "driver.json"
LEASE_S = 30.0
RENEW_S = 8.0
RELEASE_S = 5.0  # longest wait for a renewal under way, at the end


def is_possible(folder: str) -> bool:
    """Whether this machine can keep a lease of a folder, if the folder's store has conditional writes."""
    plain = folder.startswith("s3://") and not {"?", "@"} & set(folder)  # boto3 would not obey them
    return plain and importlib.util.find_spec("boto3") is not None


@contextlib.contextmanager
def driving(folder: str, name: str, count: Callable[[], int]) -> Iterator[int]:
    """Keeps the lease of a folder while it is driven; yields the last driver's number of entries.

    Args:
        count: gives the number of entries that the database has now.

    Raises:
        UserError: another process drives the study.
        UnavailableError: the lease cannot be written.
    """
    uri, renewed = storage.join(folder, LEASE), 0
    me = {"host": os.uname().nodename, "machine": _machine(), "pid": os.getpid(), "since": time.time()}
    me["token"] = uuid.uuid4().hex
    (tag, entries), over = _acquire(uri, name, me), threading.Event()

    def renew() -> None:
        nonlocal tag, renewed
        while not over.wait(RENEW_S):
            renewed += 1
            noted = {"entries": max(entries, count()), "renewed": renewed}  # each version needs its own tag
            try:
                tag = storage.write_version(uri, json.dumps(me | noted).encode(), tag)
            except storage.ChangedError:
                return  # another driver has it; this one ends at its next entry in the database
            except UnavailableError:
                continue  # the next renewal may come in time

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield entries
    finally:
        over.set()
        thread.join(RELEASE_S)
        if not thread.is_alive():
            with contextlib.suppress(storage.ChangedError, UnavailableError):  # it expires
                storage.write_version(uri, json.dumps({"entries": max(entries, count())}).encode(), tag)


def driver_of(folder: str) -> dict | None:
    """The process that drives a folder now: its host, pid and start time; None where there is none."""
    found = storage.read_version(storage.join(folder, LEASE))
    return None if found is None else _holder(found)


def _acquire(uri: str, name: str, me: dict) -> tuple[str, int]:
    """Writes the lease, if no other process has it; returns its tag, and the last driver's entries."""
    while True:
        found = storage.read_version(uri)
        if found is not None and (holder := _holder(found)) is not None:
            raise UserError(
                f"{name}: is running already, on {holder['host']} as process {holder['pid']}; wait for its "
                f"end, or end it (after a kill: {LEASE_S:.0f} s, until its lease has expired)"
            )
        entries = 0 if found is None else json.loads(found.content)["entries"]
        content = json.dumps(me | {"entries": entries}).encode()
        try:
            return storage.write_version(uri, content, None if found is None else found.tag), entries
        except storage.ChangedError:  # another process came first; look again
            continue


def _holder(lease: storage.Version) -> dict | None:
    """The process that holds a lease; None if it was released, has expired, or its process has ended."""
    holder = json.loads(lease.content)
    if "pid" not in holder or lease.age_s > LEASE_S or _has_ended(holder):
        return None
    return holder


def _machine() -> str:
    """Identifies this machine, since it was started, and its space of process numbers: names can be equal."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # only Linux has these files
        return ""


def _has_ended(holder: dict) -> bool:
    """Whether the process is known to have ended: only on its own machine can that be seen."""
    if (holder["host"], holder["machine"]) != (os.uname().nodename, _machine()):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another person's process
        return False
    return False
