"""`sync` delivers studies and runs afterwards: MLflow gets the same as from a driver during the study."""

import json
import platform
from pathlib import Path

import mlflow
import optuna
import pytest
from optuna.trial import TrialState

from deit_ray.data.shards import read_manifest, rows_of
from deit_ray.errors import UserError
from deit_ray.experiment.load import dump_experiment
from deit_ray.outcome import Outcome
from deit_ray.results import origin
from deit_ray.results.origin import NUMERICS, note_origin, user
from deit_ray.study import sync as syncing
from deit_ray.study.description import describe, plain
from deit_ray.study.observers import Tracking
from deit_ray.study.records import Evaluated
from deit_ray.study.story import tell, tell_trial
from deit_ray.study.study import Study
from deit_ray.study.sync import (
    deliver_study,
    delivered,
    end_trial,
    start_study,
    start_trial,
    sync,
    to_ms,
)
from deit_ray.terminal.console import Console
from deit_ray.tracking import models
from deit_ray.tracking import tracker as tracking
from deit_ray.tracking.tracker import Tracker
from deit_ray.trial.described import Made
from tests.support.tracked import (
    EXPERIMENT,
    Told,
    Trial,
    inputs_of,
    models_below,
    ranked_by_mlflow,
    registered_by,
    versions_of,
)

pytestmark = pytest.mark.usefixtures("impatient")
TAGS = {
    "mlflow.source.git.commit": "a1b2",
    "mlflow.source.git.dirty": "true",
    "mlflow.user": user(),
    "deit_ray.driver": platform.node(),
    "deit_ray.version": "0.1.0",
}


@pytest.fixture
def study(experiment, proxy, monkeypatch) -> Study:
    """A study of four trials: finished, stopped early, failed, and running, as a killed driver leaves it."""
    keys = {"name": "short", "tracking.uri": proxy.uri, "tracking.experiment": EXPERIMENT, "search.trials": 4}
    space = {
        "search.space": {"optim.lr": {"log": [1e-4, 1e-2]}},
        "train.epochs": 3,
        "optim.warmup_epochs": 1,
        "distillation.kind": "none",
    }
    study = Study.create(experiment("digits_student", keys | space | {"search.grace_epochs": 1}))
    manifest = read_manifest(study.experiment.data.uri)
    code = {"version": "0.1.0", "numerics": NUMERICS, "commit": "a1b2", "changes": "+changed"}
    monkeypatch.setattr(origin, "describe_code", lambda: code)
    rows = rows_of(manifest, study.experiment.data.holdout)
    note_origin(study.folder, study.experiment, manifest.fingerprint, "cpu", rows=rows)
    lr = optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
    for state, outcome in (
        (TrialState.COMPLETE, None),
        (TrialState.PRUNED, None),
        (TrialState.FAIL, "failed: OSError: x"),
        (None, None),
    ):
        trial = study.optuna.ask({"optim.lr": lr})
        trial.report(0.5, 1)
        Trial(Path(study.trial_folder(trial.number))).measure()
        if state == TrialState.COMPLETE:
            Path(study.trial_folder(trial.number), "model.safetensors").write_bytes(b"weights")
        if outcome:
            trial.set_user_attr("outcome", outcome)
        if state:
            study.optuna.tell(trial.number, 0.5 if state == TrialState.COMPLETE else None, state=state)
    return study


def test_sync_delivers_what_a_study_could_not_and_nothing_twice(study, proxy, monkeypatch):
    results, told = study.experiment.results.uri, Told()
    monkeypatch.setattr(tracking, "PATIENCE_S", 1.0)
    monkeypatch.setattr(syncing, "PATIENCE_S", 1.0)
    proxy.misbehave("close")  # the server is away, and gets nothing of the study
    with Tracker(proxy.uri, EXPERIMENT, None, told) as tracker:
        made = Made.read(study.folder, study.experiment)
        parent = start_study(tracker, study, made)
        for trial in study.records()[:2]:
            end_trial(tracker, study, trial, start_trial(tracker, study, trial, parent, made))
    assert len(told) == 2
    assert told.count_of("tracking is behind") == 1
    assert (
        "3 runs with 20 points not delivered; they are kept in the journals; "
        f"deliver them with: deit-ray sync {study.name}" in told[1]
    )
    with pytest.raises(
        UserError,
        match=r"does not take deliveries: 5 runs with 40 points not delivered; .*RemoteDisconnected",
    ):
        sync(study.name, results)

    proxy.misbehave("pass")
    assert sync("short", results) == 5
    assert_agrees(study, proxy.uri)
    proxy.seen.clear()
    assert sync("short", results) == 5
    assert not [
        path
        for path in proxy.seen
        if path.endswith(("create", "log-batch", "update", "set-tag")) or "artifacts/" in path
    ]

    # the trial that was left running is ended, and so is the study
    study.report(3, 3, 0.7)
    study.optuna.tell(3, 0.7)
    study.tested = Evaluated(3, {"test/top1": 0.6})
    Trial(Path(study.trial_folder(3))).journal.add({"val/top1": 0.7}, 60)
    Path(study.trial_folder(3), "model.safetensors").write_bytes(b"best")
    study.save_best()
    study.outcome = Outcome.finished()
    assert sync("short", results) == 5
    assert_agrees(study, proxy.uri)
    client = mlflow.MlflowClient(proxy.uri)
    (parent,) = Trial(Path(study.folder)).runs(proxy.uri)
    assert (parent.info.status, parent.data.metrics) == (
        "FINISHED",
        {"best/val_top1": 0.7, "best/epoch": 3.0, "best/test_top1": 0.6, "test/top1": 0.6},
    )
    tested = Trial(Path(study.trial_folder(3))).runs(proxy.uri)[0].data.metrics
    assert (tested["best/val_top1"], tested["best/test_top1"]) == (0.7, 0.6)
    names = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert names == {"experiment.yaml", "best.yaml", "report.html"}
    assert parent.data.tags["mlflow.note.content"] == describe(tell(study))
    (version,) = versions_of(proxy.uri, registered_by(proxy.uri, study.folder).name)
    best = models_below(proxy.uri, study.trial_folder(3), EXPERIMENT)
    assert [version.tags["deit_ray.model"]] == [model.model_id for model in best]


def assert_agrees(study: Study, uri: str) -> None:
    """Optuna, the journals and MLflow agree about every trial."""
    statuses = {"COMPLETE": "FINISHED", "PRUNED": "FINISHED", "FAIL": "FAILED", "RUNNING": "RUNNING"}
    outcomes = {
        "COMPLETE": "finished",
        "PRUNED": "stopped early at epoch 1",
        "FAIL": "failed: OSError: x",
        "RUNNING": None,
    }
    (parent,) = Trial(Path(study.folder)).runs(uri)
    client = mlflow.MlflowClient(uri)
    ranked = (TrialState.COMPLETE, TrialState.PRUNED)
    best = {trial.number: trial.best for trial in study.records() if trial.state in ranked}
    assert dict(ranked_by_mlflow(uri, study.folder, "val/top1", EXPERIMENT)) == best
    fingerprint = read_manifest(study.experiment.data.uri).fingerprint
    inputs = {
        "training": ("digits train", f"{fingerprint[:32]}-0.1", 1294),
        "validation": ("digits val", f"{fingerprint[:32]}-0.1", 144),
    }
    assert inputs_of(parent) == inputs | {"test": ("digits test", fingerprint[:36], 359)}
    assert parent.data.params["search.space.optim.lr"] == '{"log": [0.0001, 0.01]}'
    assert "search.trials" not in parent.data.params  # a resume may change it
    for trial in study.optuna.trials:
        folder = Trial(Path(study.trial_folder(trial.number)))
        (run,) = folder.runs(uri)
        assert (run.info.status, run.data.tags.get("outcome")) == (
            statuses[trial.state.name],
            outcomes[trial.state.name],
        )
        record = study.trial(trial.number)
        told = plain(tell_trial(record, "val/top1", 3, "asha")) if trial.state.is_finished() else None
        assert run.data.tags.get("mlflow.note.content") == told
        assert run.data.tags.get("state") == ("PRUNED" if trial.state == TrialState.PRUNED else None)
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert float(run.data.params["optim.lr"]) == trial.params["optim.lr"]
        assert run.data.params["derived.peak_lr"] == run.data.params["optim.lr"]  # scale_lr is off
        assert run.data.params["seed"] == "0"  # the default
        assert run.data.params["data.image_size"] == "16"  # is not
        assert not {"optim.kind", "search.trials", "results.uri"} & set(run.data.params)
        assert inputs_of(run) == inputs
        assert run.data.tags.items() >= TAGS.items() | {("deit_ray.data", fingerprint)}
        assert run.info.start_time == int(trial.datetime_start.timestamp() * 1000)
        assert folder.delivered(uri) == folder.written()
        assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["experiment.yaml"]
        found = models_below(uri, folder.folder, EXPERIMENT)
        assert len(found) == (trial.state == TrialState.COMPLETE)
        assert [model.model_id for model in found] == [o.model_id for o in run.outputs.model_outputs]


def test_sync_delivers_a_run_of_its_own_and_knows_no_other(experiment, server, tmp_path):
    exp = experiment(
        "digits_student",
        {"tracking.uri": server.uri, "tracking.experiment": EXPERIMENT, "distillation.kind": "none"},
    )
    folder = tmp_path / "results" / "digits_student-1"
    trial = Trial(folder)
    (folder / "experiment.yaml").write_text(dump_experiment(exp))
    trial.measure()
    assert sync("digits_student", exp.results.uri) == 1
    assert trial.runs(server.uri)[0].info.status == "RUNNING"
    (folder / "run.json").write_text('{"outcome": "finished"}')
    sync("digits_student-1", exp.results.uri)
    assert trial.runs(server.uri)[0].info.status == "FINISHED"
    assert trial.delivered(server.uri) == trial.written()
    with pytest.raises(
        UserError, match=r"nobody: no such run, study or trial in .*; there are: digits_student-1"
    ):
        sync("nobody", exp.results.uri)


def test_sync_delivers_the_same_runs_as_the_driver(study, server):
    """MLflow gets the same runs from the driver during a study and from `sync` afterwards."""
    with Tracker(server.uri, EXPERIMENT, None, Told()) as tracker:
        assert len(list(deliver_study(tracker, study))) == 5
    assert_agrees(study, server.uri)


def test_sync_and_a_resume_deliver_the_models_of_an_earlier_version(study, server, monkeypatch):
    study.outcome = Outcome.finished()
    with monkeypatch.context() as patch:
        patch.setattr(models, "model_requests", lambda desired, delivered: [])  # as before there were models
        patch.setattr(models, "registry_requests", lambda desired, delivered: [])
        sync(study.name, study.experiment.results.uri)
    assert not models_below(server.uri, study.folder, EXPERIMENT)
    sync(study.name, study.experiment.results.uri)
    assert_agrees(study, server.uri)
    (version,) = versions_of(server.uri, registered_by(server.uri, study.folder).name)
    assert version.tags["deit_ray.folder"] == study.trial_folder(0)


def test_a_resume_brings_an_early_stopped_run_of_version_0_1_to_its_status_and_tags_once(study, proxy):
    with Tracker(proxy.uri, EXPERIMENT, None, Told()) as tracker:
        list(deliver_study(tracker, study))
    client, trials = mlflow.MlflowClient(proxy.uri), [Trial(Path(study.trial_folder(n))) for n in range(3)]
    (pruned,) = trials[1].runs(proxy.uri)
    client.set_terminated(pruned.info.run_id, "KILLED")  # as version 0.1 did, which recorded no status
    client.delete_tag(pruned.info.run_id, "state")
    for trial in trials:
        record = trial.record()
        del record["status"], record["version"], record["parent_id"]
        Path(trial.folder, "tracking.json").write_text(json.dumps(record))
    assert [bool(delivered(study, trial)) for trial in study.records()[:3]] == [False] * 3

    resume(study)
    assert_agrees(study, proxy.uri)
    assert all(delivered(study, trial) for trial in study.records()[:3])
    (again,) = trials[1].runs(proxy.uri)
    assert again.info.run_id == pruned.info.run_id
    assert again.info.end_time == to_ms(study.trial(1).ended)
    assert trials[1].record()["status"] == "FINISHED"

    proxy.seen.clear()
    resume(study)
    assert not [path for path in proxy.seen if path.endswith(("create", "log-batch", "update", "set-tag"))]


def test_a_resume_delivers_everything_again_to_a_server_that_lost_it(study, proxy, thorough):
    with Tracker(proxy.uri, EXPERIMENT, None, Told()) as tracker:
        list(deliver_study(tracker, study))
    resume(study)
    client, folders = mlflow.MlflowClient(proxy.uri), [study.folder, *map(study.trial_folder, range(3))]
    for killed in (False, True):
        for run in [run for folder in folders for run in Trial(Path(folder)).runs(proxy.uri)]:
            client.delete_run(run.info.run_id)
        if killed:  # the first driver after the loss, once it had delivered the study's own run
            tracking = Tracking(study, Console(quiet=True))
            with tracking.delivering():
                tracking.study_opened()
        resume(study)
        (parent,) = Trial(Path(study.folder)).runs(proxy.uri)
        for number in range(3):
            trial = Trial(Path(study.trial_folder(number)))
            (run,) = trial.runs(proxy.uri)
            assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
            assert trial.delivered(proxy.uri) == trial.written()
            assert run.data.tags["outcome"] == study.trial(number).ending.text


def resume(study: Study) -> None:
    """Delivers what a driver delivers at its start."""
    tracking = Tracking(study, Console(quiet=True))
    with tracking.delivering():
        tracking.study_opened()
        for number in range(3):
            tracking.trial_kept(number)
