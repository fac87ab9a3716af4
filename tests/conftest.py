"""What tests share: small real data sets, and one Ray for all tests that need one."""

import os
from pathlib import Path

import numpy as np
import pytest

from deit_ray.data import shards
from deit_ray.data.images import encode
from deit_ray.data.prepare import prepare
from deit_ray.experiment.load import dump_experiment, load_experiment
from tests.support.commands import SPACE
from tests.support.servers import MlflowServer, Proxy

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> str:
    """The prepared digits."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray of four logical CPUs, shared by the tests; trials are placed as on a real one."""
    import ray

    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def experiment(digits, tmp_path):
    """Makes an experiment of the digits from a file in experiments/, with overrides, whose results go to a new folder."""

    def make(name: str, overrides: dict | None = None):
        fixed = {"data.uri": digits, "results.uri": str(tmp_path / "results")}
        return load_experiment(EXPERIMENTS / f"{name}.yaml", fixed | (overrides or {}))

    return make


@pytest.fixture(scope="session")
def teacher_file(digits, tmp_path_factory) -> str:
    """A model.safetensors of a convolutional teacher that knows the digits, trained by the training step without Ray."""
    from tests.support.training import train_locally

    folder = tmp_path_factory.mktemp("teacher")
    overrides = {"data.uri": digits, "results.uri": str(folder), "train.epochs": 8}
    return train_locally(load_experiment(EXPERIMENTS / "digits_teacher.yaml", overrides), folder).model


@pytest.fixture
def search_file(experiment, teacher_file, tmp_path):
    """Writes a short study's experiment file."""

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


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real MLflow server on loopback."""
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture
def proxy(server):
    """What misbehaves before it, as it is told."""
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def impatient(monkeypatch):
    """The same as in real life, with shorter waits."""
    from deit_ray.tracking import tracker
    from deit_ray.tracking.delivery import quiet_mlflow

    quiet_mlflow()
    monkeypatch.setattr(tracker, "POLL_S", 0.1)
    monkeypatch.setattr(tracker, "PAUSE_S", (0.1, 0.5))
    monkeypatch.setattr(tracker, "PATIENCE_S", 10.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")


def write_colours(
    uri: str, rows: dict[str, int], size: int = 40, row_group: int | None = None
) -> shards.Manifest:
    """A prepared data set of noise images, each split with that many rows, labels counting 0, 1, 2, 0, ..."""
    splits, counts = {}, {}
    for split, count in rows.items():
        generator = np.random.default_rng(len(split))
        images = (
            (
                encode(generator.integers(0, 256, (size, size + i % 7, 3), dtype=np.uint8), 0, 95),
                i % 3,
                f"{split}-{i}",
            )
            for i in range(count)
        )
        splits[split], counts[split] = shards.write_split(uri, split, images)
    return shards.write_manifest(uri, ["a", "b", "c"], splits, counts, {})
