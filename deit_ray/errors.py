"""The one exception that is meant for a person: its message alone says what to mend."""


class UserError(Exception):
    """Something the user can mend: a key, a file, a cluster too small. The message names it and what is allowed."""
