"""`diff` compares runs, `reproduce` repeats one, and `best --verify` evaluates the best model again."""

import copy
import json
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deit_ray.cli.main import main
from deit_ray.cli.views import show_difference
from deit_ray.commands.diff import compare, compare_origins
from deit_ray.commands.predict import verify_best
from deit_ray.commands.reproduce import compare_points, points_of, reproduce
from deit_ray.errors import UserError
from deit_ray.experiment.load import load_experiment
from deit_ray.results import folders
from deit_ray.results.origin import check_same_inputs, describe_code, note_origin, read_origins
from deit_ray.study.search import tune
from deit_ray.study.study import Study
from deit_ray.terminal.session import Session
from deit_ray.trial.resolve import resolve
from tests.conftest import SMALL_STEPS
from tests.support.commands import call

PLAIN = {
    "distillation.kind": "none",
    "train.log_every": 5,
    "optim.warmup_epochs": 1,
    "student.depth": 1,
    "train.epochs": 2,
}


def text_of(shown) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def test_a_trial_of_a_study_is_reproduced_as_far_as_it_came_and_a_changed_point_is_found(
    finished_study, tmp_path
):
    copy = finished_study.copy(tmp_path / "results")
    # one point of the journal of a trial that was stopped early is changed: only this point is found
    segment = copy.folder / "trial-0001" / "journal" / "000000.jsonl"
    lines = [json.loads(line) for line in segment.read_text().splitlines()]
    place = next(i for i, (name, _, step, _) in enumerate(lines) if (name, step) == ("train/loss", 3))
    was, lines[place][1] = lines[place][1], 1.5
    segment.write_text("\n".join(json.dumps(line) for line in lines))
    measured = points_of(str(copy.folder / "trial-0001"))
    points, last = len(measured), max(step for _, step in measured)
    assert points > SMALL_STEPS * 3
    assert last >= SMALL_STEPS  # its workers train until they are stopped
    again = call("reproduce", "short/1", "--results", copy.results)
    assert again.status == 1
    shown = " ".join(again.out.split())
    assert (
        f"short-1-trial-0001-again-1: {points - 1} of {points} metric points up to step {last} "
        "equal those of short-1/trial-0001" in shown
    )
    assert f"1 differ, first train/loss at step 3: 1.5 then, {was!r} now" in shown
    assert "code, packages, data and machine are the same" in shown


def test_two_trials_of_a_study_differ_in_what_was_searched(finished_study):
    study = Study.open("short", str(finished_study.results))
    shown = call("diff", "short/0", "short/1", "--results", finished_study.results).out
    assert all(key in shown for key in study.optuna.trials[0].params)
    difference = compare("short", "short/0", str(finished_study.results))
    assert difference.settings.keys() >= {"search.space.optim.lr", "search.space.augment.strength"}
    assert {best for best, _ in difference.values} == {study.best().value}


def test_the_best_model_of_a_study_scores_what_was_recorded_and_another_one_does_not(
    finished_study, tmp_path
):
    copy = finished_study.copy(tmp_path / "results")
    verified = call("best", "short", "--verify", "--results", copy.results)
    assert verified.status == 0, verified
    assert "difference 0\n" in verified.out

    # a model that answers "greenish" for every image is right for the greenish images only
    study = Study.open("short", str(copy.results))
    path = f"{study.trial_folder(study.best().number)}/model.safetensors"
    with safe_open(path, "pt") as file:
        description = file.metadata()
    state = load_file(path)
    for name in [name for name in state if name.startswith("head")]:
        state[name] = torch.zeros_like(state[name])
        if name.endswith("bias"):
            state[name][1] = 1.0
    save_file(state, path, description)
    # the last tenth of the 400 training images is held out
    labels = pq.read_table(f"{study.experiment.data.uri}/train-00000.parquet")["label"].to_pylist()[-40:]
    verified = call("best", "short", "--verify", "--results", copy.results)
    assert verified.status == 1
    assert (
        f"val/top1_ema {labels.count(1) / len(labels):.6f}, recorded {study.best().value:.6f}" in verified.out
    )


def test_two_runs_differ_in_their_settings_by_dotted_key(finished_run, tmp_path):
    copy = finished_run.copy(tmp_path / "results")
    results = str(copy.results)
    assert "nothing differs" in text_of(show_difference(compare("whole", str(copy.folder), results)))

    # an experiment file has settings only
    changed = {"name": "other", "optim.lr": 0.5, "results.uri": results}
    other = folders.new_folder(load_experiment(copy.folder / "experiment.yaml", changed))
    difference = compare("whole", "other", results)
    assert difference.settings == {"name": ("whole", "other"), "optim.lr": (0.002, 0.5)}
    assert difference.values[0][1] == points_of(str(copy.folder))["val/top1", 4 * SMALL_STEPS]
    assert difference.values[1] is None
    shown = text_of(show_difference(difference))
    assert "optim.lr" in shown
    assert "not known for both" in shown
    assert compare("whole", f"{other}/experiment.yaml", results).settings == difference.settings
    with pytest.raises(UserError, match=r"other: has measured nothing"):
        reproduce("other", Session(results=results))


def test_the_best_model_scores_what_was_recorded(ray_cluster, experiment, monkeypatch):
    space = {"optim.lr": {"log": [1e-3, 4e-3]}, "train.batch_size": {"choice": [64, 48]}}
    search = {"search.space": space, "search.trials": 2, "search.scheduler": "none"}
    study = tune(
        experiment(
            "digits_student", PLAIN | search | {"name": "tuned", "optim.ema_decay": 0.5, "train.epochs": 4}
        )
    )
    verified = verify_best(study)
    assert verified.holds
    assert verified.difference == 0
    results = str(Path(study.folder).parent)

    difference = compare("tuned", f"tuned/{study.best().number}", results)
    assert difference.settings.keys() >= {"search.space.optim.lr", "search.space.train.batch_size"}
    assert {best for best, _ in difference.values} == {study.best().value}

    # the other trial's weights in place of the best one's; called from the command line, as a person would
    best = study.best().number
    shutil.copy(f"{study.trial_folder(1 - best)}/model.safetensors", study.trial_folder(best))
    other = study.optuna.trials[1 - best].value
    monkeypatch.setattr(sys, "argv", ["deit-ray", "best", "tuned", "--verify", "--results", results])
    with pytest.raises(SystemExit) as stop:
        main()
    assert other != study.best().value
    assert stop.value.code == 1
    assert verify_best(study).evaluated == other


def test_origins_are_noted_once_and_their_differences_named(experiment, digits, tmp_path):
    exp = experiment("digits_student", PLAIN)
    manifest = resolve(exp).manifest
    for device in ("cpu", "cpu", "cuda"):
        note_origin(str(tmp_path), exp, manifest.fingerprint, device)
    first, second = read_origins(str(tmp_path))
    assert first["machine"]["device"] == "cpu"
    assert first["packages"].keys() >= {
        "python",
        "ray",
        "torch",
        "timm",
        "optuna",
        "mlflow",
        "pyarrow",
        "numpy",
    }
    assert compare_origins(first, first) == {
        "code": {},
        "patch": "",
        "packages": {},
        "data": {},
        "machine": {},
    }
    changed = copy.deepcopy(second)
    changed["code"] |= {"commit": "abc", "changes": "+a line\n"}
    changed["packages"]["torch"] = "1.0"
    changed["data"]["fingerprint"] = "other"
    found = compare_origins(first, changed)
    assert found["machine"] == {"device": ("cpu", "cuda")}
    assert found["packages"] == {"torch": (first["packages"]["torch"], "1.0")}
    assert found["data"] == {"fingerprint": (manifest.fingerprint, "other")}
    assert found["code"]["commit"] == (first["code"]["commit"], "abc")
    assert "++a line" in found["patch"].splitlines()


def test_images_that_have_changed_are_refused(experiment, tmp_path):
    exp = experiment("digits_student", PLAIN)
    manifest = resolve(exp).manifest
    check_same_inputs(str(tmp_path), exp, manifest.fingerprint)  # nothing was noted, so nothing is known
    note_origin(str(tmp_path), exp, manifest.fingerprint, "cpu")
    check_same_inputs(str(tmp_path), exp, manifest.fingerprint)
    with pytest.raises(
        UserError, match=r"the data set has changed since .* \(fingerprint changed, then [0-9a-f]{12}\)"
    ):
        check_same_inputs(str(tmp_path), exp, "changed")


def test_the_code_of_a_repository_is_known_by_commit_and_changes():
    code = describe_code()
    if (Path(__file__).parents[2] / ".git").exists():
        assert len(code["commit"]) == 40
        assert isinstance(code["changes"], str)
    else:
        assert code["commit"] is None


def test_points_are_compared_up_to_a_step_and_nan_equals_itself():
    nan = float("nan")
    then = {("loss", 1): 1.0, ("loss", 2): nan, ("loss", 3): 2.0, ("loss", 4): 9.0, ("x", 2): 1.0}
    now = {("loss", 1): 1.0, ("loss", 2): nan, ("loss", 3): 2.5, ("y", 1): 1.0}
    found = compare_points(then, now, 3)
    assert found == {
        "equal": 2,
        "differing": 1,
        "first": ("loss", 3, 2.0, 2.5),
        "missing": [("x", 2)],
        "added": [("y", 1)],
    }
