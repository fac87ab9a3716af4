"""The exceptions that are meant for a person: their message alone says what to mend."""


class UserError(Exception):
    """Something the user can mend: a key, a file, a cluster too small. The message names it and what is allowed."""


class Interrupted(UserError):
    """A run or study that ended before its time: the message says what was kept and how to go on."""


class UnavailableError(UserError):
    """Something a run needs is gone: a disk, a data set, a network. What was done is kept; it can go on once that is mended."""


class HopelessError(RuntimeError):
    """A training run that would fail in the same way again: it is not tried again from its checkpoint."""
