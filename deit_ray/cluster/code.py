"""The hash of this package's code, by which the nodes of a cluster are compared.

`python -m deit_ray.cluster.code` prints it, with the name of the host; it imports neither Ray nor torch.
"""

import functools
import hashlib
import os
from pathlib import Path

from deit_ray.errors import OtherCodeError

PACKAGE = Path(__file__).parent.parent
DIGITS = 16


@functools.cache
def code_hash() -> str:
    """The hash of deit_ray/**/*.py, in 16 hexadecimal digits.

    It is computed once in a process, so it stays that of the code that the process has imported.
    """
    return hash_of(PACKAGE)


def hash_of(folder: Path) -> str:
    """The first 16 digits of a SHA-256 over a folder's Python files: their relative paths, sorted, and their
    contents."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py") if path.is_file()}
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{hashlib.sha256(files[name].read_bytes()).hexdigest()} {name}\n".encode())
    return total.hexdigest()[:DIGITS]


def check_same_code(expected: str | None) -> None:
    """Refuses to work on this machine if its code is not the driver's.

    It looks at the files, since a process may have waited for work while they changed.

    Args:
        expected: the hash of the driver's code; None for a Ray of one machine, where nothing is checked.

    Raises:
        OtherCodeError: the code is another.
    """
    if expected is not None and (found := hash_of(PACKAGE)) != expected:
        raise OtherCodeError(describe_other_code(os.uname().nodename, found, expected))


@functools.cache
def check_same_code_once(expected: str | None) -> None:
    """`check_same_code`, once in a process that does the same work again and again."""
    check_same_code(expected)


def describe_other_code(host: str, found: str, expected: str) -> str:
    """Says that the code on a machine is not the driver's, and what to do."""
    return (
        f"the machine {host} has other code of deit_ray ({found}) than the driver ({expected}); bring the "
        "same code to all machines, such as by: ray up cluster.yaml"
    )


if __name__ == "__main__":
    print(f"deit_ray: the code on {os.uname().nodename} is {code_hash()}", flush=True)
