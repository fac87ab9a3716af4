"""Files are whole or absent, and a file that cannot be written is named in one message."""

import os
import subprocess
from pathlib import Path

import pytest

from deit_ray import storage
from deit_ray.errors import UnavailableError, UserError
from deit_ray.results.journal import JournalWriter, iterate_points


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KB, unmounted afterwards."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(small_disk):
    storage.write_bytes(f"{small_disk}/a", b"x" * 100_000)
    with pytest.raises(
        UnavailableError, match=r"disk/b: cannot be written: no space left on device; make room"
    ):
        storage.write_bytes(f"{small_disk}/b", b"x" * 300_000)
    assert os.listdir(small_disk) == ["a"]
    storage.write_bytes(f"{small_disk}/b", b"x" * 1000)


def test_a_journal_loses_nothing_to_a_disk_that_was_full(small_disk):
    journal = JournalWriter(f"{small_disk}/journal")
    Path(small_disk, "big").write_bytes(b"x" * 240_000)
    for step in range(1000):
        journal.add({"train/loss": 0.5}, step)
    with pytest.raises(UnavailableError):
        journal.flush()
    Path(small_disk, "big").unlink()
    journal.flush()
    points = [point.step for point in iterate_points(f"{small_disk}/journal")]
    assert points == list(range(1000))


def test_the_first_of_two_writers_that_create_a_file_wins(tmp_path):
    storage.create_bytes(f"{tmp_path}/f", b"first")
    with pytest.raises(FileExistsError):
        storage.create_bytes(f"{tmp_path}/f", b"second")
    assert storage.read_bytes(f"{tmp_path}/f") == b"first"
    assert os.listdir(tmp_path) == ["f"]


def test_a_place_that_cannot_be_reached_is_named(thorough):
    folder = "s3://bucket/folder?endpoint_override=127.0.0.1:9&scheme=http"
    uri = storage.join(folder, "key")
    assert uri == "s3://bucket/folder/key?endpoint_override=127.0.0.1:9&scheme=http"
    with pytest.raises(UnavailableError, match=r"s3://bucket/folder/key.*: cannot be written"):
        storage.write_bytes(uri, b"x")
    with pytest.raises(UnavailableError, match=r"s3://bucket/folder.*: cannot be read"):
        storage.list_names(folder)


def test_a_folder_in_which_nothing_can_be_written_is_refused(tmp_path):
    storage.check_writable("results.uri", str(tmp_path / "new" / "results"))
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"results.uri: .*/file/results: .*/file is a file; name a folder"):
        storage.check_writable("results.uri", str(tmp_path / "file" / "results"))


def test_results_on_a_disk_that_cannot_be_written_are_refused(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=r"results.uri: .*/new: .* cannot be written; allow it"):
        storage.check_writable("results.uri", f"{small_disk}/new")
