"""A real study with a real MLflow, as people run it: from the command line, piped, interrupted, resumed and read back."""

import os
import re
import signal
import sys
import time

import mlflow
import numpy as np
import pytest
import timm

from deit_ray.cli.main import main
from deit_ray.commands.predict import find_model
from deit_ray.errors import UserError
from deit_ray.experiment.load import load_experiment
from deit_ray.study.search import tune
from deit_ray.study.study import Study
from deit_ray.trial.needs import Needs
from tests.support.commands import SPACE, command, session_processes, wait_for

pytestmark = pytest.mark.cluster


def test_a_study_runs_is_tracked_and_gives_its_best(search_file, tmp_path):
    results = tmp_path / "results"
    output = command("tune", search_file()).communicate(timeout=240)[0]
    assert re.search(r"best: trial \d+, val/top1 0\.\d+, test/top1 0\.\d+", output), output
    assert not re.search(r"\(raylet\)|\(pid=|INFO|WARNING", output), output
    assert len(output.splitlines()) < 60

    study = Study.open("short-1", str(results))
    board = study.leaderboard()
    assert sorted(board["trial"]) == [0, 1, 2]
    assert set(board["state"]) <= {"finished", "stopped early"}
    assert (board["state"] == "finished").any()
    first = study.optuna.trials[0].params
    assert first == {
        "augment.strength": 1.0,
        "optim.lr": 2e-3,
        "distillation.weight": 0.5,
    }  # the file's own values

    # Optuna, MLflow and the journals tell the same
    client = mlflow.MlflowClient(f"sqlite:///{results}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("deit_ray").experiment_id])
    parents = [run for run in runs if run.data.tags["deit_ray.kind"] == "study"]
    children = {
        int(run.data.tags["deit_ray.trial"]): run for run in runs if run.data.tags["deit_ray.kind"] == "trial"
    }
    assert len(parents) == 1
    assert sorted(children) == [0, 1, 2]
    for trial in study.optuna.trials:
        run = children[trial.number]
        ended = trial.user_attrs["outcome"]
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert run.data.tags["outcome"] == ended
        assert run.info.status == "FINISHED"
        assert run.data.tags.get("state") == {"COMPLETE": None, "PRUNED": "PRUNED"}[trial.state.name]
        assert {key: float(value) for key, value in run.data.params.items()} == pytest.approx(trial.params)
        curve = client.get_metric_history(run.info.run_id, "val/top1")
        assert {
            point.step // 20: point.value for point in curve
        } == trial.intermediate_values  # 20 steps an epoch
        losses = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
        assert losses == list(range(10, max(trial.intermediate_values) * 20 + 1, 10))
        names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        assert names == {"experiment.yaml"} | ({"model.safetensors"} if ended == "finished" else set())
    parent = parents[0]
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["best/val/top1"] == study.best().value
    assert parent.data.metrics["test/top1"] == study.optuna.user_attrs["test"]["test/top1"]

    # the best configuration is an experiment file, its weights load with plain timm
    best = load_experiment(results / "short-1" / "best.yaml")
    assert {key: best.get(key) for key in SPACE} == study.best().params
    assert best.search.space == {}
    arguments = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 4,
        "num_classes": 10,
    }
    path = find_model("short", str(results))
    assert path == str(results / "short-1" / "model.safetensors")
    assert (
        timm.create_model("deit_tiny_distilled_patch16_224", checkpoint_path=path, **arguments).num_classes
        == 10
    )
    status = command("status", "short", "--results", results).communicate(timeout=60)[0]
    assert "short-1" in status
    assert len(re.findall(r"^ +\d+ +(?:finished|stopped early) ", status, re.MULTILINE)) == 3


@pytest.mark.slow
def test_ctrl_c_ends_a_study_cleanly_and_it_can_be_resumed(search_file, tmp_path):
    process = command("tune", search_file(**{"search.trials": 2, "train.epochs": 3}), start_new_session=True)
    wait_for(lambda: (tmp_path / "results" / "short-1" / "trial-0001" / "journal").exists(), 120)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to Ray's processes too
    began = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert time.monotonic() - began < 15
    assert process.returncode == 130
    assert "tune --resume short-1" in output
    wait_for(lambda: not session_processes(process.pid), 15)

    output = command("tune", "--resume", "short-1", "--results", tmp_path / "results").communicate(
        timeout=240
    )[0]
    study = Study.open("short-1", str(tmp_path / "results"))
    states = [trial.state.name for trial in study.optuna.trials]
    assert len(states) == 2, output
    assert set(states) <= {"COMPLETE", "PRUNED"}


@pytest.mark.slow
def test_a_failing_trial_does_not_stop_the_study(ray_cluster, search_file):
    # two learning rates: one that learns, one that explodes at once
    space = {"optim.lr": {"choice": [1e-3, 1e30]}}
    path = search_file(
        **{"search.space": space, "search.sampler": "random", "search.scheduler": "none"},
        **{"train.epochs": 2, "search.trials": 2, "seed": 1},
    )
    study = tune(load_experiment(path, {"optim.warmup_epochs": 0}))
    board = study.leaderboard()
    failed = board[board["optim.lr"] == 1e30]
    assert len(failed) == 1
    assert all(failed["state"] == "failed")
    assert all("NonFiniteLoss: the loss is" in outcome for outcome in failed["outcome"])
    assert all(board[board["optim.lr"] == 1e-3]["state"] == "finished")
    assert np.isfinite(study.best().value)


def test_a_plan_that_can_never_start_is_refused_with_the_sum(ray_cluster, experiment):
    exp = experiment(
        "digits_student",
        {
            "distillation.kind": "none",
            "train.workers": 8,
            "search.space": {"optim.lr": {"log": [1e-4, 1e-2]}},
        },
    )
    with pytest.raises(
        UserError,
        match=r"8 workers x \(0.75 training \+ 0.25 stream\) CPUs = 8 CPUs, but the cluster has 4 CPUs",
    ):
        tune(exp)


def test_concurrency_follows_from_needs_and_resources(experiment):
    needs = Needs.of(experiment("digits_student", {"train.workers": 2}), "cuda")
    assert (needs.gpus, needs.cpus, needs.stream_cpus) == (2, 1.5, 0.5)
    assert needs.fit({"CPU": 64, "GPU": 7}) == 3
    assert needs.fit({"CPU": 5, "GPU": 8}) == 2
    assert needs.fit({"CPU": 64}) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune"], "name either an experiment file or --resume STUDY"),
        (["tune", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["tune", "--resume", "nothing"], "nothing: no such study in results; there are: none"),
        (["train", "{file}", "--set", "optim.lrr=1"], "no such key; did you mean optim.lr?"),
        (["train", "{file}", "--set", "data.uri=nowhere"], "no prepared data set there"),
        (["train", "{file}", "--set", "student.model=deit_tny"], "no model named 'deit_tny'"),
        (
            ["train", "{file}", "--set", "distillation.teacher.weights=run:nobody"],
            "no finished run of that name",
        ),
        (["predict", "nobody", "x.png"], "nobody: neither a model.safetensors nor a finished run"),
        (["ui"], "no MLflow database there yet"),
    ],
)
def test_what_cannot_be_ends_in_one_message_before_anything_starts(
    search_file, tmp_path, monkeypatch, capsys, arguments, message
):
    arguments = [argument.format(file=search_file()) for argument in arguments]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["deit-ray", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.startswith("error: ")
    assert output.out == ""
    assert not list((tmp_path / "results").glob("*"))
