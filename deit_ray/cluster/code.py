"""The hash of this package's code, by which the nodes of a cluster are compared.

`python -m deit_ray.cluster.code` prints it, with the name of the host; it imports neither Ray nor torch.
"""

import functools
import hashlib
import os
from pathlib import Path

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


if __name__ == "__main__":
    print(f"deit_ray: the code on {os.uname().nodename} is {code_hash()}", flush=True)
