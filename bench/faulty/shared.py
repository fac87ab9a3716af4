"""What all cases of bench/faults.py only read: the prepared digits, and results of an earlier version."""

import os
import subprocess
import tarfile
from pathlib import Path

from bench.faulty.stage import DEIT_RAY, ROOT, SetupError

ARCHIVE = ROOT / "tests/data/results-0.1.tar.xz"


def make_shared(folder: Path) -> Path:
    """Makes `digits` (prepared), and `old` (a working folder with results and data)."""
    (folder / "old").mkdir(parents=True)
    words = [*DEIT_RAY, "data", "prepare", "digits", "--out", "digits"]
    done = subprocess.run(
        words, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if done.returncode:
        raise SetupError(f"the digits cannot be prepared: {done.stdout}{done.stderr}")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder / "old", filter="data")
    (folder / "old/data").mkdir()
    (folder / "old/data/digits").symlink_to(folder / "digits")
    return folder
