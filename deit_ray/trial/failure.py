"""How a trial failed: why, on which worker, at which step, and whether it was the trial's own fault."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError, RayTaskError

from deit_ray import storage
from deit_ray.cluster.nodes import on_node
from deit_ray.errors import NonFiniteLoss, UnavailableError, explain_os_error, lines_of
from deit_ray.results.folders import JOURNAL
from deit_ray.results.journal import last_step

FAILURE = "failure.json"
DIED = "its process died"
TAIL = 20  # lines of a worker's log
TAIL_TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True)
class Failure:
    """What is known about the end of a trial that did not end well.

    Attributes:
        kind: failed, by the trial's own fault; or unavailable, when a disk, a data set or a network is gone:
            the study then stops, and the trial can be resumed once the fault is fixed.
        reason: one line.
        traceback: of the exception that began it.
        signature: equal for failures at the same place in the code, whatever the values; None for a failure
            that says nothing about other trials.
        rank, host: of the worker where it began; None where it began in the trial's own process.
        step: the last optimizer step in the journal.
        log: the last lines of that worker's output.
    """

    kind: str
    reason: str
    traceback: str
    signature: str | None
    rank: int | None = None
    host: str | None = None
    step: int | None = None
    log: list[str] = dataclasses.field(default_factory=list)


class TrialFailed(RuntimeError):
    """Raised by a trial's process; carries the `Failure`."""

    def __init__(self, failure: Failure):
        super().__init__(failure)
        self.failure = failure


def describe_failure(error: BaseException, folder: str) -> Failure:
    """Describes, in the trial's own process, the exception that ended it."""
    failures = getattr(error, "worker_failures", None) or {}
    by_death = {rank: is_death(root_cause(failure)) for rank, failure in failures.items()}
    rank = min(
        failures, key=lambda rank: (by_death[rank], rank), default=None
    )  # a death is often what another's error led to
    cause = root_cause(failures[rank] if rank is not None else error)
    worker = read_worker(folder, rank) if rank is not None else None
    text = _traceback_of(failures[rank] if rank is not None else error)
    return Failure(
        kind="unavailable" if is_outside(cause) else "failed",
        reason=reason_of(cause),
        traceback=text,
        # a loss that is not finite is the fault of the searched values, and says nothing about another trial
        signature=None if isinstance(cause, NonFiniteLoss) else _signature(text, cause),
        rank=rank,
        host=worker and worker["host"],
        step=last_step(storage.join(folder, JOURNAL)),
        log=tail_log(worker) if worker else [],
    )


def is_outside(error: BaseException) -> bool:
    """Whether an exception is the fault of a disk, a network or the data, not of what was trained."""
    return isinstance(root_cause(error), (OSError, UnavailableError))


def is_death(error: BaseException) -> bool:
    """Whether an exception says that a process died: it was killed, its machine is gone, or Ray ended it
    because memory ran out."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def describe_death(error: BaseException) -> str:
    """Says that a process died, and why where Ray knows it; how often and where may be added to the words."""
    if isinstance(root_cause(error), OutOfMemoryError):
        return "the machine's memory ran out, so Ray killed its process"
    return DIED


def describe_restart(death: str, step: int) -> str:
    """Says that a process died, and from which checkpoint a new one resumes.

    Args:
        death: see `describe_death`.
        step: the checkpoint's; 0 if there is none.
    """
    return f"{death}; it resumes from {f'step {step}' if step else 'the beginning'}"


def reason_of(error: BaseException) -> str:
    """The reason of a failure in one line, without names of Python classes."""
    error = root_cause(error)
    if isinstance(error, TrialFailed):
        return error.failure.reason
    if is_death(error):
        death = describe_death(error)
        return f"{death}, perhaps since it was killed or memory ran out" if death == DIED else death
    if isinstance(error, OSError):
        return explain_os_error(error)
    lines = lines_of(str(error))
    if lines and " " in lines[0]:
        return lines[0]
    return f"an error in the program ({lines[0]})" if lines else "an error in the program"


def root_cause(error: BaseException) -> BaseException:
    """The exception that began it, without Ray's wrapping."""
    while True:
        failures = getattr(error, "worker_failures", None)
        inner = (
            next(iter(failures.values())) if failures else getattr(error, "cause", None) or error.__cause__
        )
        if not isinstance(inner, BaseException) or inner is error:
            return error
        error = inner


def write_failure(folder: str, failure: Failure) -> None:
    storage.write_bytes(storage.join(folder, FAILURE), json.dumps(dataclasses.asdict(failure)).encode())


def read_failure(folder: str) -> Failure | None:
    """The failure that ended the trial in a folder, where there was one."""
    try:
        return Failure(**json.loads(storage.read_bytes(storage.join(folder, FAILURE))))
    except FileNotFoundError:
        return None


def write_worker(folder: str, rank: int, gpu: str | None = None) -> None:
    """Notes in a trial's folder where this worker runs, and where its output goes.

    Args:
        gpu: name of its GPU.
    """
    logs = [
        os.readlink(f"/proc/self/fd/{number}")
        for number in (1, 2)
        if os.path.exists(f"/proc/self/fd/{number}")
    ]
    worker = {
        "rank": rank,
        "host": os.uname().nodename,
        "node": ray.get_runtime_context().get_node_id(),
        "pid": os.getpid(),
        "gpu": gpu,
        "logs": [log for log in logs if log.startswith("/")],
    }
    storage.write_bytes(_worker_file(folder, rank), json.dumps(worker).encode())


def read_worker(folder: str, rank: int) -> dict | None:
    try:
        return json.loads(storage.read_bytes(_worker_file(folder, rank)))
    except FileNotFoundError:
        return None


def tail_log(worker: dict) -> list[str]:
    """The last lines of what a worker printed, read on its own node; says so where that is gone."""
    try:
        return ray.get(on_node(worker["node"], tail_files).remote(worker["logs"]), timeout=TAIL_TIMEOUT_S)
    except (RayError, GetTimeoutError) as error:
        return [f"(the log on {worker['host']} cannot be read: {type(error).__name__})"]


def tail_files(paths: list[str]) -> list[str]:
    """The last lines of files, those that exist."""
    lines = []
    for path in filter(os.path.isfile, paths):
        written = Path(path).read_text(errors="replace").splitlines()
        lines += [
            line for line in written if not line.startswith((":job_id:", ":actor_name:", ":task_name:"))
        ][-TAIL:]  # Ray's marks
    return lines


def _worker_file(folder: str, rank: int) -> str:
    return storage.join(folder, f"worker-{rank}.json")


@contextlib.contextmanager
def keeping_traceback() -> Iterator[None]:
    """In a worker: an exception takes its traceback along as text, which Ray Train does not hand on to the
    trial's process."""
    try:
        yield
    except Exception as error:
        error.worker_traceback = traceback.format_exc()
        raise


def _traceback_of(error: BaseException) -> str:
    return getattr(error, "worker_traceback", None) or "".join(traceback.format_exception(root_cause(error)))


def _signature(text: str, cause: BaseException) -> str:
    places = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', text)
    return hashlib.sha256(repr((type(cause).__name__, places)).encode()).hexdigest()[:16]
