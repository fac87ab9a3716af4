"""A real study with a real MLflow, as people run it: by commands, piped, interrupted and resumed."""

import os
import platform
import posixpath
import re
import signal
import time

import mlflow
import numpy as np
import pytest
import timm

from deit_ray.commands.predict import find_model
from deit_ray.errors import UserError
from deit_ray.experiment.load import load_experiment
from deit_ray.results.folders import results_of
from deit_ray.results.journal import iterate_points
from deit_ray.study.description import describe
from deit_ray.study.search import tune
from deit_ray.study.study import Study
from deit_ray.tracking.curves import is_curve
from deit_ray.trial.needs import Needs
from tests.conftest import SMALL_STEPS
from tests.support.commands import (
    SPACE,
    call,
    command,
    output_of,
    session_processes,
    wait_for,
)
from tests.support.tracked import (
    history_of,
    inputs_of,
    models_below,
    ranked_by_mlflow,
    registered_by,
    runs_below,
    versions_of,
)


def test_a_study_runs_is_tracked_and_gives_its_best(finished_study, server):
    assert finished_study.ended.status == 0, finished_study.ended
    output = finished_study.ended.out
    assert re.search(r"best: trial \d+, val/top1_ema [01]\.\d+, test/top1 [01]\.\d+", output), output
    assert len(output.splitlines()) < 60

    study = Study.open("short-1", str(finished_study.results))
    board = study.leaderboard()
    assert sorted(board["trial"]) == [0, 1, 2]
    states = board.set_index("trial")["state"]
    # with this seed the second trial's learning rate is 1e-6: it only guesses, so ASHA stops it at once
    assert (states[0], states[1]) == ("finished", "stopped early")
    assert states[2] in ("finished", "stopped early")
    assert study.optuna.trials[1].params["optim.lr"] == 1e-6
    # the first has the file's own values
    first = study.optuna.trials[0].params
    assert first == {"augment.strength": 1.0, "optim.lr": 2e-3, "distillation.weight": 0.5}
    assert_mlflow_agrees(study, server.uri, host=re.escape(platform.node()))

    # the best configuration is an experiment file, its weights load with plain timm
    best = load_experiment(finished_study.folder / "best.yaml")
    assert {key: best.get(key) for key in SPACE} == study.best().params
    assert best.search.space == {}
    path = find_model("short", str(finished_study.results))
    assert path == str(finished_study.folder / "model.safetensors")
    arguments = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 64,
        "depth": 1,
        "num_heads": 4,
        "num_classes": 3,
    }
    model = timm.create_model("deit_tiny_distilled_patch16_224", checkpoint_path=path, **arguments)
    assert model.num_classes == 3
    status = call("status", "short", "--results", finished_study.results).out
    assert "short-1" in status
    assert len(re.findall(r"^ +\d+ +(?:finished|stopped early) ", status, re.MULTILINE)) == 3
    assert "short-1" in call("status", "--results", finished_study.results).out


def assert_mlflow_agrees(
    study: Study, uri: str, count: int = 3, steps: int = SMALL_STEPS, host: str = r"[\w, -]+"
) -> None:
    """Optuna, MLflow and the journals agree about a finished study of some small trials.

    Args:
        count: number of trials.
        steps: of an epoch.
        host: pattern of the names of the machines on which a trial ran.
    """
    client, found = mlflow.MlflowClient(uri), runs_below(uri, results_of(study.folder))
    name = f"/{posixpath.basename(study.folder)}/"  # there may be other studies
    runs = [run for run in found if name in f"{run.data.tags['deit_ray.folder']}/"]
    parents = [run for run in runs if run.data.tags["deit_ray.kind"] == "study"]
    trials = [run for run in runs if run.data.tags["deit_ray.kind"] == "trial"]
    children = {int(run.data.tags["deit_ray.trial"]): run for run in trials}
    assert len(parents) == 1
    assert len(trials) == len(children)
    assert sorted(children) == list(range(count))
    for trial in study.optuna.trials:
        run = children[trial.number]
        ended = trial.user_attrs["outcome"]
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert run.data.tags["outcome"] == ended
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.note.content"].startswith(ended.partition(" at ")[0])
        assert run.data.tags.get("state") == {"COMPLETE": None, "PRUNED": "PRUNED"}[trial.state.name]
        searched = {key: float(run.data.params[key]) for key in trial.params}
        assert searched == pytest.approx(trial.params)
        assert set(inputs_of(run)) == {"training", "validation"}
        assert re.fullmatch(host, run.data.tags["deit_ray.host"])
        assert 0 < run.data.metrics["system/memory_percent"] <= 100
        assert 0 <= run.data.metrics["system/cpu_percent"] <= 100
        told = sorted((p.key, p.step, p.value) for p in history_of(uri, run))
        journal = iterate_points(f"{study.trial_folder(trial.number)}/journal")
        assert told == sorted((p.name, p.step, p.value) for p in journal if is_curve(p.name))
        # a worker may measure on for a moment after the scheduler has stopped its trial
        last = max(trial.intermediate_values) * steps
        curve = {step // steps: v for name, step, v in told if name == "val/top1_ema" and step <= last}
        assert curve == trial.intermediate_values
        losses = [step for name, step, _ in told if name == "train/loss" and step <= last]
        assert losses == list(range(1, last + 1))
        assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["experiment.yaml"]
        models = models_below(uri, study.trial_folder(trial.number))
        assert [(str(m.status), m.source_run_id) for m in models] == (
            [("READY", run.info.run_id)] if ended == "finished" else []
        )
        assert [m.model_id for m in models] == [output.model_id for output in run.outputs.model_outputs]
    # MLflow's table, sorted by one metric, has the leaderboard's values, its winner and its order
    metric, board = study.experiment.search.metric, study.leaderboard()
    ranked = ranked_by_mlflow(uri, study.folder, metric)
    assert sorted(ranked) == sorted(zip(board["trial"], board["best"], strict=True))
    finished = board[board["state"] == "finished"]
    assert [v for number, v in ranked if number in set(finished["trial"])] == list(finished["best"])
    assert ranked[0][1] == study.optuna.best_value == study.best().value
    best = children[study.best().number].data.metrics
    assert study.best().values[best["best/epoch"]] == study.best().value
    assert best["best/test_top1"] == study.optuna.user_attrs["test"]["test/top1"]
    parent = parents[0]
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["best/val_top1_ema"] == study.best().value
    assert parent.data.metrics["best/test_top1"] == best["best/test_top1"]
    assert set(inputs_of(parent)) == {"training", "validation", "test"}
    described = parent.data.tags["mlflow.note.content"]
    assert described == describe(study.story())
    assert f"Best: trial {study.best().number}, " in described
    assert "report.html" in {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert parent.data.metrics["test/top1"] == study.optuna.user_attrs["test"]["test/top1"]
    registered = registered_by(uri, study.folder)
    (version,) = versions_of(uri, registered.name)
    (best,) = models_below(uri, study.trial_folder(study.best().number))
    assert registered.aliases == {"best": version.version}
    assert version.tags["deit_ray.model"] == best.model_id
    assert best.model_id in [output.model_id for output in parent.outputs.model_outputs]


def test_a_study_is_quiet_where_no_terminal_is(own_ray, search_file, tmp_path):
    output = output_of("tune", search_file(**{"search.trials": 2, "train.epochs": 2}), seconds=240)
    assert re.search(r"best: trial \d+, val/top1 0\.\d+, test/top1 0\.\d+", output), output
    assert not re.search(r"\(raylet\)|\(pid=|INFO|WARNING", output), output
    assert len(output.splitlines()) < 60


def test_ctrl_c_ends_a_study_cleanly_and_it_can_be_resumed(own_ray, search_file, tmp_path):
    process = command("tune", search_file(**{"search.trials": 2, "train.epochs": 3}), start_new_session=True)
    wait_for(lambda: (tmp_path / "results" / "short-1" / "trial-0001" / "journal").exists(), 120)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)  # as from a terminal, which sends it to Ray's processes too
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


def test_a_failing_trial_does_not_stop_the_study(ray_cluster, search_file):
    # at one of the two learning rates the student learns, at the other the loss explodes at once
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
    assert all("failed: the loss is" in outcome for outcome in failed["outcome"])
    assert all(board[board["optim.lr"] == 1e-3]["state"] == "finished")
    assert np.isfinite(study.best().value)


def test_a_plan_that_can_never_start_is_refused_with_the_sum(ray_cluster, small):
    exp = small(**{"train.workers": 8, "search.space": {"optim.lr": {"log": [1e-4, 1e-2]}}})
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


@pytest.mark.parametrize(("part", "fit"), [(1.0, 3), (0.5, 6), (0.4, 6), (1 / 3, 9), (0.7, 3)])
def test_trials_share_a_gpu_but_none_lies_on_two(experiment, part, fit):
    needs = Needs.of(experiment("digits_student", {"train.gpus_per_worker": part}), "cuda")
    assert needs.gpus == part
    assert needs.fit({"CPU": 64, "GPU": 3}) == fit
    assert needs.fit({"CPU": 2, "GPU": 3}) == 2
    assert Needs.of(experiment("digits_student", {"train.gpus_per_worker": part}), "cpu").gpus == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune"], "name either an experiment file or --resume STUDY"),
        (["tune", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["tune", "--resume", "nothing"], "nothing: no such run, study or trial in results; there are: none"),
        (["train", "{file}", "--set", "optim.lrr=1"], "no such key; did you mean optim.lr?"),
        (["train", "{file}", "--set", "data.uri=nowhere"], "no prepared data set there"),
        (["train", "{file}", "--set", "student.model=deit_tny"], "no model named 'deit_tny'"),
        (
            ["train", "{file}", "--set", "distillation.teacher.weights=run:nobody"],
            "no finished run of that name",
        ),
        (["predict", "nobody", "x.png"], "nobody: neither a model.safetensors nor a finished run"),
        (["ui"], "has no MLflow database yet"),
    ],
)
def test_wrong_input_ends_in_one_message_before_anything_starts(
    search_file, tmp_path, monkeypatch, arguments, message
):
    arguments = [argument.format(file=search_file()) for argument in arguments]
    monkeypatch.chdir(tmp_path)
    ended = call(*arguments)
    assert ended.status == 1
    assert message in ended.error
    assert ended.out == ""
    assert not list((tmp_path / "results").glob("*"))
