"""The exceptions for a person: the message alone says what to fix."""


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


class HopelessError(RuntimeError):
    """A training run would fail in the same way again, so it is not retried from its checkpoint."""
