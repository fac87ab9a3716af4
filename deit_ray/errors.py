"""The exceptions for a person: the message alone says what to fix."""

import errno
import os
import re


class UserError(Exception):
    """A mistake that the user can fix: a key, a file, a cluster that is too small.

    The message names the place, the value that was given, and the values that are allowed.
    """


class Interrupted(UserError):
    """A run or study was interrupted: the message says what is kept and how to resume."""


class UnavailableError(UserError):
    """A disk, a data set or a network that a run needs is unavailable.

    The results so far are kept, and the run can be resumed once the fault is fixed.
    """


class OtherCodeError(UnavailableError):
    """A machine of the cluster has other code of this package than the driver."""


class UnexpectedError(UserError):
    """A fault of deit_ray or of a library ended a run or study. The message says what is kept and how to
    resume; the cause has the details."""


class HopelessError(RuntimeError):
    """A training run would fail in the same way again, so it is not retried from its checkpoint."""


class NonFiniteLoss(HopelessError):
    """The loss is NaN or infinite. The trial must fail, since no scheduler would stop it."""


REMEDIES = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room in your quota of the disk",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ESTALE: "mount the network file system again",
    errno.EMFILE: "allow more open files: ulimit -n 65536",
    errno.ENFILE: "end other programs, or allow more open files on this machine",
    errno.EFBIG: "allow larger files: ulimit -f unlimited",
    errno.ENOENT: "correct the path",
    errno.ENOTDIR: "correct the path",
    errno.EISDIR: "name a file in it",
    errno.EIO: "check the disk, or mount the network file system again",
    errno.ENOMEM: "end other programs",
}


def lines_of(text: str) -> list[str]:
    """The lines of a text that are not blank, without the space around them."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def first_line(error: BaseException) -> str:
    """The first line of an error, without its exception's name."""
    return next(iter(lines_of(str(error))), "no reason given").rstrip(".")


def explain_os_error(error: OSError) -> str:
    """What the operating system refuses, in one sentence that names the file, and what can be done."""
    named = (error.filename, error.filename2)
    names = [os.fsdecode(name) for name in named if isinstance(name, (str, bytes))]
    place = f"{' and '.join(names)}: " if names else ""
    text = error.strerror if isinstance(error.strerror, str) else str(error)
    lines = lines_of(text)
    reason = lines[0] if lines else "the system refuses an operation on a file"
    # pyarrow's: "Failed to open local file 'x'. Detail: [errno 2] No such file or directory"
    reason = re.sub(r"\.? Detail: \[[^]]*\] ", ": ", reason)
    remedy = REMEDIES.get(error.errno)
    return f"{place}{reason[:1].lower()}{reason[1:]}" + (f"; {remedy}" if remedy else "")
