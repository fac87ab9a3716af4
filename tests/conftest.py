"""The fixtures that tests share, and the marks that decide when a test runs.

Marks follow from the fixtures that a test uses; no test marks itself:

- `server`: needs an MLflow, S3 or PostgreSQL server of the test session.
- `cluster`: needs Ray, either the session's (`ray_cluster`) or one of its own (`own_ray`).
- `gpu`: runs on a GPU where there is one, otherwise on the CPU (`device`). bench/gpu.py runs these tests.
- `hosts`: makes hosts on this machine (`hosts`), which needs root: only in `make test-cluster`.
- `slow`: needs a Ray of its own, since it kills Ray, changes its environment, counts its processes or runs a
  command as a person does; or sends a whole data set (`digits`) through Ray instead of the few hundred images
  of `tints`; or trains with results in an S3 server's `bucket`; or follows the README from a person's own
  images to a study (`own_images`); or makes machine code (`compiler`); or serves a model (`serving`); or
  takes long, where quick tests try most of what it tries (`thorough`).

`make check` runs the tests without the marks server, cluster, hosts and slow, `make test` all tests but those
with the marks hosts and slow, `make test-cluster` the tests that make hosts, and `make test-all` all others.
`make test` covers every promise of docs/reliability.md, and fails if no test has called some command of
deit-ray (`--every-command`).
"""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deit_ray.data.prepare import prepare
from deit_ray.experiment.load import dump_experiment, load_experiment
from tests.support import commands
from tests.support.commands import SPACE, all_commands
from tests.support.data import write_tints
from tests.support.hosts import Hosts, is_alone, why_no_hosts
from tests.support.servers import MlflowServer, Proxy, S3Server, s3_environment

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"
SERVERS = {"server", "own_server", "s3_server"}
RAYS = {"ray_cluster", "own_ray"}
LONG = {"own_ray", "own_images", "compiler", "serving", "thorough"}
# of 400 training images a tenth is held out: an epoch has 360 / 72 = 5 steps
SMALL = {
    "train.batch_size": 72,
    "train.epochs": 2,
    "train.log_every": 1,
    "optim.warmup_epochs": 1,
    "student.depth": 1,
    "search.grace_epochs": 1,
}
SMALL_STEPS = 5  # of an epoch
STUDY = {
    "name": "short",
    "train.epochs": 30,
    "optim.ema_decay": 0.5,
    "search.metric": "val/top1_ema",
    "search.trials": 3,
    "search.sampler": "random",
    "search.max_concurrent": 1,
    # nothing can be learnt at 1e-6; with this seed the second trial gets it, and is stopped early
    "search.space": SPACE | {"optim.lr": {"choice": [2e-3, 1e-6]}},
    "seed": 2,
}


def pytest_configure() -> None:
    """Listens to Ctrl-C, as do then the processes that tests start: a shell in the background ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--every-command",
        action="store_true",
        help="fail unless the tests have called every command of deit-ray",
    )
    parser.addoption("--screenshots", metavar="FOLDER", help="keep pictures of pages there")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """Marks each test by the fixtures that it uses, before pytest reads `-m`; sorts tests by their needs.

    Tests without Ray come first: once the session's Ray has started, all calls in this process use it.
    """
    for item in items:
        used = set(item.fixturenames)
        if used & SERVERS:
            item.add_marker(pytest.mark.server)
        if used & RAYS:
            item.add_marker(pytest.mark.cluster)
        if "device" in used:
            item.add_marker(pytest.mark.gpu)
        if "hosts" in used:
            item.add_marker(pytest.mark.hosts)
        if used & LONG or {"ray_cluster", "digits"} <= used or {"ray_cluster", "bucket"} <= used:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: [item.get_closest_marker(name) is not None for name in ("cluster", "server")])


def pytest_sessionfinish(session, exitstatus) -> None:
    if session.config.getoption("--every-command") and exitstatus == pytest.ExitCode.OK and _never_called():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:
    if config.getoption("--every-command") and (missing := _never_called()):
        terminalreporter.write_line(f"commands that no test has called: {', '.join(missing)}", red=True)


def _never_called() -> list[str]:
    return [name for name in all_commands() if not commands.succeeded[name]]


@pytest.fixture(scope="session")
def device():
    """The device of tests that a GPU must pass: a GPU where there is one, otherwise the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def compiler() -> str:
    """The C++ compiler with which torch.compile makes machine code."""
    from torch._inductor import cpp_builder, exc

    try:
        return cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        pytest.fail(f"this test needs a C++ compiler, such as g++: {error}")


# Data and experiments


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> str:
    """The prepared digits."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def tints(tmp_path_factory) -> str:
    """A prepared data set of three classes that a small model learns in some ten steps."""
    folder = tmp_path_factory.mktemp("data") / "tints"
    write_tints(str(folder), {"train": 400, "test": 90})
    return str(folder)


@pytest.fixture
def experiment(digits, tmp_path):
    """Makes an experiment on the digits from a file in experiments/; results go to a new folder."""

    def make(name: str, overrides: dict | None = None):
        fixed = {"data.uri": digits, "results.uri": str(tmp_path / "results")}
        return load_experiment(EXPERIMENTS / f"{name}.yaml", fixed | (overrides or {}))

    return make


@pytest.fixture(scope="session")
def teacher_file(digits, tmp_path_factory) -> str:
    """A model.safetensors of a convolutional teacher for the digits, trained without Ray."""
    return _train_teacher({"data.uri": digits, "train.epochs": 8}, tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def tints_teacher(tints, tmp_path_factory) -> str:
    """A model.safetensors of a teacher for the tints."""
    keys = {
        "data.uri": tints,
        "train.batch_size": 40,
        "train.epochs": 6,
        "train.eval_every": 6,
        "optim.lr": 5e-3,
    }
    return _train_teacher(keys, tmp_path_factory.mktemp("teacher"))


def _train_teacher(overrides: dict, folder: Path) -> str:
    from tests.support.training import train_locally

    overrides = {"results.uri": str(folder)} | overrides
    return train_locally(load_experiment(EXPERIMENTS / "digits_teacher.yaml", overrides), folder).model


@pytest.fixture
def search_file(experiment, teacher_file, tmp_path):
    """Writes the experiment file of a short study of the digits."""

    def write(**keys) -> Path:
        fixed = {
            "distillation.teacher": {"weights": teacher_file},
            "train.epochs": 4,
            "optim.warmup_epochs": 1,
            "search.space": SPACE,
            "search.trials": 3,
            "search.grace_epochs": 1,
        }
        path = tmp_path / "short.yaml"
        path.write_text(dump_experiment(experiment("digits_student", {"name": "short"} | fixed | keys)))
        return path

    return write


@pytest.fixture(scope="session")
def make_small(tints, tints_teacher, server):
    """Makes an experiment on the tints with results in a folder; the session's MLflow server tracks it."""

    def make(results: Path, keys: dict):
        fixed = {
            "data.uri": tints,
            "results.uri": str(results),
            "tracking.uri": server.uri,
            "distillation.teacher": {"weights": tints_teacher},
        }
        return load_experiment(EXPERIMENTS / "digits_student.yaml", SMALL | fixed | keys)

    return make


@pytest.fixture
def small(make_small, tmp_path):
    """Makes an experiment on the tints with a new results folder."""
    return lambda **keys: make_small(tmp_path / "results", keys)


@pytest.fixture
def small_file(small, tmp_path):
    """Writes the file of such an experiment; its name is short."""

    def write(**keys) -> Path:
        path = tmp_path / "short.yaml"
        path.write_text(dump_experiment(small(**{"name": "short"} | keys)))
        return path

    return write


# Ray, and the study and the run that are trained once for all tests


@pytest.fixture(scope="session")
def ray_cluster(s3_server) -> Iterator[None]:
    """A Ray of four logical CPUs, started as deit-ray starts a Ray; all calls in this process use it.

    Its processes use the session's S3 server.
    """
    from deit_ray.cluster import connect
    from deit_ray.trial.needs import MODULES

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 4}')
        for name, value in s3_environment(s3_server.port).items():
            patch.setenv(name, value)
        connection = connect.connected("local", False, print, MODULES)
        connection.__enter__()
    yield
    connection.__exit__(None, None, None)


@pytest.fixture
def own_ray(monkeypatch) -> None:
    """For a test whose processes start a Ray of their own: makes them import this checkout, in any folder."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@dataclass(frozen=True)
class Finished:
    """A study or run that a command has finished: its name, its results folder, and how the command ended."""

    name: str
    results: Path
    ended: commands.Ended

    @property
    def folder(self) -> Path:
        return self.results / self.name

    def copy(self, folder: Path) -> "Finished":
        """A copy in another results folder, where a test may change it."""
        shutil.copytree(self.results, folder)
        return Finished(self.name, folder, self.ended)


@pytest.fixture(scope="session")
def finished_study(ray_cluster, make_small, tmp_path_factory) -> Finished:
    """A study of three trials: the first finished, the second was stopped early. Tests only read it."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "short.yaml").write_text(dump_experiment(make_small(folder / "results", STUDY)))
    return Finished("short-1", folder / "results", commands.call("tune", folder / "short.yaml"))


@pytest.fixture(scope="session")
def finished_run(ray_cluster, make_small, tmp_path_factory) -> Finished:
    """A run of four epochs, tracked in a database next to its results. Tests only read it."""
    folder = tmp_path_factory.mktemp("run")
    keys = {"name": "whole", "train.epochs": 4, "optim.schedule_epochs": 4, "student.drop_path": 0.1}
    written = make_small(folder / "results", keys | {"tracking.uri": None})
    (folder / "whole.yaml").write_text(dump_experiment(written))
    return Finished("whole-1", folder / "results", commands.call("train", folder / "whole.yaml"))


# Servers


@pytest.fixture
def thorough() -> None:
    """Marks a test that takes ten seconds or more, where quick tests try most of what it tries."""


@pytest.fixture
def serving() -> dict[str, str]:
    """The variables of `mlflow models serve`: its processes import this checkout, and it calls uvicorn."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true", "PATH": path}


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[MlflowServer]:
    """A real MLflow server on loopback. A test that kills it starts it again."""
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture
def own_server() -> None:
    """Marks a test that starts servers of its own."""


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 API server on loopback."""
    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(s3_server, monkeypatch) -> Iterator[str]:
    """The URI of an empty bucket on that server, which this process and the session's Ray use."""
    import boto3

    environment = s3_environment(s3_server.port)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    made = boto3.resource("s3", endpoint_url=environment["AWS_ENDPOINT_URL"]).create_bucket(Bucket="studies")
    yield "s3://studies"
    made.objects.delete()
    made.delete()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    """Hosts on this machine, which end with the module's tests, in which this Python runs.

    `make test-cluster` is the way to run such tests.
    """
    if why := why_no_hosts():
        pytest.skip(why)
    if not is_alone():
        pytest.skip("hosts are made in namespaces of their own: make test-cluster")
    python = (Path(sys.prefix), Path(sys.executable).resolve().parents[1])
    with Hosts(tmp_path_factory.mktemp("hosts"), python) as made:
        yield made


@pytest.fixture
def proxy(server) -> Iterator[Proxy]:
    """A proxy in front of the MLflow server, which misbehaves as a test says."""
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def impatient(monkeypatch) -> None:
    """Shortens the waits of tracking."""
    from deit_ray.tracking import tracker
    from deit_ray.tracking.delivery import quiet_mlflow

    quiet_mlflow()
    monkeypatch.setattr(tracker, "POLL_S", 0.1)
    monkeypatch.setattr(tracker, "PAUSE_S", (0.1, 0.5))
    monkeypatch.setattr(tracker, "PATIENCE_S", 10.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
