"""The package as a whole: its version, and its import from a clone that is installed or not."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import deit_ray
from deit_ray.experiment.load import dump_experiment
from deit_ray.results.origin import NUMERICS
from tests.conftest import ROOT

BUILD = "import setuptools.build_meta as backend, sys; print(backend.build_editable(sys.argv[1]))"


def copy_clone(folder: Path) -> Path:
    """A copy of this checkout, without a repository around it."""
    shutil.copytree(ROOT / "deit_ray", folder / "deit_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def make_python(folder: Path) -> Path:
    """The interpreter of a new virtual environment without any package."""
    venv.create(folder, symlinks=True, with_pip=False)
    return folder / "bin" / "python"


def link_dependencies(folder: Path) -> Path:
    """A folder with links to all installed packages except this one."""
    folder.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("deit_ray", "__editable__")):
            (folder / entry.name).symlink_to(entry)
    return folder


def run(*command, **options) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= options.pop("env", {})
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=240, env=environment, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def not_installed(tmp_path):
    """Runs Python with a copy of the package on its path, and without the metadata of an installation."""
    clone = copy_clone(tmp_path / "clone")
    python, packages = make_python(tmp_path / "venv"), link_dependencies(tmp_path / "packages")
    return lambda *arguments: run(python, *arguments, cwd=tmp_path, env={"PYTHONPATH": f"{clone}:{packages}"})


def test_a_script_above_an_installed_clone_imports_the_package(tmp_path):
    clone = copy_clone(tmp_path / "deit_ray")  # a folder with the package's name, beside the script
    wheel = run(sys.executable, "-c", BUILD, tmp_path, cwd=clone).splitlines()[-1]
    python = make_python(tmp_path / "venv")
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    with zipfile.ZipFile(tmp_path / wheel) as file:
        file.extractall(site)
    (tmp_path / "script.py").write_text("import deit_ray; print(deit_ray.__version__, deit_ray.UserError)")
    expected = f"{deit_ray.__version__} <class 'deit_ray.errors.UserError'>"
    assert run(python, tmp_path / "script.py") == expected
    metadata = next(Path(site).glob("deit_ray-*.dist-info")) / "METADATA"
    assert f"\nVersion: {deit_ray.__version__}\n" in metadata.read_text()


def test_a_checkout_that_was_never_installed_knows_its_version(not_installed):
    code = (
        "import importlib.metadata as m; print([d.name for d in m.distributions() if d.name == 'deit-ray'])"
    )
    assert not_installed("-c", code) == "[]"
    assert not_installed("-m", "deit_ray", "--version") == f"deit-ray {deit_ray.__version__}"
    code = "from deit_ray.results.origin import describe_code; print(describe_code())"
    expected = {"version": deit_ray.__version__, "numerics": NUMERICS, "commit": None, "changes": None}
    assert not_installed("-c", code) == str(expected)


def test_a_checkout_that_was_never_installed_trains(own_ray, not_installed, experiment, tmp_path):
    keys = {"distillation.kind": "none", "student.depth": 1, "train.epochs": 1, "optim.warmup_epochs": 0}
    file = tmp_path / "one.yaml"
    file.write_text(dump_experiment(experiment("digits_student", keys)))
    assert "digits_student-1: finished" in not_installed("-m", "deit_ray", "train", file)
