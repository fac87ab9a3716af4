"""A study's database on an object store: Optuna's journal of operations, as numbered objects.

The driver writes each operation, or some that belong together, as the next object, on the condition that the
object does not exist. So an operation is stored, whole, before the driver acts on it. If another driver has
written the object, the write fails and this driver ends: that is the fence. No object is ever deleted, since
a free number would let an old driver through the fence; a log in which one is missing is refused. MERGED
objects at a time are copied into one, which is read instead of them.
"""

import contextlib
import itertools
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from deit_ray import storage
from deit_ray.errors import UnavailableError, UserError

MERGED = 1000  # objects in a merged one
MERGES = "merged"  # the folder of the merged objects
READERS = 16  # objects that are read at once
LATE_WRITES = 10  # of an earlier driver, that a new driver waits for at most
NAME = re.compile(r"\d{8}\.json")  # of an object, see `_name`

Log = dict[str, Any]


class ObjectLog(BaseJournalBackend):
    """The objects below a URI. It reads, until `begin_writing`; only a study's driver may write.

    While it reads, each `read_logs` looks for new objects. While it writes, there can be no objects but its
    own, and `read_logs` needs no request.

    Args:
        uri: folder of the objects.
        name: name of the study, for messages.
    """

    def __init__(self, uri: str, name: str):
        self.uri, self.name = uri, name
        self.position = 0  # the number of the next object
        self.unmerged: list[Log] = []  # logs of the objects since the last whole MERGED
        self.missing: dict[int, list[Log]] = {}  # merged objects that are not written yet, by first number
        self.first, self.ahead = 0, []  # logs that Optuna has not got yet, and the number of the first one
        self.me: dict | None = None  # the driver, while it writes
        self.together: list[Log] | None = None  # logs that are to be one object; see `as_one`
        self.failure: UserError | None = None  # of a write: none may follow

    def read_logs(self, log_number_from: int) -> list[Log]:
        """The logs from a number on, oldest first."""
        if self.me is None:
            self._read_on()
        if log_number_from < self.first:
            return list(itertools.islice(self._all_logs(), log_number_from, None))
        self.ahead = self.ahead[log_number_from - self.first :]
        self.first = log_number_from
        return list(self.ahead)

    def append_logs(self, logs: list[Log]) -> None:
        """Writes logs as the next object.

        Raises:
            UserError: another driver has written the object, or this process does not drive the study.
            UnavailableError: the store cannot be written or reached. No more can then be written.
        """
        if self.failure is not None:
            raise self.failure
        if self.me is None:
            raise UserError(f"{self.name}: only the driver of a study may write its database")
        logs = json.loads(json.dumps(logs))  # what Optuna then gets is what every reader gets
        if self.together is None:
            self._write_if_first(logs)
        else:
            self.together += logs
        self.ahead += logs

    def _write_if_first(self, logs: list[Log]) -> None:
        """Writes logs as the next object, unless another driver has; then this driver never writes again."""
        try:
            self._write(logs)
        except storage.ChangedError:
            self.failure = UserError(self._fenced())
            raise self.failure from None
        except UnavailableError as error:
            self.failure = error
            raise

    @contextlib.contextmanager
    def as_one(self) -> Iterator[None]:
        """What Optuna appends meanwhile is written at the end, as one object: all of it, or nothing.

        Raises:
            UserError, UnavailableError: as for `append_logs`.
        """
        if self.me is None or self.together is not None:
            yield
            return
        self.together = []
        try:
            yield
        finally:
            logs, self.together = self.together, None
            if logs:
                self._write_if_first(logs)

    def begin_writing(self, known: int = 0) -> None:
        """Lets this process write, and no other from now on: its first object is the fence.

        Args:
            known: the number of objects that there are at least.

        Raises:
            UserError: an object was deleted or changed.
            UnavailableError: the store cannot be read or written.
        """
        self.me = {"host": os.uname().nodename, "pid": os.getpid(), "since": time.time()}
        self.me["token"] = uuid.uuid4().hex  # no other process writes an equal object
        self.failure = None
        try:
            for _ in range(LATE_WRITES):
                self._read_on()
                if self.position < known:
                    raise UserError(self._damaged(self._object(known - 1), "is missing"))
                if self.position == 0:
                    return  # the first operation is the fence
                try:
                    self._write([])
                    return
                except storage.ChangedError:
                    continue  # a late write of an earlier driver
            raise UserError(self._fenced())
        except BaseException:
            self.me = None
            raise

    def end_writing(self) -> None:
        """Only reads from now on."""
        self.me = None

    def _fenced(self) -> str:
        found = storage.read_version(self._object(self.position))
        driver = {} if found is None else json.loads(found.content)["driver"]
        who = f"process {driver.get('pid')} on {driver.get('host')}"
        return f"{self.name}: another driver, {who}, has taken over the study; nothing is lost"

    def _write(self, logs: list[Log]) -> None:
        """Writes the next object."""
        content = json.dumps({"driver": self.me, "logs": logs}, separators=(",", ":")).encode()
        storage.write_version(self._object(self.position), content, None)
        self._count(logs)
        while self.missing:
            self._merge(min(self.missing))

    def _take(self, logs: list[Log]) -> None:
        """Takes the logs of the next object, which was read."""
        self.ahead += logs
        self._count(logs)

    def _count(self, logs: list[Log]) -> None:
        """Counts the next object, which has these logs."""
        self.unmerged += logs
        self.position += 1
        if self.position % MERGED == 0:
            self.missing[self.position - MERGED], self.unmerged = self.unmerged, []

    def _read_on(self) -> None:
        """Reads the objects that are new.

        Raises:
            UserError: an object was deleted or changed.
        """
        while True:
            if self.position % MERGED == 0:
                merged = self._read(self._merged(self.position))
                if merged is not None:
                    self.ahead += merged
                    self.position += MERGED
                    continue
            whole = (self.position // MERGED + 1) * MERGED
            last = _name(self.position - 1) if self.position else ""
            new = [name for name in storage.names_after(self.uri, last) if NAME.fullmatch(name)]
            end = min(_number(new[-1]) + 1, whole) if new else self.position
            for logs in self._contents(range(self.position, end)):
                self._take(logs)
            if self.position < whole:
                return

    def _merge(self, start: int) -> None:
        """Writes one merged object; an earlier driver may have written it, from the same objects."""
        content = json.dumps(self.missing[start], separators=(",", ":")).encode()
        with contextlib.suppress(storage.ChangedError):
            storage.write_version(self._merged(start), content, None)
        del self.missing[start]

    def _all_logs(self) -> Iterator[Log]:
        """The logs of all objects up to the position."""
        for start in range(0, self.position, MERGED):
            merged = self._read(self._merged(start))
            if merged is not None:
                yield from merged
            else:
                yield from itertools.chain(*self._contents(range(start, min(start + MERGED, self.position))))

    def _contents(self, numbers: Iterable[int]) -> Iterator[list[Log]]:
        """The logs of each object. None may be missing."""
        uris = [self._object(number) for number in numbers]
        with ThreadPoolExecutor(READERS, thread_name_prefix="log") as pool:
            for uri, found in zip(uris, pool.map(self._read, uris), strict=True):
                if found is None:
                    raise UserError(self._damaged(uri, "is missing"))
                yield found

    def _read(self, uri: str) -> list[Log] | None:
        """The logs of an object or of a merged one; None if there is no such object."""
        found = storage.read_version(uri)
        if found is None:
            return None
        try:
            content = json.loads(found.content)
            logs = content["logs"] if isinstance(content, dict) else content
            if isinstance(logs, list):
                return logs
        except (ValueError, KeyError):
            pass
        raise UserError(self._damaged(uri, "is not as deit-ray wrote it"))

    def _damaged(self, uri: str, what: str) -> str:
        return (
            f"{self.name}: {uri} {what}, so its database cannot be read; restore the object from an earlier "
            "version or a copy of the bucket (no object of a study.log may be deleted or changed)"
        )

    def _object(self, number: int) -> str:
        return storage.join(self.uri, _name(number))

    def _merged(self, start: int) -> str:
        return storage.join(self.uri, MERGES, _name(start))


def _name(number: int) -> str:
    return f"{number:08d}.json"


def _number(name: str) -> int:
    return int(name.partition(".")[0])
