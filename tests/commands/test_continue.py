"""`train --continue`: resumes a run that was interrupted, and extends one that has ended."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState
from safetensors.torch import load_file

from deit_ray.cli.main import main
from deit_ray.commands.continuing import continue_run, lengthen
from deit_ray.commands.reproduce import points_of
from deit_ray.errors import UserError
from deit_ray.experiment.load import dump_experiment, load_experiment
from deit_ray.models.optim import lr_at
from deit_ray.models.weights import read_description
from deit_ray.results import folders
from deit_ray.results.folders import MODEL
from deit_ray.results.origin import read_origins
from deit_ray.study.study import Study
from deit_ray.terminal.session import Session
from deit_ray.trial import run
from tests.conftest import SMALL_STEPS
from tests.support.commands import call, command, wait_for
from tests.support.data import TINTS
from tests.support.tracked import history_of, runs_below

PLAIN = {"distillation.kind": "none", "train.log_every": 1, "optim.warmup_epochs": 1, "student.depth": 1}


def test_a_continued_run_equals_one_that_never_stopped(finished_run, server, tmp_path, monkeypatch):
    results, whole = tmp_path / "results", finished_run.folder
    whole_file = finished_run.results.parent / "whole.yaml"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)  # counts now; afterwards the run's own file does
    fixed = ["--set", f"results.uri={results}", "--set", "name=half", "--set", "train.epochs=2"]
    begun = call("train", whole_file, *fixed)
    assert begun.status == 0
    assert f"MLflow at {server.uri}, as MLFLOW_TRACKING_URI says; experiment.yaml keeps it" in begun.err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    half = results / "half-1"
    assert load_experiment(half / "experiment.yaml").tracking.uri == server.uri
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    further = call("train", "--continue", "half", "--epochs", 4, "--schedule", "hold", "--results", results)
    assert "half-1-1: finished" in further.out, further
    assert {path: path.read_bytes() for path in half.rglob("*") if path.is_file()} == before
    expected, further = points_of(str(whole)), results / "half-1-1"
    tested = {key: value for key, value in points_of(str(half)).items() if key[0].startswith("test/")}
    assert len(expected) > 4 * SMALL_STEPS * 3
    # the metrics on the test images of a run of two epochs
    assert {step for _, step in tested} == {2 * SMALL_STEPS}
    assert points_of(str(further)) == expected | tested
    a, b = (load_file(f"{folder}/model.safetensors") for folder in (whole, further))
    assert all((a[name] == b[name]).all() for name in a)
    assert load_experiment(further / "experiment.yaml").train.epochs == 4
    continued = {"folder": str(half), "step": 2 * SMALL_STEPS, "schedule": "hold"}
    assert read_origins(str(further))[-1]["continues"] == continued
    assert "continues" not in read_origins(str(half))[-1]
    (run,) = [run for run in runs_below(server.uri, results) if run.info.run_name == "half-1-1"]
    curve = [(p.step, p.value) for p in history_of(server.uri, run) if p.key == "train/loss"]
    assert sorted(curve) == [(step, expected["train/loss", step]) for step in range(1, 4 * SMALL_STEPS + 1)]
    session = Session(results=str(results))
    with pytest.raises(UserError, match=r"half-1: --epochs 2: it has 2 epochs already; allowed: above 2"):
        continue_run("half-1", 2, session=session)
    with pytest.raises(
        UserError, match=r"half: has ended, at epoch 2; set the total number of epochs: --epochs N, above 2"
    ):
        continue_run("half", session=session)
    shutil.rmtree(half / f"step-{2 * SMALL_STEPS:08d}")
    with pytest.raises(UserError, match=r"half-1: its checkpoints are not kept"):
        continue_run("half", 4, session=session)


def test_the_model_that_a_run_keeps_scores_what_it_has_recorded(finished_run, tints, tmp_path):
    """The best checkpoint by val/top1, evaluated on the images that the run has held out."""
    points = points_of(str(finished_run.folder))
    best = max(value for (name, _), value in points.items() if name == "val/top1")
    results = ["--results", finished_run.results]
    evaluated = call("evaluate", "whole", "--data", tints, "--split", "val", *results)
    assert f"val/top1 {best:.4f}" in evaluated.out, evaluated  # of 40 images: four decimals are exact
    assert "val/images 40" in evaluated.out
    assert read_description(finished_run.folder / MODEL)["exif"] is False  # as in the data set's manifest

    rows = pq.read_table(f"{tints}/test-00000.parquet").to_pylist()[:30]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.jpg").write_bytes(row["image"])
    predicted = call("predict", "whole", *(tmp_path / f"{number}.jpg" for number in range(30)), *results)
    answers = re.findall(r"^\S+: (\w+) \d+\.\d%, \w+ \d+\.\d%, \w+ \d+\.\d%$", predicted.out, re.MULTILINE)
    right = sum(answer == TINTS[row["label"]] for answer, row in zip(answers, rows, strict=True))
    assert right > 20  # guessing gives 10


def test_a_trial_that_was_stopped_early_continues_as_if_it_had_not_been(ray_cluster, experiment):
    keys = PLAIN | {
        "train.epochs": 3,
        "search.space": {"optim.lr": {"choice": [0.001]}},
        "search.grace_epochs": 1,
        "name": "stopped",
    }
    study = Study.create(experiment("digits_student", keys))
    study.optuna.enqueue_trial({"optim.lr": 0.001})
    trial = study.optuna.ask({"optim.lr": CategoricalDistribution([0.001])})
    own = study.trial_experiment(trial.params)
    run.train_in(
        lambda _: study.trial_folder(0),
        own.with_overrides({"train.epochs": 1, "optim.schedule_epochs": 3}),
        splits=("val",),
    )
    Path(study.trial_folder(0), "experiment.yaml").write_text(
        dump_experiment(own)
    )  # as a study writes it, before it stops the trial
    results = str(Path(study.folder).parent)
    with pytest.raises(
        UserError,
        match=r"stopped-1/0: has not ended; resume its study with: deit-ray tune --resume stopped-1",
    ):
        continue_run("stopped/0", 3, session=Session(results=results))
    study.optuna.tell(trial, state=TrialState.PRUNED)
    further = continue_run("stopped/0", 3, "hold", Session(results=results))
    assert further.name == "stopped-1-trial-0000-1"
    whole = run.train(own.with_overrides({"name": "whole"}))
    assert points_of(further.folder) == points_of(whole.folder)
    with pytest.raises(
        UserError,
        match=r"stopped: is a study; resume it with: deit-ray tune --resume stopped-1 --results \S+, "
        r"or name one of its trials",
    ):
        continue_run("stopped", 3, session=Session(results=results))


def test_the_policies_of_the_schedule(experiment):
    done = experiment("digits_student", PLAIN | {"train.epochs": 10})
    stretched, held = lengthen(done, 30, "stretch"), lengthen(done, 30, "hold")

    def lr(experiment, epoch):
        return lr_at(epoch * 20, 20, experiment.optim, experiment.train.epochs, experiment.optim.peak_lr(64))

    planned = done.with_overrides({"train.epochs": 30})
    assert [lr(stretched, epoch) for epoch in range(30)] == [lr(planned, epoch) for epoch in range(30)]
    assert [lr(held, epoch) for epoch in range(10)] == [lr(done, epoch) for epoch in range(10)]
    assert {lr(held, epoch) for epoch in range(10, 30)} == {done.optim.min_lr}


def test_an_interrupted_run_is_resumed_in_its_folder(own_ray, experiment, tmp_path):
    path = tmp_path / "long.yaml"
    path.write_text(
        dump_experiment(
            experiment("digits_student", PLAIN | {"name": "long", "train.epochs": 6, "student.depth": 4})
        )
    )
    folder = tmp_path / "results" / "long-1"
    process = command("train", path, start_new_session=True)
    wait_for(lambda: process.poll() is not None or list(folder.glob("step-*")), 120)
    assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 130, output
    assert f"deit-ray train --continue long-1 --results {tmp_path}/results" in output
    assert not (folder / "run.json").exists()
    with pytest.raises(UserError, match="finish it first: deit-ray train --continue long-1"):
        continue_run("long-1", 9, session=Session(results=str(tmp_path / "results")))

    rest = command("train", "--continue", "long", "--results", tmp_path / "results")
    output = rest.communicate(timeout=200)[0]
    assert rest.returncode == 0, output
    assert "epoch   1/6" not in output  # it did not begin again
    assert json.loads((folder / "run.json").read_text())["outcome"] == "finished"
    assert {step for name, step in points_of(str(folder)) if name == "val/top1"} == set(range(20, 121, 20))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/results/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("deit_ray").experiment_id])
    assert [found.data.tags["outcome"] for found in runs] == ["finished"]
    steps = [point.step for point in client.get_metric_history(runs[0].info.run_id, "train/loss")]
    assert steps == list(range(1, 121))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "train: name either an experiment file or --continue RUN"),
        (
            ["x.yaml", "--epochs", "3"],
            "train: --epochs belongs to --continue; for a new run use --set train.epochs=N",
        ),
        (["--continue", "x", "--schedule", "hold"], "name both"),
        (["--continue", "x", "--set", "optim.lr=1"], "train: --set cannot change an existing run"),
        (["--continue", "x"], "x: no such run, study or trial in results; there are: none"),
    ],
)
def test_wrong_commands_say_what_is_allowed(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["deit-ray", "train", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert message in capsys.readouterr().err


def test_an_unknown_run_is_answered_with_what_there_is(experiment, tmp_path):
    results = str(tmp_path / "results")
    folder = folders.new_folder(experiment("digits_student", PLAIN))
    folders.new_folder(experiment("digits_student", PLAIN))
    (Path(folder) / "trial-0007").mkdir()
    shutil.copy(f"{folder}/experiment.yaml", f"{folder}/trial-0007")
    assert folders.find_run("digits_student", results).endswith("digits_student-2")
    for name in ("digits_student-1/7", "digits_student-1/trial-0007", f"{folder}/trial-0007"):
        assert folders.find_run(name, results) == f"{folder}/trial-0007"
    assert folders.find_run(folder, "nowhere") == folder
    with pytest.raises(
        UserError,
        match=r"nobody: no such run, study or trial in .*; there are: digits_student-1, digits_student-2",
    ):
        continue_run("nobody", 3, session=Session(results=results))
    with pytest.raises(
        UserError, match=r"digits_student-1/8: no such trial; digits_student-1 has: trial-0007"
    ):
        folders.find_run("digits_student-1/8", results)
