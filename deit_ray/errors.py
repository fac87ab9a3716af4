"""The one exception that is meant for a person: its message alone says what to mend."""


class UserError(Exception):
    """Something the user can mend: a key, a file, a cluster too small. The message names it and what is allowed."""


class Interrupted(UserError):
    """Ctrl-C: the message says what was kept and how to go on."""


class HopelessError(RuntimeError):
    """A training run that would fail in the same way again: it is not tried again from its checkpoint."""
