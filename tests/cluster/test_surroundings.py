"""What Ray takes from its surroundings is checked in seconds: it starts, or one sentence says why not."""

import http.server
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.air.execution._internal.tracked_actor_task import TrackedActorTask
from ray.air.execution.resources import FixedResourceManager, ResourceRequest
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError

from deit_ray.cluster import connect, surroundings
from deit_ray.errors import UserError
from deit_ray.terminal.session import Session
from deit_ray.trial.failure import describe_death, is_death, reason_of
from deit_ray.trial.train_private import every_death_known
from tests.conftest import ROOT
from tests.support.commands import command, wait_for
from tests.support.servers import free_port

PLAIN = {  # addresses where nothing has to listen: what is said
    "ray://127.0.0.1:10001": "is an address of another kind; allowed are HOST:PORT",
    "http://127.0.0.1:8265": "is an address of another kind",
    "cluster": "is not an address",
    "localhost:port": "is not an address",
    "localhost:70000": "is not an address",
    "no-such-host.invalid:6379": "there is no host no-such-host.invalid",
}


@pytest.mark.parametrize(("address", "said"), PLAIN.items())
def test_an_address_where_no_cluster_can_be_is_refused(address, said, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=said), Session().connected():
        pass


@pytest.mark.parametrize("kind", ["closed", "web", "silent"])
def test_a_port_without_a_cluster_is_refused_within_seconds(kind):
    with (
        socket.socket() as mute,
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as web,
    ):
        threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True).start()
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        ports = {"closed": free_port(), "web": web.server_address[1], "silent": mute.getsockname()[1]}
        begin, address = time.monotonic(), f"127.0.0.1:{ports[kind]}"
        said = rf"no cluster answers at {address} \(.*use --address local"
        with pytest.raises(UserError, match=said), Session(address).connected():
            pass
        assert time.monotonic() - begin < 20
        web.shutdown()


def test_a_folder_that_rays_sockets_do_not_fit_into_is_replaced(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    for name, wanted, why in (
        ("TMPDIR", str(long), "too long for Ray's sockets"),
        ("RAY_TMPDIR", "/no/such/folder", "cannot be written"),
    ):
        monkeypatch.setenv(name, wanted)
        folder, said = surroundings.base_folder()
        assert folder in surroundings.FALLBACKS
        assert said.startswith(f"{name} {wanted} ")
        assert why in said
    monkeypatch.setattr(surroundings, "FALLBACKS", ("/proc",))
    with pytest.raises(
        UserError, match=r"no folder for temporary files can be used: /no/such/folder .*; /proc"
    ):
        surroundings.base_folder()


def test_loopback_and_the_cluster_are_reached_without_a_proxy_and_the_persons_exceptions_stay(monkeypatch):
    for name in ("no_proxy", "NO_PROXY", *surroundings.PROXIES, *map(str.upper, surroundings.PROXIES)):
        monkeypatch.setenv(name, "")  # monkeypatch puts back what was there
        monkeypatch.delenv(name)
    surroundings.go_direct(["10.0.0.7"])
    assert "no_proxy" not in os.environ  # no proxy, nothing to say
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "intranet.example, .corp")
    for _ in range(2):
        surroundings.go_direct(["10.0.0.7"])
        expected = "intranet.example,.corp,localhost,127.0.0.1,::1,10.0.0.7"
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == expected


@pytest.mark.parametrize("home", ["/proc", "/no/such/folder"])
def test_a_home_folder_that_cannot_be_written_needs_no_token_in_it(home, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", home)
    surroundings.bring_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert surroundings.on_head() is None


class Idle:
    """An actor without work."""


@pytest.mark.parametrize("death", [OutOfMemoryError("killed"), NodeDiedError("gone"), RayActorError()])
def test_every_death_of_a_trials_process_ends_that_trial_alone(ray_cluster, death):
    """Ray Tune itself ends the whole run at the first two, or loses them where the process was starting."""
    heard, manager = [], RayActorManager(resource_manager=FixedResourceManager({"CPU": 1}))

    def note(actor, error) -> None:
        heard.append(error)

    actor, starting = (
        manager.add_actor(Idle, {}, ResourceRequest([{"CPU": 0.001}]), on_error=note) for _ in range(2)
    )
    while not manager.is_actor_started(actor):
        manager.next(timeout=1)
    with every_death_known():
        task = TrackedActorTask(actor, on_error=note)
        manager._actor_task_failed(tracked_actor_task=task, exception=death)
        manager._actor_start_failed(tracked_actor=starting, exception=death)
    assert [type(error) for error in heard] == [RayActorError, RayActorError, RayActorError]
    assert is_death(death)
    known = pickle.loads(pickle.dumps(heard[0]))  # as Tune keeps it
    out_of_memory = isinstance(death, OutOfMemoryError)
    assert ("memory" in describe_death(known)) == out_of_memory
    assert describe_death(death) == describe_death(known)
    assert reason_of(death).startswith(describe_death(death))
    assert "Error" not in describe_death(death)


PROBE = """
import ray
from deit_ray.terminal.console import Console
from deit_ray.terminal.session import Session
from deit_ray.cluster import ray_private
with Session("local", console=Console(quiet=True)).connected():
    assert ray.get(ray.remote(num_cpus=0)(lambda: 7).remote()) == 7
    print("spilled", ray_private.spilled_bytes(ray.get_runtime_context().gcs_address))
"""


def test_ray_runs_below_uv_behind_a_proxy_without_a_home_and_with_a_long_folder(own_ray, tmp_path):
    (tmp_path / ("x" * 90)).mkdir()
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "run").write_text(f"{sys.executable} probe.py\nexit $?\n")
    proxy = f"http://127.0.0.1:{free_port()}"
    odd = {"TMPDIR": str(tmp_path / ("x" * 90)), "HOME": "/proc", "http_proxy": proxy, "grpc_proxy": proxy}
    done = subprocess.run(
        ["bash", "-c", "exec -a uv bash run"],  # what Ray takes for `uv run`
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=os.environ | odd,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "spilled 0\n"
    assert done.stderr.startswith("warning: Ray keeps its temporary files in /tmp: TMPDIR ")
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_sigterm_leaves_a_study_that_can_be_resumed(own_ray, small_file, tmp_path):
    keys = {
        "train.epochs": 3000,
        "search.scheduler": "none",
        "search.space": {"optim.lr": {"log": [1e-3, 2e-3]}},
    }
    path, results = small_file(**keys), tmp_path / "results"
    with command("tune", path, start_new_session=True) as process:
        first = process.stdout.readline()
        os.set_blocking(process.stdout.fileno(), False)
        wait_for(lambda: list(results.glob("short-1/trial-0000/step-*")), 120)
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        process.wait(timeout=60)
        assert time.monotonic() - begin < 30
        output = process.stdout.read()
    assert process.returncode == 143, output
    assert first.startswith("short: ")  # within the first second: before anything large is imported
    again = f"resume with: deit-ray tune --resume short-1 --results {results}"
    assert f"short-1: interrupted; what its trials have done is kept\n{again}" in output
    assert "Traceback" not in output
    assert "***" not in output  # Ray's C++ lines


def test_an_open_package_is_no_namespace_in_the_folder_above(tmp_path):
    script = "import deit_ray; print(deit_ray.__file__, deit_ray.UserError.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT.parent, check=True
    )
    assert Path(done.stdout.split()[0]).name == "__init__.py"


def test_ray_addresses_are_chosen_in_order(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert connect.chosen_address("local") == "local"
    assert connect.chosen_address(None) == "10.0.0.1:6379"
    monkeypatch.delenv("RAY_ADDRESS")
    assert connect.chosen_address(None) == "local"
