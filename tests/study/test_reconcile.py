"""What a resume decides about trials as a killed driver leaves them; nothing is trained."""

import json
import os
import subprocess
import sys
import time

import pytest
from optuna.trial import TrialState

from deit_ray.errors import UnavailableError, UserError
from deit_ray.results.journal import JournalWriter, checkpoint_name
from deit_ray.study.budget import exceeded
from deit_ray.study.records import Spent
from deit_ray.study.resume import reconcile
from deit_ray.study.schedule import StudyScheduler
from deit_ray.study.searcher import StudySearcher
from deit_ray.study.study import Study
from deit_ray.trial.failure import Failure, write_failure
from tests.conftest import ROOT

STEPS = 20  # of an epoch


@pytest.fixture
def study(experiment) -> Study:
    keys = {
        "distillation.kind": "none",
        "train.epochs": 4,
        "search.trials": 4,
        "search.grace_epochs": 1,
        "search.space": {"optim.lr": {"log": [3e-4, 1e-2]}},
    }
    return Study.create(experiment("digits_student", {"name": "made"} | keys))


def leave(study: Study, values: list[float], saved: int, told: int = 0) -> int:
    """Leaves a trial as a killed driver does; returns its number.

    Args:
        values: the values that it has measured, one for each epoch.
        saved: the epoch of its checkpoint; 0 if it has none.
        told: the number of values that Optuna has stored.
    """
    trial = StudySearcher(study.optuna, study.experiment, study.trial_folder).ask()
    folder = study.trial_folder(trial.number)
    journal = JournalWriter(f"{folder}/journal")
    for epoch, value in enumerate(values, 1):
        journal.add({"val/top1": value, "epoch": epoch}, epoch * STEPS)
        journal.flush()
    if saved:
        result = {"checkpoint_dir_name": checkpoint_name(saved * STEPS)}
        snapshot = {"checkpoint_results": [result], "latest_checkpoint_result": result}
        with open(f"{folder}/checkpoint_manager_snapshot.json", "w") as file:
            json.dump(snapshot, file)
    for epoch in range(1, told + 1):
        trial.report(values[epoch - 1], epoch)
    trial.set_user_attr("times", dict.fromkeys(range(1, told + 1), time.time()))
    return trial.number


def found(study: Study) -> list[tuple]:
    return [
        (r.action, r.step, r.outcome and r.outcome.text)
        for r in reconcile(study, StudyScheduler(study.experiment))
    ]


def test_a_trial_resumes_from_its_last_whole_checkpoint_or_begins_again(study):
    leave(study, [0.5, 0.6], saved=2, told=1)
    leave(study, [0.5, 0.6], saved=1)
    leave(study, [0.5], saved=0)
    leave(study, [], saved=0)
    assert found(study) == [
        ("continued", 40, None),
        ("continued", 20, None),
        ("run again", 0, None),
        ("run again", 0, None),
    ]


def test_a_trial_whose_end_was_never_stored_is_ended_and_not_run_again(study):
    leave(study, [0.5, 0.6, 0.7, 0.8], saved=4, told=2)
    number = leave(study, [0.5], saved=1)
    write_failure(study.trial_folder(number), Failure("failed", "ValueError: no", "", "s"))
    assert found(study) == [("ended", 80, "finished"), ("ended", 20, "failed: ValueError: no")]


def test_a_failure_of_the_surroundings_does_not_end_a_trial(study):
    number = leave(study, [0.5], saved=1)
    write_failure(
        study.trial_folder(number),
        Failure("unavailable", "x: cannot be written: No space left on device", "", "s"),
    )
    assert found(study) == [("continued", 20, None)]


def test_a_decision_of_the_scheduler_holds_if_the_driver_died_before_it_was_stored(study):
    # ASHA keeps one trial of two at each rung: at epoch 1 it stops the second one, whose value is lower
    leave(study, [0.9], saved=1, told=1)
    time.sleep(0.01)
    leave(study, [0.1], saved=1)
    assert found(study) == [("continued", 20, None), ("ended", 20, "stopped early at epoch 1")]


def test_ended_trials_are_kept(study):
    number = leave(study, [0.5, 0.6, 0.7, 0.8], saved=4, told=4)
    study.optuna.tell(number, 0.8)
    assert found(study) == [("kept", 0, None)]
    assert study.trial(number).state == TrialState.COMPLETE


def test_two_drivers_of_one_study_are_one_too_many(study):
    code = (
        "import sys, time; from deit_ray.study.study import Study\n"
        f"with Study.open('made-1', {str(study.experiment.results.uri)!r}).driving():\n"
        " print('drives', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        assert other.stdout.readline() == "drives\n"
        assert study.driver()["pid"] == other.pid
        with (
            pytest.raises(UserError, match=rf"made-1: is running already, on \S+ as process {other.pid}"),
            study.driving(),
        ):
            pass
        other.kill()
        other.wait()
    assert study.driver() is None
    with study.driving():
        assert study.driver()["pid"] == os.getpid()


def test_a_study_is_extended_by_what_changes_no_trial_and_by_nothing_else(study):
    with pytest.raises(
        UserError, match=r"--set optim\.lr: cannot change in an existing study.*allowed are: search\.trials"
    ):
        study.amend({"optim.lr": 0.1})
    study.amend({"search.trials": 24, "search.budget.hours": 2})
    again = Study.open("made", study.experiment.results.uri)
    assert (again.experiment.search.trials, again.experiment.search.budget.hours) == (24, 2)


def test_a_late_result_changes_no_earlier_decision(study):
    # the first trial measured 0.9 before the second one's 0.1 was stored, but 0.9 itself was not stored: the
    # scheduler had let the second trial continue
    leave(study, [0.9], saved=1)
    time.sleep(0.01)
    leave(study, [0.1], saved=1, told=1)
    assert found(study) == [("continued", 20, None), ("continued", 20, None)]


def test_the_spent_time_of_a_study_is_kept(study):
    study.spent = Spent(wall_s=7000, gpu_s=10)
    study.amend({"search.budget.hours": 2})
    again = Study.open("made", study.experiment.results.uri)
    assert exceeded(again.experiment, [], again.spent) is None
    again.spent = Spent(again.spent.wall_s + 200, again.spent.gpu_s)
    assert (
        exceeded(again.experiment, [], Study.open("made", study.experiment.results.uri).spent)
        == "search.budget.hours: 2 are used up"
    )


def test_a_folder_whose_experiment_is_another_one_is_refused(study):
    path = f"{study.folder}/experiment.yaml"
    with open(path) as file:
        text = file.read()
    with open(path, "w") as file:
        file.write(text.replace("seed: 0", "seed: 7"))
    with pytest.raises(
        UserError, match=r"experiment\.yaml: seed: 7, but the study in this folder was made with 0; put back"
    ):
        Study.open("made", study.experiment.results.uri)


def test_a_study_of_an_earlier_version_is_shown_and_not_continued(study):
    made_with = study.made_with
    del made_with["augment"]["policy"]
    study.made_with = made_with
    reopened = Study.open("made", study.experiment.results.uri)
    with pytest.raises(
        UserError,
        match=r"made-1: was made by a version of deit_ray without augment\.policy, which would now be",
    ):
        reopened.amended({})


def test_a_results_folder_that_cannot_be_written_is_named(study):
    if os.getuid() == 0:  # root can write everywhere, except where nobody can
        mounted = subprocess.run(
            ["mount", "--bind", "-o", "ro", study.folder, study.folder], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip("cannot mount")
    else:
        os.chmod(study.folder, 0o500)
    try:
        with (
            pytest.raises(UnavailableError, match=r"results\.uri: .*made-1: cannot be written"),
            study.driving(),
        ):
            pass
    finally:
        if os.getuid() == 0:
            subprocess.run(["umount", study.folder], check=True)
