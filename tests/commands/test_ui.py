"""`deit-ray ui`: which page it opens, where no server is started, and what it says of a port."""

import contextlib
import json
import os
import re
import signal
import socket
import webbrowser
from pathlib import Path

import mlflow
import pytest

from deit_ray.commands.ui import find_place, find_port
from deit_ray.errors import UserError
from deit_ray.tracking.view import TAG, WORKFLOW
from tests.conftest import SMALL_STEPS
from tests.support.commands import call, command, session_processes, succeeded, wait_for
from tests.support.servers import free_port

EXPERIMENT = "name: run\ndata: {uri: x}\ndistillation: {kind: none}\ntracking: {uri: %s}\n"


def test_a_busy_port_is_an_error_that_names_a_free_one():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        taken = busy.getsockname()[1]
        with pytest.raises(UserError, match=rf"^--port {taken}: is in use; name another one") as refused:
            find_port(taken)
        free = int(str(refused.value).rpartition(" ")[2])
        assert find_port(free) == free
        assert find_port(None, default=taken) != taken


def test_without_a_name_all_runs_of_the_results_are_shown(tmp_path):
    with pytest.raises(UserError, match="has no MLflow database yet"):
        find_place(None, str(tmp_path))
    for name, uri in {"a-1": "http://one:5000", "a-2": "http://one:5000", "b-1": "http://two"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "experiment.yaml").write_text(EXPERIMENT % uri)
        if name == "a-2":
            assert find_place(None, str(tmp_path)).uri == "http://one:5000"
    with pytest.raises(UserError, match=r"its runs are in 2 MLflows; name a study or run: .* ui b-1 "):
        find_place(None, str(tmp_path))
    assert find_place("b", str(tmp_path)).is_server
    (tmp_path / "mlflow.db").touch()
    assert find_place(None, str(tmp_path)).uri == f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "b-1" / "experiment.yaml").write_text(EXPERIMENT % f"sqlite:///{tmp_path}/gone.db")
    with pytest.raises(UserError, match=r"there is no sqlite:///.*gone\.db; deliver to it: .* sync b-1"):
        find_place("b-1", str(tmp_path))


def test_a_study_on_a_server_is_opened_there_in_its_view(finished_study, server, tmp_path, monkeypatch):
    opened, browser = tmp_path / "opened", tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {opened}\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(browser))
    monkeypatch.setattr(webbrowser, "_tryorder", None)  # Python reads the variable once
    name, results = finished_study.name, finished_study.results
    client = mlflow.MlflowClient(server.uri)
    found = client.get_experiment_by_name("deit_ray")
    page = f"{server.uri}/#/experiments/{found.experiment_id}/runs"
    view = json.loads(found.tags[f"{TAG}deit-ray-{name}"])  # the study's driver has delivered it
    assert view["name"] == name
    assert "params.`optim.lr`" in json.loads(view["state"])["selectedColumns"]
    shown = call("ui", "short", "--results", results)
    assert shown.out == f"{name}: {page}?{WORKFLOW}&viewStateShareKey=deit-ray-{name}\n", shown
    assert opened.read_text() == shown.out.split()[1]
    opened.unlink()
    trial = call("ui", f"{name}/0", "--results", results, "--no-open")
    (run,) = client.search_runs(
        [found.experiment_id], f"tags.`deit_ray.folder` = '{finished_study.folder}/trial-0000'"
    )
    assert trial.out == f"{name}/trial-0000: {page}/{run.info.run_id}?{WORKFLOW}\n"
    assert not opened.exists()


def test_a_study_that_mlflow_does_not_have_is_said_with_the_remedy(finished_study, server, tmp_path):
    copied = finished_study.copy(tmp_path / "copied")
    for record in copied.folder.rglob("tracking.json"):
        record.unlink()
    ended = call("ui", copied.name, "--results", copied.results)
    assert re.search(rf"{copied.name}: MLflow does not have it yet; deliver it with: .* sync", ended.error)


def test_mlflows_ui_shows_a_runs_curves(finished_run, own_server):
    port = free_port()
    arguments = ("whole", "--results", finished_run.results, "--port", port, "--no-open")
    with command("ui", *arguments, start_new_session=True) as process:
        try:
            lines = [process.stdout.readline() for _ in range(2)]
            assert re.fullmatch(rf"starting MLflow on port {port} \(some seconds\)\n", lines[0])
            page = re.fullmatch(
                rf"whole-1: (http://127\.0\.0\.1:{port}/#/experiments/1/runs/(\w+))\?{WORKFLOW}\n", lines[1]
            )
            assert page, lines
            client = mlflow.MlflowClient(f"http://127.0.0.1:{port}")
            curve = client.get_metric_history(page[2], "val/top1")
            assert [point.step for point in curve] == [SMALL_STEPS * epoch for epoch in (1, 2, 3, 4)]
            servers = processes_of(port)
            assert 0 < len(servers) <= 3, servers  # no job workers
            process.send_signal(signal.SIGINT)  # Ctrl-C, as the command says
            wait_for(lambda: not session_processes(process.pid) and not processes_of(port), 60)
            assert "MLflow has ended; everything is kept" in process.stdout.read()
            succeeded["ui"] += 1
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def processes_of(port: int) -> list[int]:
    """The processes of MLflow's server on a port, and those that they have started."""
    servers = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if b"mlflow" in words and str(port).encode() in words:
                servers.append(int(entry.name))
    return [pid for server in servers for pid in session_processes(server)]
