"""What a study keeps of its trials when it has ended: checkpoints of the best ones, and every model."""

import re

import pytest

from deit_ray import storage
from deit_ray.errors import UnavailableError
from deit_ray.outcome import Outcome
from deit_ray.results import removal
from deit_ray.results.folders import EMA, MODEL, STATE, saved_steps
from deit_ray.results.journal import checkpoint_name
from deit_ray.results.removal import list_files
from deit_ray.study.study import Study
from tests.support.commands import call
from tests.support.studies import STEPS, end_trial

ENDS = {  # of the trials, in the order of the leaderboard
    0: (Outcome.finished(), 0.9),
    3: (Outcome.finished(), 0.5),
    1: (Outcome.stopped_early(2), 0.8),
    2: (Outcome.failed("the loss is nan"), 0.7),
    4: (Outcome.cancelled(), 0.1),
}


@pytest.fixture(params=["disk", "s3"])
def make_study(request, experiment, monkeypatch):
    """Makes a study of five trials that have ended, on a disk and on S3; two of them keep checkpoints."""
    monkeypatch.setattr("deit_ray.study.study.KEPT", 2)
    place = {} if request.param == "disk" else {"results.uri": f"{request.getfixturevalue('bucket')}/results"}
    keys = {
        "name": "made",
        "distillation.kind": "none",
        "search.space": {"optim.lr": {"log": [3e-4, 1e-2]}},
        "search.metric": "val/top1_ema",
    }

    def make(**more) -> Study:
        study = Study.create(experiment("digits_student", keys | place | more))
        with study.driving():
            for number in sorted(ENDS):
                end_trial(study, *ENDS[number])
        return study

    return make


def checkpoints_of(study: Study) -> dict[int, list[str]]:
    """The files of each trial's checkpoints, of trials that have any. No journal is missing."""
    found = {}
    for trial in study.records():
        folder = study.trial_folder(trial.number)
        files = list_files(folder)
        assert "journal/000000.jsonl" in files
        found[trial.number] = sorted(name for name in files if name.startswith("step-"))
        assert saved_steps(folder) == sorted({int(name[5:13]) for name in found[trial.number]})
    return {number: names for number, names in found.items() if names}


def test_an_ended_study_keeps_every_model_and_the_checkpoints_of_its_best_trials(make_study):
    study = make_study()
    for _ in range(2):  # a resume repeats it
        study.remove_checkpoints()
        whole = sorted(f"{checkpoint_name(e * STEPS)}/{f}" for e in (2, 3) for f in (MODEL, EMA, STATE))
        assert checkpoints_of(study) == {0: whole, 3: whole}
    for number in ENDS:
        model = storage.read_bytes(storage.join(study.trial_folder(number), MODEL))
        assert model == f"{EMA} of {number}, epoch 2".encode()
    with study.driving():
        end_trial(study, Outcome.finished(), 0.7)
        study.remove_checkpoints()
    assert sorted(checkpoints_of(study)) == [0, 5]


def test_a_removal_that_was_interrupted_is_finished_and_keeps_what_is_not_ours(make_study, monkeypatch):
    study = make_study()
    notes = storage.join(study.trial_folder(1), checkpoint_name(2 * STEPS), "notes.txt")
    storage.write_bytes(notes, b"a person's")

    def fail(uri: str, names) -> None:
        raise UnavailableError(f"{uri}: cannot be deleted: the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(removal, "remove_files", fail)
        with pytest.raises(UnavailableError):
            study.remove_checkpoints()
    assert saved_steps(study.trial_folder(1)) == []  # nothing takes what is left for a whole checkpoint
    study.remove_checkpoints()
    assert storage.read_bytes(notes) == b"a person's"
    storage.remove(notes)
    assert sorted(checkpoints_of(study)) == [0, 3]


def test_results_keep_all_keeps_all(make_study):
    study = make_study(**{"results.keep": "all"})
    study.remove_checkpoints()
    assert sorted(checkpoints_of(study)) == sorted(ENDS)


@pytest.mark.parametrize("keep", ["best", "all"])
def test_a_checkpoint_that_a_killed_process_left_behind_is_removed(make_study, keep):
    study = make_study(**{"results.keep": keep})
    left = checkpoint_name(9 * STEPS)  # Ray Train's list does not have it
    for number in ENDS:
        storage.write_bytes(storage.join(study.trial_folder(number), left, MODEL), b"left")
    study.remove_checkpoints()
    assert sorted(checkpoints_of(study)) == ([0, 3] if keep == "best" else sorted(ENDS))
    for number in ENDS:
        assert left not in storage.list_names(study.trial_folder(number))


def test_a_trial_whose_checkpoints_are_gone_is_shown_and_not_continued(finished_study, tmp_path, monkeypatch):
    monkeypatch.setattr("deit_ray.study.study.KEPT", 1)
    study = finished_study.copy(tmp_path / "results")
    results = ["--results", study.results]
    own = ["--set", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]  # the runs of the copy are the original's
    extended = call("tune", "--resume", study.name, "--trials", "+1", *own, *results)
    assert extended.status == 0, extended
    board = Study.open(study.name, str(study.results)).leaderboard()["trial"]
    assert list(checkpoints_of(Study.open(study.name, str(study.results)))) == [board[0]]
    gone = f"{study.name}/{board[1]}"
    assert "removed when the study ended (results.keep: best)" in call("status", gone, *results).out
    refused = call("train", "--continue", gone, "--epochs", 40, *results)
    assert refused.status == 1
    assert re.fullmatch(
        rf"error: {study.name}/trial-{board[1]:04d}: its checkpoints were removed when its study ended "
        r"\(results\.keep: best\), so it cannot be continued; train it again, and continue that run: "
        rf"\S*deit-ray reproduce {study.name}/trial-{board[1]:04d} --results {study.results}",
        refused.error,
    )
    assert all((study.folder / f"trial-{number:04d}" / MODEL).exists() for number in board)
