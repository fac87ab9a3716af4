"""Stops, full disks and missing files: a study ends in one clear message, and can be resumed."""

import contextlib
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import ray

from deit_ray.errors import UserError
from deit_ray.experiment.load import load_experiment
from deit_ray.study.search import resume_study, tune
from deit_ray.study.status import stop, trial_status
from deit_ray.study.study import Study
from deit_ray.terminal.session import Session
from tests.support.commands import SPACE, call, command, wait_for
from tests.support.tracked import runs_below


def endings(uri: str, folder: Path) -> list[tuple]:
    """The status and outcome of all MLflow runs of a results folder."""
    return [(run.info.status, run.data.tags.get("outcome")) for run in runs_below(uri, folder)]


def description(uri: str, folder: Path) -> str:
    """The description of the only study in a results folder."""
    (study,) = [run for run in runs_below(uri, folder) if run.data.tags["deit_ray.kind"] == "study"]
    return study.data.tags["mlflow.note.content"]


# an epoch of five steps takes a tenth of a second
LONG = {
    "train.epochs": 3000,
    "search.scheduler": "none",
    "search.space": {"optim.lr": SPACE["optim.lr"]},
}
SHORT = LONG | {"train.epochs": 2}


def test_a_trial_and_a_study_are_stopped_from_another_terminal_through_the_clusters_address(
    ray_cluster, small_file, server, tmp_path
):
    address, results = ["--address", ray.get_runtime_context().gcs_address], tmp_path / "results"
    with command(
        "tune", small_file(**LONG | {"search.trials": 3, "search.max_concurrent": 2}), *address
    ) as process:
        journals = [results / "short-1" / f"trial-{number:04d}" / "journal" for number in (0, 1)]
        wait_for(lambda: all(journal.exists() for journal in journals), 120)
        assert "short-1: running" in call("status", "short", "--results", results, *address).out
        began = time.monotonic()
        stopped = call("stop", "short", 0, "--results", results, *address)
        assert stopped.out == "short-1: trial 0: cancelled\n"
        assert stop("short", None, str(results)) == "short-1: stopped by a person"  # the same from Python
        assert time.monotonic() - began < 60
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "short-1: ended with no finished trial: stopped by a person" in output
    trials = Study.open("short", str(results)).optuna.trials
    assert {trial.state.name for trial in trials} == {"FAIL"}
    assert {trial.user_attrs["outcome"] for trial in trials} == {"cancelled"}
    assert len(trials) == 2 or len(trials) == 3  # the third one may have begun after the first was stopped
    assert set(endings(server.uri, results)) == {("KILLED", "cancelled")}
    told = description(server.uri, results)
    assert told.startswith("**short-1: stopped by a person**")
    assert "### Best: no trial has finished" in told
    assert f"deit-ray tune --resume short-1 --trials +20 --results {results}" in told
    with pytest.raises(UserError, match="there is nothing to stop"):
        stop("short", None, str(results))


def test_a_disk_that_fills_up_stops_a_study_which_can_be_resumed_once_there_is_room(
    ray_cluster, small_file, tmp_path, thorough
):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("only root can mount a small file system")

    def fill() -> None:
        wait_for(lambda: list(disk.glob("short-1/trial-0000/step-*")), 120)
        subprocess.run(["dd", "if=/dev/zero", f"of={disk}/big"], capture_output=True, check=False)

    try:
        keys = {
            "results.uri": str(disk),
            "search.trials": 1,
            "train.max_failures": 0,
            "train.epochs": 40,
        }
        filling = threading.Thread(target=fill)
        filling.start()
        stopped = call("tune", small_file(**LONG | keys))
        filling.join()
        assert stopped.status == 1
        error = re.search(
            r"error: short-1: .*\nwhat its trials have done is kept; once this is fixed, "
            r"resume with: .*--resume short-1.*",
            stopped.err,
        )
        assert error, stopped
        assert "no space left on device" in error[0].lower() or "full" in error[0]
        assert "Traceback" not in stopped.out + stopped.err
        (disk / "big").unlink()
        assert Study.open("short", str(disk)).optuna.trials[0].state.name == "RUNNING"
        study = resume_study("short", session=Session(results=str(disk)))
        assert [trial.state.name for trial in study.optuna.trials] == ["COMPLETE"]
        assert sorted(study.optuna.trials[0].intermediate_values) == list(range(1, 41))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_missing_shard_is_named_and_the_study_can_be_resumed_once_it_is_back(
    ray_cluster, small_file, tints, server, tmp_path
):
    data, results = tmp_path / "data", tmp_path / "results"
    shutil.copytree(tints, data)
    shard = data / "test-00000.parquet"
    shard.rename(tmp_path / "away")
    keys = {
        "data.uri": str(data),
        "search.trials": 1,
        "search.metric": "test/top1",
        "search.rank_on_test": True,
    }
    path = small_file(**SHORT | keys | {"train.max_failures": 0})
    with pytest.raises(
        UserError,
        match=rf"(?s)shard {shard}, row groups? [0-9, ]+is missing or damaged "
        r".*resume with: .*--resume short-1",
    ):
        tune(load_experiment(path))
    told = description(server.uri, results)
    assert told.startswith("**short-1: interrupted**")
    assert f"deit-ray tune --resume short-1 --results {results}" in told
    (tmp_path / "away").rename(shard)
    study = resume_study("short", session=Session(results=str(results)))
    assert [trial.state.name for trial in study.optuna.trials] == ["COMPLETE"]
    assert description(server.uri, results).startswith("**short-1: all trials have ended**")


def test_trials_that_fail_in_the_same_way_end_a_study_and_status_says_why(
    ray_cluster, small_file, server, tmp_path
):
    # the loss explodes at once at every learning rate; since the searched values cause this, it counts for
    # budget.failures, but not for budget.same_failure
    keys = {
        "search.space": {"optim.lr": {"log": [1e30, 1e31]}},
        "optim.warmup_epochs": 0,
        "optim.scale_lr": False,
    }
    path = small_file(
        **SHORT | keys | {"search.trials": 9, "search.budget.failures": 2, "search.max_concurrent": 1}
    )
    with pytest.raises(UserError, match=r"search\.budget\.failures: 2 trials failed; failed: the loss is"):
        tune(load_experiment(path))
    assert re.search(
        r"### Failed\n\n- trials? 0.*: the loss is", description(server.uri, tmp_path / "results")
    )
    study = Study.open("short", str(tmp_path / "results"))
    assert len(study.optuna.trials) == 2
    assert study.ended == "search.budget.failures: 2 trials failed"
    status = trial_status("short", 0, str(tmp_path / "results"))
    assert status.outcome.text.startswith("failed: the loss is")
    assert (status.failure.rank, status.failure.host) == (0, os.uname().nodename)
    assert status.workers[0]["host"] == os.uname().nodename
    assert 'deit_ray/training/worker.py", line' in status.failure.traceback
    assert set(endings(server.uri, tmp_path / "results")) == {
        ("FAILED", status.outcome.text),
        ("FAILED", "failed: no trial finished"),
    } | {("FAILED", trial.user_attrs["outcome"]) for trial in study.optuna.trials}


def test_a_target_ends_a_study_and_more_trials_extend_it(finished_study, tmp_path):
    """A finished study is resumed twice: with a target that it has already reached, and with more trials."""
    results = finished_study.copy(tmp_path / "results").results
    before = Study.open("short", str(results)).optuna.trials
    resume = [
        "tune",
        "--resume",
        "short",
        "--results",
        results,
        "--set",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
    ]
    planned = call(*resume, "--trials", "+1", "--dry-run")
    assert planned.status == 0, planned
    assert len(Study.open("short", str(results)).optuna.trials) == 3

    reached = call(*resume, "--trials", "+1", "--set", "search.budget.target=0.3")
    assert reached.status == 0, reached
    study = Study.open("short", str(results))
    assert study.ended.startswith("search.budget.target: trial 0 has reached 0.3"), study.ended
    assert len(study.optuna.trials) == 3

    more = call(*resume, "--set", "search.budget.target=0.999")
    assert more.status == 0, more
    study = Study.open("short", str(results))
    assert study.ended == "all trials have ended"
    assert [trial.state.name for trial in study.optuna.trials[3:]] in (["COMPLETE"], ["PRUNED"])
    assert study.optuna.trials[:3] == before


def process_of_trial() -> int:
    """The pid of the only trial that this test's Ray runs."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                is_trial = (
                    (entry / "cmdline").read_bytes().startswith((b"ray::Trial", b"ray::ResourceTrainable"))
                )  # idle, busy
                if (
                    is_trial and parent_of(parent_of(int(entry.name))) == os.getpid()
                ):  # its parent is the raylet
                    return int(entry.name)
    raise LookupError("no trial runs")


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
