"""What MLflow gets, from real servers that are late, killed, slow, wrong or away: every run and point, once."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import optuna
import pytest
from optuna.trial import TrialState

from deit_ray import sync as syncing
from deit_ray import tracking
from deit_ray.delivery import quiet_mlflow
from deit_ray.errors import UserError
from deit_ray.journal import JournalWriter, iterate_segments
from deit_ray.load import dump_experiment
from deit_ray.study import Study
from deit_ray.sync import end_trial, start_study, start_trial, sync, tell_study
from deit_ray.tracking import Tracker
from tests.servers import MlflowServer, Postgres, Proxy, free_port

EXPERIMENT = "tests"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture
def proxy(server):
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """The same as in real life, with shorter waits."""
    quiet_mlflow()
    monkeypatch.setattr(tracking, "POLL_S", 0.1)
    monkeypatch.setattr(tracking, "PAUSE_S", (0.1, 0.5))
    monkeypatch.setattr(tracking, "PATIENCE_S", 10.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")


class Told(list):
    """What a person was told."""

    def __call__(self, text: str) -> None:
        self.append(text)

    def count_of(self, words: str) -> int:
        return sum(words in text for text in self)


class Trial:
    """A trial's folder, with its journal."""

    def __init__(self, folder: Path):
        self.folder = str(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "experiment.yaml").exists():
            (folder / "experiment.yaml").write_text("name: x\n")
        self.journal, self.step = JournalWriter(f"{folder}/journal"), 0

    def measure(self, points: int = 5) -> None:
        for _ in range(points):
            self.step += 1
            self.journal.add({"train/loss": 1 / self.step, "val/top1": self.step / 100}, self.step)
        self.journal.flush()

    def record(self) -> dict:
        return json.loads(Path(self.folder, "tracking.json").read_text())

    def change_record(self, **values) -> None:
        Path(self.folder, "tracking.json").write_text(json.dumps(self.record() | values))

    def written(self) -> list[tuple]:
        return sorted((p.name, p.step, p.value, p.time_ms) for points in iterate_segments(f"{self.folder}/journal", 0) for p in points)

    def runs(self, uri: str) -> list:
        """Its runs in MLflow that nobody deleted."""
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        return client.search_runs([experiment.experiment_id], f"tags.`deit_ray.folder` = '{self.folder}'") if experiment else []

    def delivered(self, uri: str) -> list[tuple]:
        """The points of its only run in MLflow."""
        (run,) = self.runs(uri)
        client = mlflow.MlflowClient(uri)
        history = [p for name in run.data.metrics for p in client.get_metric_history(run.info.run_id, name)]
        return sorted((p.key, p.step, p.value, p.timestamp) for p in history)


@pytest.fixture
def trial(tmp_path) -> Trial:
    return Trial(tmp_path / "short-1" / "trial-0000")


def start(tracker: Tracker, trial: Trial, **options) -> tracking.Run:
    return tracker.start_run("trial 000", {"kind": "trial"}, {"optim.lr": 1e-3}, trial.folder, **options)


def deliver(uri: str, trial: Trial, told: Told | None = None) -> None:
    """The whole life of a run, in one go."""
    with Tracker(uri, EXPERIMENT, None, told if told is not None else Told()) as tracker:
        tracker.end_run(start(tracker, trial), "finished", trial.folder)


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_a_server_that_starts_late_and_is_killed_in_between_gets_everything_once(tmp_path, trial):
    server, told = MlflowServer(tmp_path / "late"), Told()
    trial.measure()
    with Tracker(server.uri, EXPERIMENT, None, told) as tracker:
        run = start(tracker, trial)
        wait_for(lambda: told.count_of("tracking is behind") == 1)
        server.start()
        try:
            wait_for(lambda: told.count_of("tracking caught up") == 1)
            server.kill()
            trial.measure()
            tracker.end_run(run, "finished", trial.folder)
            wait_for(lambda: told.count_of("tracking is behind") == 2)
            server.start()
            wait_for(lambda: run.closed)
            assert trial.delivered(server.uri) == trial.written()
            assert trial.runs(server.uri)[0].info.status == "FINISHED"
        finally:
            server.kill()
    assert len(told) in (3, 4)  # behind, caught up, behind, and the second catching up unless that is just being told


@pytest.mark.parametrize("mode", ["close", "refuse_before", "garbage"])
def test_what_a_server_did_not_take_at_first_arrives(proxy, trial, mode):
    told = Told()
    trial.measure()
    proxy.misbehave(mode, times=4)
    deliver(proxy.uri, trial, told)
    assert trial.delivered(proxy.uri) == trial.written()
    assert [text.split(":")[0] for text in told] == ["tracking is behind", "tracking caught up"]


def test_what_a_server_did_though_it_said_500_is_not_done_twice(proxy, trial):
    with Tracker(proxy.uri, EXPERIMENT, None, Told()) as tracker:
        for path in ("runs/create", "log-batch", "runs/create", "runs/update", "log-batch"):
            trial.measure()
            proxy.misbehave("fail_after", path, times=2)
            run = start(tracker, trial)
            wait_for(lambda run=run: run.segments == trial.journal.segments)
            tracker.end_run(run, "finished", trial.folder, metrics={"best": 0.5})
            wait_for(lambda run=run: run.closed)
    assert sum("runs/create" in path for path in proxy.seen) == 1
    (run,) = trial.runs(proxy.uri)
    assert [p for p in trial.delivered(proxy.uri) if p[0] != "best"] == trial.written()
    assert len(mlflow.MlflowClient(proxy.uri).get_metric_history(run.info.run_id, "best")) == 1


def test_training_does_not_wait_for_a_slow_server_and_its_thread_shows_that_it_delivers(server, proxy, trial):
    proxy.delay_s = 0.2
    proxy.misbehave("delay")
    begin = time.monotonic()
    with Tracker(proxy.uri, EXPERIMENT, None, Told()) as tracker:
        run = start(tracker, trial)
        trial.measure()
        tracker.end_run(run, "stopped early at epoch 3", trial.folder)
        assert time.monotonic() - begin < 0.3
        comm = Path(f"/proc/self/task/{tracker.thread.native_id}/comm")
        wait_for(lambda: comm.read_text() == "delivery\n")
        wait_for(lambda: run.closed)
        wait_for(lambda: comm.read_text() == "tracking\n")
    assert trial.delivered(server.uri) == trial.written()
    (kept,) = trial.runs(server.uri)
    assert (kept.info.status, kept.data.tags["outcome"]) == ("KILLED", "stopped early at epoch 3")


def test_a_repeated_delivery_doubles_nothing(server, trial):
    trial.measure()
    deliver(server.uri, trial)
    first = trial.delivered(server.uri)
    for forgotten in ({"segments": 0, "outcome": None}, {"run_id": None, "segments": 0, "outcome": None, "described": False}):
        trial.change_record(**forgotten)  # as where a driver was killed before it had noted what it did
        trial.measure()
        deliver(server.uri, trial)
        assert trial.delivered(server.uri) == trial.written() != first


def test_a_server_that_does_not_know_the_run_gets_all_of_it_anew(server, trial, tmp_path):
    trial.measure()
    deliver(server.uri, trial)
    client = mlflow.MlflowClient(server.uri)

    trial.change_record(run_id="0" * 32, id="1" * 32)  # a new database
    client.delete_run(trial.runs(server.uri)[0].info.run_id)
    deliver(server.uri, trial)
    assert trial.delivered(server.uri) == trial.written()

    told = Told()
    with Tracker(server.uri, EXPERIMENT, None, told) as tracker:  # somebody deletes it while it is written
        run = start(tracker, trial)
        wait_for(lambda: run.seen)
        client.delete_run(run.record.run_id)
        trial.measure()
        wait_for(lambda: run.segments == 2)
        tracker.end_run(run, "finished", trial.folder)
    assert trial.delivered(server.uri) == trial.written()
    assert told == []

    other = f"sqlite:///{tmp_path}/other.db"
    deliver(other, trial)  # another tracking URI
    assert trial.delivered(other) == trial.written()
    assert trial.record()["uri"] == other


def test_a_run_that_there_is_twice_is_mended(server, trial, tmp_path):
    told, study, client = Told(), Trial(tmp_path / "short-1"), mlflow.MlflowClient(server.uri)
    trial.measure()
    with Tracker(server.uri, EXPERIMENT, None, told) as tracker:
        parent = tracker.start_run("short-1", {"kind": "study"}, {}, study.folder, journal=False)
        run = start(tracker, trial, parent=parent)
        wait_for(lambda: run.segments == 1)
        for folder, existing in ((study.folder, parent), (trial.folder, run)):  # requests that had seemed lost, done late
            tags = {"deit_ray.id": existing.record.id, "deit_ray.folder": folder}
            client.create_run(tracker.delivery.experiment_id, existing.started_ms - 1, tags)
        assert (len(trial.runs(server.uri)), len(study.runs(server.uri))) == (2, 2)
        tracker.end_run(run, "finished", trial.folder)
        wait_for(lambda: run.closed)
        tracker.end_run(parent, "finished", study.folder)
    assert trial.delivered(server.uri) == trial.written()
    (kept,), (kept_parent,) = trial.runs(server.uri), study.runs(server.uri)
    assert kept.info.start_time == run.started_ms - 1  # the earliest
    assert kept_parent.info.start_time == parent.started_ms - 1
    assert kept.data.tags["mlflow.parentRunId"] == kept_parent.info.run_id
    assert kept.data.params == {"optim.lr": "0.001"}


def test_what_mlflow_refuses_is_told_once_and_stops_nothing_else(server, trial, tmp_path):
    told, other = Told(), Trial(tmp_path / "short-1" / "trial-0001")
    trial.journal.add({"no!such?name": 1.0}, 1)
    trial.journal.flush()
    trial.measure()
    other.measure()
    Path(trial.folder, "model.safetensors").mkdir()  # cannot be read
    with Tracker(server.uri, EXPERIMENT, None, told) as tracker:
        run = tracker.start_run("x" * 300, {"note": "t\0" * 9000}, {"long": "p" * 7000}, trial.folder)
        tracker.end_run(run, "failed: " + "r" * 9000, trial.folder, "model.safetensors")
        tracker.end_run(start(tracker, other), "finished", other.folder)
    assert trial.delivered(server.uri) == [point for point in trial.written() if point[0] != "no!such?name"]
    assert other.delivered(server.uri) == other.written()
    (kept,) = trial.runs(server.uri)
    assert kept.info.status == "FAILED"
    assert (len(kept.data.params["long"]), len(kept.data.tags["outcome"])) == (6000, 8000)
    assert len(told) == 2
    assert told.count_of("its points cannot be delivered to MLflow") == told.count_of("its model.safetensors cannot be delivered") == 1
    assert trial.record()["segments"] == 0  # so that a sync tries it again


def test_what_fails_for_one_run_for_ever_does_not_stop_the_others(proxy, trial, tmp_path):
    told, others = Told(), [Trial(tmp_path / "short-1" / f"trial-{number}") for number in (1, 2)]
    proxy.misbehave("refuse_before", "mlflow-artifacts")
    for other in others:
        Path(other.folder, "experiment.yaml").unlink()
        other.measure()
    with Tracker(proxy.uri, EXPERIMENT, None, told) as tracker:
        run = start(tracker, trial)
        wait_for(lambda: told.count_of("tracking is behind") == 1)
        for other in others:
            tracker.end_run(start(tracker, other), "finished", other.folder)
        wait_for(lambda: all(other.runs(proxy.uri) and other.record()["outcome"] == "finished" for other in others))
        assert not run.seen
        proxy.misbehave("pass")
        wait_for(lambda: told.count_of("tracking caught up") == 1)
    assert len(told) == 2
    assert [other.delivered(proxy.uri) for other in others] == [other.written() for other in others]


HANGING = """
import sys, time
from deit_ray.tracking import Tracker
from deit_ray.journal import JournalWriter
folder, uri = sys.argv[1:]
journal = JournalWriter(folder + "/trial-0000/journal")
journal.add({"train/loss": 1.0}, 1)
journal.flush()
import mlflow  # what comes now is timed without its import
from mlflow.tracking import MlflowClient
began = time.monotonic()
try:
    with Tracker(uri, "tests", None, print) as tracker:
        parent = tracker.start_run("short-1", {}, {}, folder, journal=False)
        tracker.start_run("trial", {}, {}, folder + "/trial-0000", parent)
        time.sleep(0.5)
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print(time.monotonic() - began)
"""


def test_a_server_that_accepts_and_never_answers_does_not_hold_the_exit(proxy, tmp_path):
    proxy.misbehave("hang")
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_HTTP_REQUEST_TIMEOUT"}
    arguments = [sys.executable, "-c", HANGING, str(tmp_path / "results" / "short-1"), proxy.uri]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment)
    told, elapsed = done.stdout.splitlines()
    assert float(elapsed) < tracking.HASTE_S + 2
    assert told.endswith("2 runs with 1 point not delivered; they are kept in the journals, and delivered by: deit-ray sync short-1")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def study(experiment, proxy) -> Study:
    """A study of four trials: finished, stopped early, failed, and running, as a killed driver leaves it."""
    keys = {"name": "short", "tracking.uri": proxy.uri, "tracking.experiment": EXPERIMENT, "search.trials": 4}
    space = {"search.space": {"optim.lr": {"log": [1e-4, 1e-2]}}, "train.epochs": 3, "optim.warmup_epochs": 1, "distillation.kind": "none"}
    study = Study.create(experiment("digits_student", keys | space | {"search.grace_epochs": 1}))
    lr = optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
    for state, outcome in ((TrialState.COMPLETE, None), (TrialState.PRUNED, None), (TrialState.FAIL, "failed: OSError: x"), (None, None)):
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
    proxy.misbehave("close")  # away, and nothing of the study gets there
    with Tracker(proxy.uri, EXPERIMENT, None, told) as tracker:
        parent = start_study(tracker, study)
        for trial in study.optuna.trials[:2]:
            end_trial(tracker, study, trial, start_trial(tracker, study, trial, parent))
    assert len(told) == 2
    assert told.count_of("tracking is behind") == 1
    assert f"3 runs with 20 points not delivered; they are kept in the journals, and delivered by: deit-ray sync {study.name}" in told[1]
    with pytest.raises(UserError, match=r"does not take deliveries: 5 runs with 40 points not delivered; .*RemoteDisconnected"):
        sync(study.name, results)

    proxy.misbehave("pass")
    assert sync("short", results) == 5
    assert_agrees(study, proxy.uri)
    proxy.seen.clear()
    assert sync("short", results) == 5
    assert not [path for path in proxy.seen if path.endswith(("create", "log-batch", "update", "set-tag")) or "artifacts/" in path]

    # the trial that was left goes on, and the study ends
    study.optuna.tell(3, 0.7)
    Trial(Path(study.trial_folder(3))).journal.add({"val/top1": 0.7}, 60)
    Path(study.trial_folder(3), "model.safetensors").write_bytes(b"best")
    study.save_best()
    study.optuna.set_user_attr("outcome", "finished")
    assert sync("short", results) == 5
    assert_agrees(study, proxy.uri)
    client = mlflow.MlflowClient(proxy.uri)
    (parent,) = Trial(Path(study.folder)).runs(proxy.uri)
    assert (parent.info.status, parent.data.metrics) == ("FINISHED", {"best/val/top1": 0.7})
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} == {"experiment.yaml", "best.yaml", "model.safetensors"}


def assert_agrees(study: Study, uri: str) -> None:
    """Optuna, the journals and MLflow say the same of every trial."""
    statuses = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED", "RUNNING": "RUNNING"}
    outcomes = {"COMPLETE": "finished", "PRUNED": "stopped early at epoch 1", "FAIL": "failed: OSError: x", "RUNNING": None}
    (parent,) = Trial(Path(study.folder)).runs(uri)
    client = mlflow.MlflowClient(uri)
    for trial in study.optuna.trials:
        folder = Trial(Path(study.trial_folder(trial.number)))
        (run,) = folder.runs(uri)
        assert (run.info.status, run.data.tags.get("outcome")) == (statuses[trial.state.name], outcomes[trial.state.name])
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert {key: float(value) for key, value in run.data.params.items()} == pytest.approx(trial.params)
        assert run.info.start_time == int(trial.datetime_start.timestamp() * 1000)
        assert folder.delivered(uri) == folder.written()
        artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        assert artifacts == {"experiment.yaml"} | ({"model.safetensors"} if trial.state == TrialState.COMPLETE else set())


def test_sync_delivers_a_run_of_its_own_and_knows_no_other(experiment, server, tmp_path):
    exp = experiment("digits_student", {"tracking.uri": server.uri, "tracking.experiment": EXPERIMENT, "distillation.kind": "none"})
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
    with pytest.raises(UserError, match=r"nobody: no such run, study or trial in .*; there are: digits_student-1"):
        sync("nobody", exp.results.uri)


@pytest.mark.skipif(Postgres.binaries() is None, reason="PostgreSQL's initdb is neither in /usr/lib/postgresql nor on PATH")
def test_postgresql_killed_behind_the_server_loses_and_doubles_nothing(tmp_path):
    trials, told = [Trial(tmp_path / "short-1" / f"trial-{number}") for number in range(4)], Told()
    with Postgres() as postgres, MlflowServer(tmp_path / "mlflow", postgres.uri) as server:
        with Tracker(server.uri, EXPERIMENT, None, told) as tracker:
            runs = [start(tracker, trial) for trial in trials]
            writing = threading.Thread(target=lambda: [(trial.measure(50), time.sleep(0.02)) for _ in range(10) for trial in trials])
            writing.start()
            wait_for(lambda: any(run.segments for run in runs))
            postgres.kill()
            wait_for(lambda: told.count_of("tracking is behind") == 1)
            writing.join()
            postgres.start()
            for run, trial in zip(runs, trials, strict=True):
                tracker.end_run(run, "finished", trial.folder)
        assert all(len(trial.delivered(server.uri)) == 1000 for trial in trials)
        assert all(trial.delivered(server.uri) == trial.written() for trial in trials)
        for trial in trials:
            trial.change_record(segments=0, outcome=None)
            deliver(server.uri, trial)
        assert all(trial.delivered(server.uri) == trial.written() for trial in trials)


def test_a_port_where_nothing_listens_is_told_once(trial, monkeypatch):
    monkeypatch.setattr(tracking, "PATIENCE_S", 1.0)
    told, begin = Told(), time.monotonic()
    trial.measure()
    deliver(f"http://127.0.0.1:{free_port()}", trial, told)
    assert time.monotonic() - begin < 4
    assert [text.split(":")[0] for text in told] == ["tracking is behind", "MLflow at http"]


def test_a_study_is_told_as_its_driver_tells_it(study, server):
    """Whether a tracker hears of a study as it goes or afterwards: the runs are the same."""
    with Tracker(server.uri, EXPERIMENT, None, Told()) as tracker:
        assert len(list(tell_study(tracker, study))) == 5
    assert_agrees(study, server.uri)
