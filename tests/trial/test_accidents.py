"""What people do to a running study from outside, and what happens to it: each ends in one clear message, and can go on."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import mlflow
import pytest
import ray

from deit_ray.errors import UserError
from deit_ray.experiment.load import load_experiment
from deit_ray.results.folders import SNAPSHOT
from deit_ray.results.journal import iterate_points
from deit_ray.study.search import tune
from deit_ray.study.status import stop, trial_status
from deit_ray.study.study import Study
from tests.support.commands import SPACE, command, output_of, wait_for

pytestmark = pytest.mark.cluster
LONG = {
    "train.epochs": 200,
    "search.scheduler": "none",
    "distillation.kind": "none",
    "search.space": {"optim.lr": SPACE["optim.lr"]},
}
SHORT = LONG | {"train.epochs": 2}


def mlflow_runs(results: Path) -> dict:
    client = mlflow.MlflowClient(f"sqlite:///{results}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("deit_ray").experiment_id])
    return {
        run.data.tags.get("deit_ray.trial", "study"): (run.info.status, run.data.tags.get("outcome"))
        for run in runs
    }


def test_a_trial_and_a_study_are_stopped_from_another_terminal_through_the_clusters_address(
    ray_cluster, search_file, tmp_path
):
    address, results = ["--address", ray.get_runtime_context().gcs_address], tmp_path / "results"
    with command("tune", search_file(**LONG | {"search.max_concurrent": 2}), *address) as process:
        journals = [results / "short-1" / f"trial-{number:04d}" / "journal" for number in (0, 1)]
        wait_for(lambda: all(journal.exists() for journal in journals), 120)
        assert "short-1: running" in output_of("status", "short", "--results", results, *address)
        began = time.monotonic()
        assert (
            output_of("stop", "short", 0, "--results", results, *address) == "short-1: trial 0: cancelled\n"
        )
        assert stop("short", None, str(results)) == "short-1: stopped by a person"  # the same from Python
        assert time.monotonic() - began < 60
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "short-1: ended with no finished trial: stopped by a person" in output
    trials = Study.open("short", str(results)).optuna.trials
    assert {trial.state.name for trial in trials} == {"FAIL"}
    assert {trial.user_attrs["outcome"] for trial in trials} == {"cancelled"}
    assert len(trials) == 2 or len(trials) == 3  # the third one may have begun where the first was stopped
    assert set(mlflow_runs(results).values()) == {("KILLED", "cancelled")}
    with pytest.raises(UserError, match="there is nothing to stop"):
        stop("short", None, str(results))


def test_a_disk_that_fills_up_stops_a_study_which_goes_on_once_there_is_room(
    ray_cluster, search_file, tmp_path
):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        mlflow_uri = f"sqlite:///{tmp_path}/mlflow.db"
        keys = {
            "results.uri": str(disk),
            "tracking.uri": mlflow_uri,
            "search.trials": 1,
            "train.max_failures": 0,
            "train.epochs": 12,
        }
        path = search_file(**LONG | keys)
        with command("tune", path, "--address", ray.get_runtime_context().gcs_address) as process:
            wait_for(lambda: list(disk.glob("short-1/trial-0000/step-*")), 120)
            subprocess.run(["dd", "if=/dev/zero", f"of={disk}/big"], capture_output=True, check=False)
            output = process.communicate(timeout=90)[0]
        assert process.returncode == 1
        error = re.search(
            r"error: short-1: .*\nwhat its trials have done is kept; once this is mended, go on with: .*--resume short-1.*",
            output,
        )
        assert error, output
        assert "No space left on device" in error[0] or "full" in error[0]
        assert "Traceback" not in output
        (disk / "big").unlink()
        assert Study.open("short", str(disk)).optuna.trials[0].state.name == "RUNNING"
        study = tune(None, resume="short", results=str(disk))
        assert [trial.state.name for trial in study.optuna.trials] == ["COMPLETE"]
        assert sorted(study.optuna.trials[0].intermediate_values) == list(range(1, 13))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_shard_that_is_gone_is_named_and_the_study_goes_on_when_it_is_back(
    ray_cluster, search_file, digits, tmp_path
):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    shard = data / "test-00000.parquet"
    shard.rename(tmp_path / "away")
    keys = {
        "data.uri": str(data),
        "search.trials": 1,
        "search.metric": "test/top1",
        "search.rank_on_test": True,
    }
    path = search_file(**SHORT | keys | {"train.max_failures": 0})
    with pytest.raises(
        UserError,
        match=rf"(?s)shard {shard}, row groups? [0-9, ]+is missing or damaged .*go on with: .*--resume short-1",
    ):
        tune(load_experiment(path))
    (tmp_path / "away").rename(shard)
    study = tune(None, resume="short", results=str(tmp_path / "results"))
    assert [trial.state.name for trial in study.optuna.trials] == ["COMPLETE"]


def test_trials_that_fail_in_the_same_way_end_a_study_and_status_says_why(
    ray_cluster, search_file, tmp_path, capfd
):
    # every learning rate explodes at once; that is the values' fault, so it counts as failure but not as the same one
    keys = {
        "search.space": {"optim.lr": {"log": [1e30, 1e31]}},
        "optim.warmup_epochs": 0,
        "optim.scale_lr": False,
    }
    path = search_file(
        **SHORT | keys | {"search.trials": 9, "search.budget.failures": 2, "search.max_concurrent": 1}
    )
    with pytest.raises(UserError, match=r"search\.budget\.failures: 2 trials failed; failed: NonFiniteLoss"):
        tune(load_experiment(path))
    study = Study.open("short", str(tmp_path / "results"))
    assert len(study.optuna.trials) == 2
    assert study.ended == "search.budget.failures: 2 trials failed"
    status = trial_status("short", 0, str(tmp_path / "results"))
    assert status.outcome.startswith("failed: NonFiniteLoss: the loss is")
    assert (status.failure.rank, status.failure.host) == (
        0,
        os.uname().nodename,
    )  # the only worker, on this machine
    assert 'deit_ray/training/worker.py", line' in status.failure.traceback
    assert set(mlflow_runs(tmp_path / "results").values()) == {
        ("FAILED", status.outcome),
        ("FAILED", "failed: no trial finished"),
    } | {("FAILED", trial.user_attrs["outcome"]) for trial in study.optuna.trials}


def test_a_trial_whose_process_is_killed_goes_on_in_the_same_study(ray_cluster, search_file, tmp_path):
    path = search_file(**LONG | {"search.trials": 1, "train.epochs": 20})
    with command("tune", path, "--address", ray.get_runtime_context().gcs_address) as process:
        wait_for(
            (tmp_path / "results" / "short-1" / "trial-0000" / SNAPSHOT).exists, 120
        )  # the first checkpoint is whole
        os.kill(process_of_trial(), signal.SIGKILL)
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert re.search(r"warning: trial 0: its process died; it goes on from step \d+0", output)
    trial = Study.open("short", str(tmp_path / "results")).optuna.trials[0]
    assert (trial.state.name, sorted(trial.intermediate_values)) == ("COMPLETE", list(range(1, 21)))
    journal = tmp_path / "results" / "short-1" / "trial-0000" / "journal"
    points = [(p.name, p.step) for p in iterate_points(str(journal))]
    assert len(points) == len(set(points))
    assert [step for name, step in points if name == "train/loss"] == list(
        range(10, 401, 10)
    )  # 20 steps an epoch


def process_of_trial() -> int:
    """The process of the one trial that this test's Ray runs."""
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


def test_a_target_ends_a_study_and_more_trials_extend_it(ray_cluster, search_file, tmp_path):
    path = search_file(
        **SHORT | {"search.trials": 5, "search.budget.target": 0.01, "search.max_concurrent": 1}
    )
    study = tune(load_experiment(path))
    assert len(study.optuna.trials) == 1
    assert study.ended.startswith("search.budget.target: trial 0 has reached 0.01")
    first = study.optuna.trials[0]
    study = tune(
        None,
        resume="short",
        results=str(tmp_path / "results"),
        amend={"search.trials": 2, "search.budget.target": 0.99},
    )
    assert study.ended == "all trials have ended"
    assert [trial.state.name for trial in study.optuna.trials] == ["COMPLETE", "COMPLETE"]
    assert study.optuna.trials[0] == first
