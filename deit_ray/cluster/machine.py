"""What this machine offers to Ray and PyTorch: each check says what it found, and how to fix what is wrong.

This file imports neither Ray nor torch. Every command that uses Ray looks at `cheap_checks` before.
"""

import importlib.metadata
import os
import platform
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from deit_ray.cluster import surroundings
from deit_ray.errors import UserError

DISTRIBUTION = "deit-ray"
PYTHONS = ((3, 11), (3, 13))  # the first and the last one, as pyproject.toml says
LEAST_FILES = 4096  # below it, Ray warns that connections may fail
SHARED = "/dev/shm"
STORE_SHARE = 0.3  # of the memory: the size of Ray's object store
MOST_STORE_BYTES = 10e9  # if the object store is smaller, Ray takes the disk where /dev/shm is too small
LEAST_DISK_BYTES = 1e9
FULLEST = 0.95  # part of a disk that is used, above which Ray writes no objects there
EARLIEST = 1_767_225_600  # 2026 in seconds since 1970: no clock can be right and earlier than this version


@dataclass(frozen=True)
class Check:
    """What a check has found.

    Attributes:
        subject: what was looked at.
        found: what is there, in words.
        remedy: how to fix what is wrong; None if nothing is.
    """

    subject: str
    found: str
    remedy: str | None = None


def cheap_checks() -> list[Check]:
    """The checks of this machine that take some milliseconds."""
    found = [_python(), _packages(), _open_files(), _shared_memory(), _clock(), *_folders()]
    return [check for check in found if check is not None]


def _python() -> Check:
    version = platform.python_version()
    first, last = (".".join(map(str, pair)) for pair in PYTHONS)
    here = tuple(map(int, platform.python_version_tuple()[:2]))
    right = PYTHONS[0] <= here <= PYTHONS[1]
    remedy = None if right else f"install deit-ray under a Python from {first} to {last}"
    return Check("Python", f"{version} on {platform.machine()}", remedy)


def _packages() -> Check:
    """Whether the installed packages are those that deit-ray needs; pip can leave others behind."""
    again = "install deit-ray again: pip install -c constraints.txt -e ."
    try:
        required = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return Check("packages", "deit-ray is not installed as a package, so what it needs is not known")
    wrong, count = [], 0
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, not {requirement.specifier}")
    if wrong:
        return Check("packages", "; ".join(wrong), again)
    return Check("packages", f"{count}, with versions as deit-ray needs them")


def _open_files() -> Check:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # Ray raises the soft limit by itself
    if hard == resource.RLIM_INFINITY or hard >= LEAST_FILES:
        return Check("open files", "any number" if hard == resource.RLIM_INFINITY else f"{hard:,} allowed")
    return Check(
        "open files",
        f"at most {hard:,} at once; Ray needs {LEAST_FILES:,}",
        "allow more: ulimit -n 65536, or nofile in /etc/security/limits.conf",
    )


def _shared_memory() -> Check | None:
    """Whether the object store fits into /dev/shm; None on systems without it."""
    if platform.system() != "Linux":
        return None
    memory = _memory_bytes()
    wanted = min(STORE_SHARE * memory, MOST_STORE_BYTES)
    try:
        free = shutil.disk_usage(SHARED).free
    except OSError as error:
        return Check(SHARED, f"cannot be used ({error.strerror})", "mount a tmpfs there")
    if free < wanted:
        return Check(
            SHARED,
            f"{free / 1e9:.3g} GB free, but Ray's object store takes {wanted / 1e9:.3g} GB: images then go "
            "through the disk, slowly",
            f"docker run --shm-size={wanted / 1e9:.0f}g, or sudo mount -o remount,size={wanted / 1e9:.0f}G "
            f"{SHARED}, or delete old files there",
        )
    return Check(SHARED, f"{free / 1e9:.3g} GB free")


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _clock() -> Check:
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    right = time.time() >= EARLIEST
    remedy = None if right else "set it: sudo timedatectl set-ntp true"
    return Check("clock", now if right else f"{now}, which is long ago", remedy)


def _folders() -> Iterator[Check]:
    """The home folder, and the folder of Ray's temporary files."""
    home = os.path.expanduser("~")
    if os.access(home, os.W_OK | os.X_OK):
        yield Check("home folder", home)
    else:
        yield Check("home folder", f"{home} cannot be written; Ray's token is kept in the environment")
    try:
        folder, why = surroundings.base_folder()
    except UserError as error:
        yield Check("temporary files", str(error).partition("; make room")[0], "make room, or set TMPDIR")
        return
    longest = f"{folder}: {surroundings.LONGEST_BASE} bytes of path allowed for Ray's sockets"
    yield Check("temporary files", f"{folder}, since {why}" if why else longest)
    yield disk_check("disk", folder)


def disk_check(subject: str, folder: str, needed: float = LEAST_DISK_BYTES, why: str = "") -> Check:
    """Whether a local folder, or the nearest one above that exists, has room.

    Args:
        needed: bytes that must be free.
        why: what needs them, in words; by default Ray.
    """
    path = next(place for place in (Path(folder), *Path(folder).parents) if place.exists())
    total, _, free = shutil.disk_usage(path)
    found = f"{free / 1e9:,.3g} of {total / 1e9:,.3g} GB free below {path}"
    if free < needed:
        need = why or f"less than {needed / 1e9:.3g} GB"
        return Check(subject, f"{found}: {need}", "delete what is not needed there, or use a larger disk")
    if free < (1 - FULLEST) * total:
        need = f"more than {FULLEST:.0%} is used, so Ray writes no objects there"
        return Check(subject, f"{found}: {need}", "delete what is not needed there, or use a larger disk")
    return Check(subject, found)


def proxies() -> Check:
    """The proxies that programs on this machine use."""
    named = [name for name in surroundings.PROXIES if os.environ.get(name) or os.environ.get(name.upper())]
    if not named:
        return Check("proxies", "none")
    return Check("proxies", f"{', '.join(named)}; this machine and the cluster are reached without them")
