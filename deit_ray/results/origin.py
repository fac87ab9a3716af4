"""The origin of a run: command, code, versions, data and machine, written to its folder at every start."""

import contextlib
import getpass
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

from deit_ray import __version__, storage
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment

ORIGIN = "origin.json"
PACKAGE = Path(__file__).parent.parent
PACKAGES = (
    "ray",
    "torch",
    "torchvision",
    "timm",
    "optuna",
    "mlflow",
    "pyarrow",
    "numpy",
    "opencv-python-headless",
)
# Raised when a version computes other numbers than the version before it from the same experiment, seed and
# data. 1 is every version without this number. 2: a moving average without timm's warm-up, mixing by
# view, a filter for crops that shrink by less than a tenth, new heads with a standard deviation of 0.02,
# fused AdamW.
NUMERICS = 2
MOST_CHANGES = 1_000_000  # characters of uncommitted changes that are kept


def note_origin(
    folder: str,
    experiment: Experiment,
    fingerprint: str,
    device: str,
    teacher: str | None = None,
    continues: dict | None = None,
    rows: dict[str, int] | None = None,
) -> None:
    """Adds an entry to the origin.json of a run's or study's folder, unless only the date differs from the
    last entry.

    Args:
        folder: URI of the folder.
        fingerprint: fingerprint of the prepared data set.
        device: cpu or cuda.
        teacher: path of the teacher's weights. `run:NAME` does not identify them: the next run of that name
            changes the file.
        continues: for a run that continues another one: its folder, the step, and the schedule.
        rows: number of images by split.
    """
    entries = read_origins(folder)
    entry = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(
            ["deit-ray" if Path(sys.argv[0]).stem in ("deit-ray", "__main__") else sys.argv[0], *sys.argv[1:]]
        ),
        "code": describe_code(),
        "packages": package_versions(),
        "data": {
            "uri": storage.absolute(experiment.data.uri),
            "fingerprint": fingerprint,
            "rows": rows or {},
        },
        "teacher": _sha256(teacher) if teacher else None,
        "machine": describe_machine(experiment, device),
        "driver": describe_driver(),
    }
    if continues or (entries and "continues" in entries[-1]):
        entry["continues"] = continues or entries[-1]["continues"]
    if not entries or _undated(entries[-1]) != _undated(entry):
        storage.write_bytes(storage.join(folder, ORIGIN), json.dumps([*entries, entry], indent=1).encode())


def read_origins(folder: str) -> list[dict]:
    """The entries of a folder's origin.json, oldest first; an empty list where there is no such file."""
    try:
        return json.loads(storage.read_bytes(storage.join(folder, ORIGIN)))
    except FileNotFoundError:
        return []


def origin_of(folder: str | None) -> dict | None:
    """The last entry of a run's origin.json, or of a trial's study's; None if there is no such file."""
    entries = folder and (read_origins(folder) or read_origins(folder.rpartition("/")[0]))
    return entries[-1] if entries else None


def check_same_inputs(
    folder: str, experiment: Experiment, fingerprint: str, teacher: str | None = None
) -> None:
    """Checks that a run would see the data set and the teacher with which it was trained.

    Args:
        folder: URI of the run's folder.
        fingerprint: fingerprint of the data set now.
        teacher: path of the teacher's weights now; None skips this check.

    Raises:
        UserError: the data set or the teacher has changed.
    """
    origin = origin_of(folder)
    if origin and origin["data"]["fingerprint"] != fingerprint:
        raise UserError(
            f"data.uri: {experiment.data.uri}: the data set has changed since {folder} was trained on it "
            f"(fingerprint {fingerprint[:12]}, then {origin['data']['fingerprint'][:12]})"
        )
    if origin and teacher and origin["teacher"] and origin["teacher"] != _sha256(teacher):
        raise UserError(
            f"distillation.teacher.weights: {teacher}: the weights have changed since {folder} was trained "
            f"with them (sha256 {_sha256(teacher)[:12]}, then {origin['teacher'][:12]})"
        )


def check_numerics(name: str, folder: str) -> None:
    """Checks that this version computes the numbers that a run or study has begun with.

    Args:
        name: of the run or study, for the message.
        folder: URI of its folder.

    Raises:
        UserError: another version has begun it, whose numbers differ.
    """
    if refusal := describe_other_numerics(name, folder):
        raise UserError(refusal)


def describe_other_numerics(name: str, folder: str) -> str | None:
    """Says that a run or study cannot be continued here, whose numbers would be others; None if it can."""
    origin = origin_of(folder)
    if origin is None or (numerics := origin["code"].get("numerics", 1)) == NUMERICS:
        return None
    code = origin["code"]
    version = f"{code['version']}" + (f" (commit {code['commit'][:12]})" if code["commit"] else "")
    return (
        f"{name}: was begun by deit_ray {version}, which computes other numbers (numerics {numerics}, here "
        f"{NUMERICS}), so it cannot be continued here; use that version, or start it again"
    )


def describe_code() -> dict:
    """The version of this package, the number of its numerics, its git commit, and the uncommitted changes.

    Commit and changes are None if the package is not in a git repository of its own.
    """
    # an installed package may lie within another project's repository, which does not track it
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {"version": __version__, "numerics": NUMERICS, "commit": None, "changes": None}
    top = _git("rev-parse", "--show-toplevel").strip()
    changes = _git("-C", top, "diff", "HEAD") or ""
    for name in sorted((_git("ls-files", "--others", "--exclude-standard", "--", "*.py") or "").splitlines()):
        changes += f"new file {name}\n" + "".join(
            f"+{line}\n" for line in (PACKAGE / name).read_text(errors="replace").splitlines()
        )
    if len(changes) > MOST_CHANGES:
        digest = hashlib.sha256(changes.encode()).hexdigest()
        changes = f"{changes[:MOST_CHANGES]}\n(cut: {len(changes)} characters in all, sha256 {digest})\n"
    return {
        "version": __version__,
        "numerics": NUMERICS,
        "commit": _git("rev-parse", "HEAD").strip(),
        "changes": changes,
    }


def package_versions() -> dict[str, str]:
    """Versions of Python, and of the packages on which numbers can depend."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # OpenCV comes under several names
            versions[name] = importlib.metadata.version(name)
    return versions


def describe_machine(experiment: Experiment, device: str) -> dict:
    """The machine of the driver, and the kinds of accelerators in its cluster."""
    import ray

    resources = ray.cluster_resources() if ray.is_initialized() else {}
    kinds = sorted(
        name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")
    )
    return {
        "device": device,
        "accelerators": ", ".join(kinds),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "torch threads": experiment.train.threads,
    }


def describe_driver() -> dict[str, str]:
    """Who started the driver, on which host, and as which Ray job."""
    from deit_ray.cluster.ray_private import job_id

    return {"user": user(), "host": platform.node(), "job": job_id()}


def user() -> str:
    """The name of the person who calls; unknown where the machine has no name for them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container whose user is only a number
        return "unknown"


def cpu_model() -> str:
    """The name of this machine's processor."""
    with contextlib.suppress(OSError):  # only Linux has this file
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """The output of git in the package's folder; None where git fails or is not installed."""
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError:
        return None
    return found.stdout if found.returncode == 0 else None


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _undated(entry: dict) -> dict:
    return {key: value for key, value in entry.items() if key != "date"}
