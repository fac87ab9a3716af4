"""Spaces of which a part cannot run, and small ones, in real studies and runs."""

import json
import shutil
from pathlib import Path

import mlflow
import pytest
from optuna.trial import TrialState

from deit_ray.commands.predict import evaluate
from deit_ray.errors import UserError
from deit_ray.results.folders import name_of, results_of, saved_steps, trials_of
from deit_ray.study.study import Study
from tests.support.commands import call


def test_a_study_of_a_small_space_tries_each_combination_once_and_no_impossible_one(
    ray_cluster, small_file, thorough
):
    space = {"student.width": {"choice": [48, 64]}, "student.heads": {"choice": [3, 4]}}
    keys = {"train.epochs": 1, "optim.warmup_epochs": 0, "search.space": space, "search.trials": 6}
    path = small_file(**keys, **{"search.scheduler": "none"})
    ended = call("tune", path)
    assert ended.status == 0, ended
    assert "about 25% of it cannot run, such as student.width=64, student.heads=3" in ended.err
    study = Study.open("short-1", str(path.parent / "results"))
    assert study.ended == "search.space is exhausted: each of its 4 combinations was tried"
    assert study.ended in ended.out
    (refused,) = study.records(TrialState.FAIL)
    assert refused.params == {"student.width": 64, "student.heads": 3}
    assert "student.width 64 is not divisible by student.heads (3)" in refused.outcome.text
    assert len(study.records(TrialState.COMPLETE)) == 3
    assert not list(Path(study.trial_folder(refused.number)).glob("worker-*.json"))  # no worker ran
    client = mlflow.MlflowClient(study.experiment.tracking.uri)
    experiment_id = client.get_experiment_by_name("deit_ray").experiment_id
    folder = study.trial_folder(refused.number)
    (run,) = client.search_runs([experiment_id], f"tags.`deit_ray.folder` = '{folder}'")
    assert (run.info.status, run.data.tags["outcome"]) == ("FAILED", refused.outcome.text)
    again = call("tune", "--resume", "short-1", "--trials", "+3", "--results", path.parent / "results")
    assert again.status == 0, again
    assert len(Study.open("short-1", str(path.parent / "results")).records()) == 4


def test_a_run_without_val_images_saves_checkpoints_and_lands_where_it_should(ray_cluster, small_file):
    path = small_file(**{"name": "trial-5", "data.holdout": 0.0, "tracking.uri": None})
    results = path.parent / "results"
    ended = call("train", path)
    assert ended.status == 0, ended
    assert "nothing is measured before the last epoch: data.holdout 0 of 400" in ended.err
    folder = results / "trial-5-1"
    assert "epoch   1/2" in ended.out  # said, and saved
    assert len(saved_steps(str(folder))) == 1
    assert "test/top1" in json.loads((folder / "run.json").read_text())["metrics"]
    longer = call("train", "--continue", "trial-5", "--epochs", "3", "--results", results)
    assert longer.status == 0, longer
    assert (results / "trial-5-1-1" / "model.safetensors").is_file()
    assert not list(path.parent.glob("trial*"))


def test_folders_of_runs_are_told_from_those_of_trials(tmp_path):
    for folder, name, results in (
        ("/r/trial-5-1", "trial-5-1", "/r"),
        ("/r/trial-1", "trial-1", "/r"),
        ("/r/s-1/trial-0007", "s-1/trial-0007", "/r"),
        ("/r/s-1/trial-12345", "s-1/trial-12345", "/r"),
    ):
        assert (name_of(folder), results_of(folder)) == (name, results)
    (tmp_path / "trial-0001").mkdir()
    (tmp_path / "trial-5-1").mkdir()
    assert trials_of(str(tmp_path)) == ["trial-0001"]


def test_evaluate_takes_the_val_images_of_the_models_own_run(finished_run, tints, tmp_path, monkeypatch):
    folder = tmp_path / "results" / "whole-1"
    shutil.copytree(finished_run.folder, folder)
    text = (folder / "experiment.yaml").read_text()
    seen = []
    monkeypatch.setattr(
        "deit_ray.commands.predict._evaluate",
        lambda path, experiment, *rest: (seen.append(experiment.data.holdout) or {}, "cpu"),
    )
    for holdout in (0.1, 0.25):
        (folder / "experiment.yaml").write_text(text.replace("holdout: 0.1\n", f"holdout: {holdout}\n"))
        evaluate(str(folder), tints, "val")
    assert seen == [0.1, 0.25]
    (folder / "experiment.yaml").write_text(text.replace("holdout: 0.1\n", "holdout: 0.0\n"))
    for split, said in (("val", "held out 0 of the training images"), ("validation", "allowed: val, test")):
        with pytest.raises(UserError, match=said):
            evaluate(str(folder), tints, split)
