"""The nodes of a cluster are compared by a hash of the package's code."""

import shutil
import subprocess
import sys

from deit_ray.cluster.code import PACKAGE, code_hash, hash_of


def test_the_hash_is_of_names_and_contents_of_python_files_alone(tmp_path):
    copy = tmp_path / "elsewhere" / "deit_ray"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert hash_of(copy) == code_hash()

    (copy / "notes.txt").write_text("no code")
    (copy / "__pycache__").mkdir()
    (copy / "__pycache__" / "rng.pyc").write_bytes(b"compiled")
    assert hash_of(copy) == code_hash()

    seen = {code_hash()}
    for change in (
        lambda: (copy / "study" / "driver.py").write_text("changed = True\n"),
        lambda: (copy / "study" / "driver.py").rename(copy / "study" / "driven.py"),
        lambda: (copy / "study" / "new.py").write_text(""),
        lambda: (copy / "rng.py").unlink(),
    ):
        change()
        assert hash_of(copy) not in seen
        seen.add(hash_of(copy))


def test_a_node_prints_the_hash_without_importing_ray_or_torch():
    printed = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "deit_ray.cluster.code"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.rstrip().endswith(f" is {code_hash()}")
    imported = {line.rpartition("|")[2].strip() for line in printed.stderr.splitlines()}
    assert "deit_ray" in imported
    assert not imported & {"ray", "torch", "yaml"}
