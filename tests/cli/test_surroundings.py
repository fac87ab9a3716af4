"""Messages: what was wrong and what can be done, without Python's names; commands that can be typed."""

import errno
import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deit_ray import hints
from deit_ray.cli.answers import message_of
from deit_ray.cluster.surroundings import free_port
from deit_ray.errors import UserError, explain_os_error
from deit_ray.experiment.load import default_experiment
from deit_ray.terminal.console import Console
from deit_ray.tracking.address import note_on_uri, shown, tracking_uri, with_tracking
from tests.support.commands import call

FAULTS = {
    errno.ENOSPC: "/x/y: no space left on device; make room on the disk",
    errno.EACCES: "/x/y: permission denied; change its permissions, or name another place",
    errno.ENAMETOOLONG: "/x/y: file name too long; use a shorter name",
    errno.ESTALE: "/x/y: stale file handle; mount the network file system again",
    errno.EROFS: "/x/y: read-only file system; name a place that can be written",
    errno.EMFILE: "/x/y: too many open files; allow more open files: ulimit -n 65536",
}


@pytest.mark.parametrize(("number", "said"), FAULTS.items())
def test_what_the_system_refuses_is_one_sentence_with_the_file(number, said):
    assert explain_os_error(OSError(number, os.strerror(number), "/x/y")) == said


def test_an_unexpected_error_names_a_file_with_its_details_and_no_class():
    try:
        {}["x"]
    except KeyError as error:
        said = message_of(error)
    assert said.startswith("this should not have happened; please report it, with the details in ")
    details = Path(said.rpartition(" ")[2])
    assert "KeyError: 'x'" in details.read_text()
    details.unlink()


def test_commands_in_messages_can_be_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hints.command("sync", "a-1", results="results") == "deit-ray sync a-1"
    odd = str(tmp_path / "my results")
    words = shlex.split(hints.command("tune", "--resume", "a-1", results="my results", address="h:6379"))
    assert words == ["deit-ray", "tune", "--resume", "a-1", "--results", odd, "--address", "h:6379"]


WRONG_URIS = {
    "file:///tmp/mlruns": "MLflow no longer keeps runs in a folder",
    "mlruns": "MLflow no longer keeps runs in a folder",
    "htp://127.0.0.1:5000": "htp is unknown to MLflow",
    "http://": "is not a whole address",
    "http://host:port": "is not a whole address",
    "sqlite:////no/such/folder/mlflow.db": "there is no folder /no/such/folder",
    "sqlite://": "names no file",
    "databricks": "Databricks needs a login",
}


@pytest.mark.parametrize(("uri", "said"), WRONG_URIS.items())
@pytest.mark.parametrize("key", ["tracking.uri", "MLFLOW_TRACKING_URI"])
def test_a_tracking_uri_that_mlflow_cannot_use_is_refused_at_the_start(key, uri, said, monkeypatch):
    monkeypatch.setenv("HOME", "/no/such/folder")
    keys = {"tracking.uri": uri} if key == "tracking.uri" else {}
    if not keys:
        monkeypatch.setenv(key, uri)
    with pytest.raises(UserError, match=f"^{key}: .*{said}"):
        tracking_uri(with_tracking(default_experiment(keys))[0])


def test_the_variable_of_mlflow_counts_for_new_runs_whose_file_names_none(monkeypatch, tmp_path):
    silent = default_experiment({"results.uri": str(tmp_path)})
    assert with_tracking(silent) == (silent, None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    kept, note = with_tracking(silent)
    assert tracking_uri(kept) == kept.tracking.uri == "http://me:secret@host:5000"
    said = "MLflow at http://me:***@host:5000, as MLFLOW_TRACKING_URI says"
    assert note == f"{said}; experiment.yaml keeps it for a resume and sync"
    assert note_on_uri(kept) is None
    # the file of a run that has begun counts; only an earlier version, which obeyed the variable, named none
    assert tracking_uri(silent, str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    assert "names no tracking.uri, and goes before MLFLOW_TRACKING_URI" in note_on_uri(silent)
    record = {"id": "a", "experiment": "deit_ray", "run_id": "b", "uri": "http://host:5000"}
    (tmp_path / "tracking.json").write_text(json.dumps(record))
    assert tracking_uri(silent, str(tmp_path)) == "http://host:5000"
    (tmp_path / "tracking.json").write_text(json.dumps(record | {"uri": "sqlite:////old/place/mlflow.db"}))
    assert tracking_uri(silent, str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    loud = default_experiment({"tracking.uri": "https://other"})
    assert with_tracking(loud) == (loud, None)
    assert tracking_uri(loud) == "https://other"
    assert note_on_uri(loud) == "MLflow at https://other: tracking.uri goes before MLFLOW_TRACKING_URI"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert note_on_uri(loud) is None
    assert shown("postgresql://u:p@h/db") == "postgresql://u:***@h/db"


PRINTS_MUCH = """
from deit_ray.terminal.console import Console
console = Console()
for number in range(99999):
    console.say(str(number))
"""


def test_an_output_that_nobody_reads_ends_nothing():
    printing = shlex.join([sys.executable, "-c", PRINTS_MUCH])
    done = subprocess.run(
        ["bash", "-c", f"{printing} | head -1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "0\n0\n"
    assert done.stderr.startswith("warning: standard output cannot be written any more (Broken pipe); the ")
    assert done.stderr.count("\n") == 1


def test_an_output_on_a_full_disk_ends_nothing(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        console = Console()
        console.say("x")
        console.say("y")
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_busy_port_is_said_and_another_one_found():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        taken = busy.getsockname()[1]
        assert taken < free_port(taken) < taken + 50


EXPERIMENT = "name: run\ndata: {uri: x}\ndistillation: {kind: none}\n"


def test_damaged_studies_are_lines_and_a_missing_folder_is_an_error(tmp_path):
    good = Path(tmp_path, "run-1")
    good.mkdir()
    (good / "experiment.yaml").write_text(EXPERIMENT)
    for name, content in {"text-1": b"hello", "empty-1": b"", "cut-1": b"SQLite format 3\0"}.items():
        Path(tmp_path, name).mkdir()
        Path(tmp_path, name, "study.db").write_bytes(content)
        Path(tmp_path, name, "experiment.yaml").write_text(EXPERIMENT)
    Path(tmp_path, "folder-1", "study.db").mkdir(parents=True)
    shown = call("status", "--results", tmp_path)
    assert shown.status == 0, shown
    said = {
        "text-1": "study.db: cannot be used: file is not a database",
        "cut-1": "study.db: cannot be used: ",
        "folder-1": "experiment.yaml: no such file",
        "empty-1": "interrupted",  # its driver was killed before it began: it can be resumed
    }
    for name, reason in said.items():
        (line,) = [line for line in shown.out.splitlines() if line.startswith(name)]
        assert reason in line
    (line,) = [line for line in shown.out.splitlines() if line.startswith("run-1")]
    assert line.split() == ["run-1", "interrupted", "-"]
    assert "Error" not in shown.out + shown.err
    missing = call("status", "--results", tmp_path / "none")
    assert (missing.status, missing.err.splitlines()[-1]) == (
        1,
        f"error: --results {tmp_path / 'none'}: there is no such folder",
    )


def test_a_new_bucket_has_no_studies_yet_and_a_missing_one_is_named(bucket):
    shown = call("status", "--results", f"{bucket}/results")
    assert (shown.status, shown.out.splitlines()[0].partition(";")[0]) == (0, "no studies here yet")
    missing = call("status", "--results", "s3://misspelt/results")
    assert (missing.status, missing.error) == (
        1,
        "error: --results s3://misspelt/results: there is no such bucket",
    )
