"""`plan` shows what the study would do, and starts nothing."""

import json
import shutil
from pathlib import Path

import pytest
import ray
from rich.console import Console

from deit_ray.cli.views import show_plan
from deit_ray.commands.disk import disk_of
from deit_ray.commands.plan import changed_settings, plan, plan_of, rate_of, resources_of
from deit_ray.errors import UserError
from deit_ray.experiment.load import dump_experiment
from deit_ray.results import folders
from deit_ray.results.folders import MODEL
from deit_ray.results.journal import JournalWriter
from deit_ray.results.origin import note_origin
from deit_ray.results.removal import list_files
from deit_ray.study.searcher import StudySearcher
from deit_ray.study.study import Study
from deit_ray.terminal.session import Session
from deit_ray.trial.resolve import resolve
from tests.support.commands import call

PLAIN = {"distillation.kind": "none"}
SPACE = {
    "optim.lr": {"log": [3e-4, 1e-2]},
    "augment.strength": {"float": [0, 2]},
    "optim.warmup_epochs": {"int": [1, 3]},
}
SEARCH = PLAIN | {"search.space": SPACE, "search.trials": 7, "search.grace_epochs": 1, "train.epochs": 4}


def text_of(shown) -> str:
    console = Console(width=250)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def ran(exp, device: str, speeds: list[float], folder: str | None = None) -> str:
    """The folder of a run that measured these speeds on such a device."""
    folder = folder or folders.new_folder(exp)
    note_origin(folder, exp, resolve(exp).manifest.fingerprint, device)
    journal = JournalWriter(f"{folder}/journal")
    for step, speed in enumerate(speeds):
        journal.add({"perf/images_per_s": speed}, step)
    journal.flush()
    return folder


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("lr", [2e-3, 0.5])  # inside the space, and outside
def test_the_sampled_trials_are_those_that_the_study_draws_first(experiment, sampler, lr):
    exp = experiment("digits_student", SEARCH | {"search.sampler": sampler, "optim.lr": lr})
    study = Study.create(exp)
    searcher = StudySearcher(study.optuna, exp, study.trial_folder)
    drawn = [searcher.suggest(str(number)) for number in range(5)]
    planned = plan(exp).sampled
    assert planned == [{key: trial[key] for key in SPACE} for trial in drawn]
    assert (planned[0]["optim.lr"] == 2e-3) == (lr == 2e-3)


def test_the_sums(experiment):
    # 1438 training images of which a tenth is held out: 1294; 20 steps of 64 an epoch
    exp = experiment("digits_student", SEARCH | {"search.max_concurrent": 2, "cost.images_per_s": 100.0})
    found = plan(exp)
    assert (found.trials, found.epochs, found.steps, found.samples) == (7, 28, 28 * 20, 28 * 20 * 64)
    assert found.worker_hours == pytest.approx(28 * 20 * 64 / 100 / 3600)
    here = resources_of(exp, Session())[0]
    assert found.fit == int(here["CPU"])  # a trial takes 0.75 + 0.25 CPUs
    assert found.concurrent == min(2, found.fit)
    shown = text_of(show_plan(found))
    assert "1 worker x (0.75 training + 0.25 stream) CPUs = 1 CPU" in shown
    assert "7 trials x 4 epochs = 28 epochs, 560 steps, 35,840 samples; asha stops some early" in shown
    assert "0.0996 CPU-worker-hours of training" in shown
    assert "cost.images_per_s" in shown
    assert not Path(exp.results.uri).exists()
    # 1294 images: 20 x 64 = 1280, but 25 x 50 = 1250 and 26 steps of 48
    sizes = plan(exp.with_overrides({"search.space": {"train.batch_size": {"choice": [48, 50, 64]}}}))
    assert (sizes.steps, sizes.samples) == (28 * 26, 28 * 1280)


def test_money_and_gpu_hours_where_there_are_gpus(experiment):
    exp = experiment(
        "digits_student", SEARCH | {"train.workers": 2, "cost.images_per_s": 100.0, "cost.per_gpu_hour": 2.5}
    )
    found = plan_of(resolve(exp), {"CPU": 16, "GPU": 8}, "the cluster")
    assert (found.device, found.fit, found.concurrent) == ("cuda", 4, 4)
    # GPU-hours = samples / speed of one worker, for any number of workers
    assert found.money == pytest.approx(28 * 20 * 64 / 100 / 3600 * 2.5)
    assert found.hours == pytest.approx(
        2 * found.worker_hours / 7 / 2
    )  # two rounds of four, two workers each
    assert "GPU-hours of training" in text_of(show_plan(found))
    halves = exp.with_overrides({"train.workers": 1, "train.gpus_per_worker": 0.5})
    sharing = plan_of(resolve(halves), {"CPU": 16, "GPU": 3}, "the cluster")
    assert (sharing.fit, sharing.money) == (6, pytest.approx(found.money / 2))
    assert f"{sharing.gpu_hours:.3g} GPU-hours of training" in text_of(show_plan(sharing))
    unpriced = exp.with_overrides({"cost.per_gpu_hour": None})
    assert "set the price in cost.per_gpu_hour" in text_of(
        show_plan(plan_of(resolve(unpriced), {"CPU": 16, "GPU": 8}, "the cluster"))
    )


def test_the_rate_is_that_of_the_newest_comparable_run(experiment):
    exp = experiment("digits_student", SEARCH)
    assert rate_of(exp, "cpu") is None
    assert "set the speed of one worker in cost.images_per_s" in text_of(show_plan(plan(exp)))
    single = exp.with_overrides({"search.space": {}})
    ran(single, "cpu", [100, 300, 200])
    ran(single.with_overrides({"train.batch_size": 32}), "cpu", [7])
    ran(single.with_overrides({"student.depth": 2}), "cpu", [8])
    ran(single, "cuda", [9])
    assert (rate_of(exp, "cpu").images_per_s, rate_of(exp, "cpu").source) == (
        200,
        "the median of digits_student-1",
    )
    assert rate_of(exp, "cuda").images_per_s == 9
    # with two workers each did half; the machine of a study's trial is in its study's origin.json
    study = ran(exp, "cpu", [])
    trial = f"{study}/trial-0003"
    Path(trial).mkdir()
    ran(single.with_overrides({"train.workers": 2}), "cpu", [500], trial)
    shutil.copy(f"{study}/experiment.yaml", f"{trial}/experiment.yaml")
    Path(trial, "experiment.yaml").write_text(dump_experiment(single.with_overrides({"train.workers": 2})))
    Path(trial, "origin.json").unlink()
    assert rate_of(exp, "cpu").images_per_s == 250
    assert rate_of(exp, "cpu").source == f"the median of {Path(study).name}/trial-0003"


def test_budgets_and_settings_are_shown(experiment):
    exp = experiment(
        "digits_student", SEARCH | {"search.budget": {"hours": 2.0, "target": 0.9, "patience": 4}}
    )
    shown = text_of(show_plan(plan(exp)))
    assert (
        "the study has run 2 hours, val/top1 reaches 0.9, 4 trials in a row are no better than the best, "
        "5 trials fail in the same way" in shown
    )
    assert "{log: [0.0003, 0.01]}" in shown  # as the experiment file says it
    settings = changed_settings(exp)
    assert settings["search.trials"] == 7
    assert settings["distillation.kind"] == "none"
    assert settings["search.space.optim.lr"] == {"log": [3e-4, 1e-2]}
    assert "train.workers" not in settings
    assert not any(value is None for value in settings.values())


def test_a_study_that_cannot_run_is_refused(experiment):
    with pytest.raises(
        UserError, match=r"32 workers x \(3 training \+ 0.25 stream\) CPUs = 104 CPUs, but the cluster has"
    ):
        plan(experiment("digits_student", SEARCH | {"train.workers": 32, "train.cpus_per_worker": 3.0}))
    with pytest.raises(UserError, match="no model named"):
        plan(experiment("digits_student", PLAIN | {"student.model": "deit_tny"}))


def test_the_command_starts_nothing(experiment, tmp_path, monkeypatch):
    (tmp_path / "one.yaml").write_text(dump_experiment(experiment("digits_student", PLAIN)))
    # Ray's own way to tell a node what it has
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({"CPU": 5, "GPU": 1}))
    planned = call("plan", tmp_path / "one.yaml", "--set", "train.epochs=5")
    assert planned.status == 0, planned
    assert "1 fit, 1 will run: this machine has 5 CPUs and 1 GPU" in planned.out
    assert "1 trial x 5 epochs" in planned.out
    assert "started" not in planned.err.lower()
    assert not ray.is_initialized()
    assert not (tmp_path / "results").exists()


def test_the_bytes_of_a_plan_are_those_of_a_trained_study(finished_study):
    study = Study.open(finished_study.name, str(finished_study.results))
    disk = disk_of(study.experiment, classes=3, trials=3, concurrent=1)
    for trial in study.records():
        files = list_files(study.trial_folder(trial.number))
        checkpoints = {name.partition("/")[0] for name in files if name.startswith("step-")}
        assert len(checkpoints) in (1, 2)
        for checkpoint in checkpoints:
            measured = sum(size for name, size in files.items() if name.startswith(f"{checkpoint}/"))
            assert disk.checkpoint <= measured <= 1.05 * disk.checkpoint
        if MODEL in files:
            assert disk.model <= files[MODEL] <= 1.05 * disk.model
        small = sum(size for name, size in files.items() if name.startswith("journal/"))
        assert sum(files.values()) - small <= 1.05 * disk.trial
