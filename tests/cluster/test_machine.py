"""Checks of this machine: each says what it found, and how to fix what is wrong."""

import shutil
from collections import namedtuple

import pytest

from deit_ray.cluster import connect
from deit_ray.cluster.machine import cheap_checks, disk_check
from deit_ray.errors import UserError

Usage = namedtuple("Usage", "total used free")


def found(subject: str):
    (check,) = [check for check in cheap_checks() if check.subject == subject]
    return check


def test_nothing_is_wrong_on_a_machine_where_the_tests_run():
    checks = cheap_checks()
    assert {check.subject for check in checks} >= {"Python", "packages", "open files", "clock", "disk"}
    assert [check for check in checks if check.remedy] == []


def _no_folder():
    raise UserError("no folder for temporary files can be used: /tmp is full; make room in one of them")


WRONG = {
    "Python": (
        ("platform.python_version_tuple", lambda: ("3", "10", "4")),
        "a Python from 3.11 to 3.13",
    ),
    "packages": (
        ("importlib.metadata.requires", lambda name: ["ray>=99"]),
        "install deit-ray",
    ),
    "open files": (("resource.getrlimit", lambda kind: (256, 1024)), "ulimit -n 65536"),
    "/dev/shm": (("shutil.disk_usage", lambda path: Usage(1 << 40, 0, 64 << 20)), "--shm-size="),
    "clock": (("time.time", lambda: 7.0), "timedatectl set-ntp true"),
    "temporary files": (("deit_ray.cluster.surroundings.base_folder", _no_folder), "make room"),
    "disk": (("shutil.disk_usage", lambda path: Usage(10**12, 0, 10**8)), "delete what is not needed there"),
}


@pytest.mark.parametrize("subject", WRONG)
def test_what_is_wrong_with_a_machine_is_said_with_its_remedy(subject, monkeypatch):
    (place, answer), remedy = WRONG[subject]
    monkeypatch.setattr(place, answer)
    check = found(subject)
    assert check.remedy is not None
    assert remedy in check.remedy
    assert "Error" not in check.found


def test_packages_that_are_missing_or_too_old_are_named(monkeypatch):
    wanted = ["ray[data]>=99", "no-such-package", "torch>=2", 'boto3>=1; extra == "s3"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    said = found("packages").found
    assert said.startswith("ray is ")
    assert said.endswith(", not >=99; no-such-package is missing")


@pytest.mark.parametrize(
    ("free", "needed", "said"),
    [
        (2e11, 3e11, "a study can take 300 GB"),
        (2e9, 1e9, "more than 95% is used"),
        (5e8, 1e9, "less than 1"),
    ],
)
def test_a_disk_that_is_too_small_or_too_full_is_wrong(free, needed, said, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, int(free)))
    why = "a study can take 300 GB" if needed > 1e11 else ""
    check = disk_check("results", str(tmp_path / "not" / "there"), needed, why)
    assert said in check.found
    assert f"below {tmp_path}" in check.found
    assert check.remedy
    assert disk_check("results", str(tmp_path), 1.0).remedy is None or free < 5e10


def test_a_command_that_uses_ray_warns_of_what_is_wrong(monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda kind: (256, 1024))
    told = []
    with pytest.raises(UserError), connect.connected("127.0.0.1:1", False, told.append):
        pass
    assert told == [f"open files: {found('open files').found}; {found('open files').remedy}"]
