"""`rm` deletes a study or run and its runs in MLflow, whole or not at all, and nothing of a person's."""

import io
import json
import re
import sys
from pathlib import Path

import mlflow
import pytest

from deit_ray import storage
from deit_ray.commands import remove
from deit_ray.errors import UnavailableError
from deit_ray.experiment.load import dump_experiment
from deit_ray.outcome import Outcome
from deit_ray.results import lock
from deit_ray.results.folders import RUN, new_folder
from deit_ray.results.journal import JournalWriter
from deit_ray.results.removal import list_files
from deit_ray.study.study import Study
from deit_ray.tracking.view import view_tag
from tests.support.commands import call
from tests.support.servers import free_port
from tests.support.studies import end_trial
from tests.support.tracked import models_below, registered_by, runs_below, versions_of

PLAIN = {"distillation.kind": "none"}


@pytest.fixture(params=["disk", "s3"])
def results(request, tmp_path) -> str:
    """A results folder on a disk, or on S3."""
    if request.param == "disk":
        return str(tmp_path / "results")
    return f"{request.getfixturevalue('bucket')}/results"


@pytest.fixture
def make(experiment, server):
    """Makes a study of two trials, or without a search space a run; MLflow has its runs."""

    def make_and_deliver(results: str, **keys) -> str:
        tracked = {"name": "made", "results.uri": results, "tracking.uri": server.uri}
        exp = experiment("digits_student", PLAIN | tracked | keys)
        if not exp.search.space:
            folder = new_folder(exp)
            journal = JournalWriter(f"{folder}/journal")
            journal.add({"val/top1": 0.5}, 10)
            journal.flush()
            ended = {"outcome": "finished", "metrics": {}}
            storage.write_bytes(storage.join(folder, RUN), json.dumps(ended).encode())
        else:
            study = Study.create(exp)
            with study.driving():
                end_trial(study, Outcome.finished(), 0.5)
                end_trial(study, Outcome.cancelled(), 0.4)
                study.made_with = exp.as_dict()
                study.outcome = Outcome.finished()
            study.save_best()
            folder = study.folder
        assert call("sync", folder.rpartition("/")[2], "--results", results).status == 0
        return folder

    return make_and_deliver


STUDY = {"search.space": {"optim.lr": {"log": [3e-4, 1e-2]}}}


def test_a_study_is_deleted_with_its_runs_in_mlflow_and_another_stays(make, results, server):
    folder, other = make(results, **STUDY), make(results, **STUDY)
    assert [len(models_below(server.uri, study)) for study in (folder, other)] == [1, 1]
    client, name = mlflow.MlflowClient(server.uri), registered_by(server.uri, other).name
    client.create_model_version(name, "s3://mine/model", run_id=None)  # a person's
    if storage.is_local(folder):
        Path(folder, "stop").mkdir()  # stays when its requests were taken
    before = list_files(other)
    assert len(runs_below(server.uri, results)) == 2 * 3
    deleted = call("rm", "made-1", "--yes", "--results", results)
    assert deleted.status == 0, deleted
    assert re.search(r"^made-1: the study, 2 trials, \d+ files with .*", deleted.out)
    had = f"3 runs in MLflow at {server.uri}, with 1 model, and 1 version of the registered model made-1"
    assert had in deleted.out.replace("\n", " ")
    assert not storage.exists(folder)
    assert list_files(other) == before
    folders = {run.data.tags["deit_ray.folder"] for run in runs_below(server.uri, results)}
    assert folders == {other, f"{other}/trial-0000", f"{other}/trial-0001"}
    tags = mlflow.MlflowClient(server.uri).get_experiment_by_name("deit_ray").tags
    assert [view_tag(name) in tags for name in ("made-1", "made-2")] == [False, True]
    assert [len(models_below(server.uri, study)) for study in (folder, other)] == [0, 1]
    assert registered_by(server.uri, folder) is None
    assert call("rm", "made-2", "--yes", "--results", results).status == 0
    assert [version.source for version in versions_of(server.uri, name)] == ["s3://mine/model"]
    client.delete_registered_model(name)
    assert "made-1" not in call("status", "--results", results).out
    assert "no such run" in call("rm", "made-1", "--yes", "--results", results).error


def test_a_deletion_that_was_interrupted_is_repeated(make, results, server, monkeypatch):
    folder = make(results, **STUDY)

    def fail(uri: str, names) -> None:
        raise UnavailableError(f"{uri}: cannot be deleted: the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(remove, "remove_files", fail)
        assert "the disk is gone" in call("rm", "made-1", "--yes", "--results", results).error
    assert len(list_files(folder)) > 10
    shown = call("status", "--results", results).out  # nothing takes the rest for a study
    assert re.search(
        rf"made-1 .*its deletion was interrupted; finish it with: \S+ rm made-1 --results {results}", shown
    )
    assert "no such" in call("tune", "--resume", "made-1", "--results", results).error
    again = call("rm", "made-1", "--yes", "--results", results)
    assert again.status == 0, again
    assert not storage.exists(folder)


def test_a_run_is_deleted_and_what_a_person_has_written_stays(make, tmp_path, server):
    folder = Path(make(str(tmp_path / "results")))
    study = Path(make(str(tmp_path / "results"), **STUDY))
    for notes in (folder / "notes.txt", study / "trial-0000" / "journal" / "notes.txt", study / "link"):
        notes.write_text("a person's")
    (study / "link").unlink()
    (study / "link").symlink_to(tmp_path)
    (study / "best.yaml").write_text((study / "best.yaml").read_text() + "# for the paper\n")
    for name in (folder.name, study.name):
        deleted = call("rm", name, "--yes", "--results", tmp_path / "results")
        assert deleted.status == 0, deleted
        assert "not written by deit-ray, or changed since, so left" in deleted.out
    assert list_files(str(folder)).keys() == {"notes.txt"}
    assert list_files(str(study)).keys() == {"best.yaml", "link", "trial-0000/journal/notes.txt"}
    assert not runs_below(server.uri, tmp_path / "results")


@pytest.mark.parametrize("answer", ["y\n", "n\n", "", "what\n"])
def test_a_person_is_asked(make, tmp_path, monkeypatch, answer):
    folder = Path(make(str(tmp_path / "results")))

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    ended = call("rm", "made-1", "--results", tmp_path / "results")
    assert "delete this? [y/N]" in ended.err
    assert (ended.status, folder.exists()) == ((0, False) if answer == "y\n" else (1, True))


def test_what_cannot_be_deleted_is_said_in_one_sentence(make, experiment, tmp_path, monkeypatch):
    results = tmp_path / "results"
    study, run = Path(make(str(results), **STUDY)), Path(make(str(results), name="alone"))
    pupil = {"distillation.kind": "hard", "distillation.teacher": {"weights": "run:alone-1"}}
    new_folder(experiment("digits_student", {"name": "pupil", "results.uri": str(results)} | pupil))
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "experiment.yaml").write_text(
        "# mine\n" + dump_experiment(experiment("digits_student", PLAIN))
    )
    (foreign / "thesis.tex").write_text("")
    before = {folder: set(list_files(str(folder))) for folder in (study, run, foreign)}

    def refused(*arguments: str) -> str:
        ended = call("rm", *arguments, "--results", results)
        assert ended.status == 1
        return ended.error

    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert "standard input is no terminal" in refused("made-1")
    assert "is a trial, and a study needs all its trials; delete the whole study: " in refused(
        "made-1/0", "--yes"
    )
    assert refused("made", "--yes").endswith("write the whole name of what is to be deleted, such as made-1")
    assert "no such run" in refused("nothing", "--yes")
    assert "did not write this folder, and holds thesis.tex; delete it yourself" in refused(
        str(foreign), "--yes"
    )
    with lock.driving(str(study), "made-1"):
        assert re.search(r"made-1: is running, on \S+ as process \d+", refused("made-1", "--yes"))
    gone = f"http://127.0.0.1:{free_port()}"
    text = (run / "experiment.yaml").read_text()
    (run / "experiment.yaml").write_text(re.sub(r"http://127\.0\.0\.1:\d+", gone, text))
    said = refused("alone-1", "--yes")
    assert f"MLflow at {gone}: connection refused" in said
    assert (
        "nothing was deleted; repeat this once it answers, or leave its runs there with --keep-runs" in said
    )
    assert {folder: set(list_files(str(folder))) for folder in before} == before
    kept = call("rm", "alone-1", "--yes", "--keep-runs", "--results", results)
    assert kept.status == 0, kept
    assert "pupil-1 has it as its teacher" in kept.out
    assert not run.exists()


def test_a_run_on_s3_has_one_driver_and_is_not_deleted_meanwhile(make, bucket):
    results = f"{bucket}/results"
    folder = make(results)
    with lock.driving(folder, "made-1"):
        assert re.search(r"made-1: is running, on", call("rm", "made-1", "--yes", "--results", results).error)
        assert re.search(r"made-1: is running already", call("sync", "made-1", "--results", results).error)
    assert call("sync", "made-1", "--results", results).status == 0
    assert call("rm", "made-1", "--yes", "--results", results).status == 0
    assert list_files(results) == {}
