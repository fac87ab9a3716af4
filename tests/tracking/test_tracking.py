"""MLflow gets every run and point once, from real servers that are late, killed, slow, wrong or away."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pytest

from deit_ray import storage
from deit_ray.outcome import Outcome
from deit_ray.tracking import tracker
from deit_ray.tracking.datasets import Dataset
from deit_ray.tracking.model_state import Weights
from deit_ray.tracking.tracked import Record
from deit_ray.tracking.tracker import Tracker
from tests.support.commands import wait_for
from tests.support.servers import MlflowServer, Postgres, free_port
from tests.support.tracked import (
    EXPERIMENT,
    FINISHED,
    Told,
    Trial,
    deliver,
    history_of,
    inputs_of,
    models_below,
    start,
)

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def trial(tmp_path) -> Trial:
    return Trial(tmp_path / "short-1" / "trial-0000")


def test_a_server_that_starts_late_and_is_killed_in_between_gets_everything_once(server, trial):
    told = Told()
    server.kill()
    trial.measure()
    try:
        with Tracker(server.uri, EXPERIMENT, None, told) as tracker:
            run = start(tracker, trial)
            wait_for(lambda: told.count_of("tracking is behind") == 1)
            server.start()
            wait_for(lambda: told.count_of("tracking caught up") == 1)
            tracker.describe_run(run, "before the kill")
            wait_for(lambda: note_of(trial, server.uri) == "before the kill")
            server.kill()
            trial.measure()
            tracker.describe_run(run, "after the kill")
            trial.save_model(b"weights")
            model = Weights(f"{trial.folder}/model.safetensors", "epoch-1")
            tracker.end_run(run, Outcome.finished(), trial.folder, model=model)
            wait_for(lambda: told.count_of("tracking is behind") == 2)
            server.start()
            wait_for(lambda: run.is_complete)
            assert note_of(trial, server.uri) == "after the kill"
            assert [str(m.status) for m in models_below(server.uri, trial.folder, EXPERIMENT)] == ["READY"]
            assert trial.delivered(server.uri) == trial.written()
            assert trial.runs(server.uri)[0].info.status == "FINISHED"
    finally:
        if server.process is None:
            server.start()
    assert len(told) in (
        3,
        4,
    )  # behind, caught up, behind, and the second catching up unless that is just being told


@pytest.mark.parametrize("mode", ["close", "refuse_before", "garbage"])
def test_a_delivery_that_failed_at_first_arrives(proxy, trial, mode):
    told = Told()
    trial.measure()
    proxy.misbehave(mode, times=4)
    deliver(proxy.uri, trial, told)
    assert trial.delivered(proxy.uri) == trial.written()
    assert [text.split(":")[0] for text in told] == ["tracking is behind", "tracking caught up"]


def test_a_request_that_was_done_but_answered_500_is_not_done_twice(proxy, trial):
    with Tracker(proxy.uri, EXPERIMENT, None, Told()) as tracker:
        for path in ("runs/create", "log-batch", "runs/create", "runs/update", "log-batch"):
            trial.measure()
            proxy.misbehave("fail_after", path, times=2)
            run = start(tracker, trial)
            wait_for(lambda run=run: run.segments == trial.journal.segments)
            tracker.end_run(run, Outcome.finished(), trial.folder, metrics={"best": 0.5})
            wait_for(lambda run=run: run.closed)
    assert sum("runs/create" in path for path in proxy.seen) == 1
    (run,) = trial.runs(proxy.uri)
    assert [p for p in trial.delivered(proxy.uri) if p[0] != "best"] == trial.written()
    assert len(mlflow.MlflowClient(proxy.uri).get_metric_history(run.info.run_id, "best")) == 1


DATASETS = tuple(Dataset.of("/data/digits", "f" * 64, split, 0.1, 90) for split in ("train", "val"))
MANY = {f"key{number:03d}": number for number in range(101)}  # more than a request takes


@pytest.mark.parametrize("mode", ["refuse_before", "fail_after", "close_after"])
def test_whichever_request_fails_nothing_is_lost_or_doubled(server, proxy, tmp_path, mode):
    client, name = mlflow.MlflowClient(server.uri), f"requests {mode}"
    number = client.create_experiment(name)  # by a person, without a kind
    trials = {}
    with Tracker(proxy.uri, name, None, Told()) as tracker:
        for path in ("set-experiment-tag", "runs/create", "log-inputs", "log-batch", "runs/update"):
            trial = trials[path] = Trial(tmp_path / path)
            trial.measure()
            proxy.misbehave(mode, path, times=1)
            run = tracker.start_run("trial 000", {"kind": "trial"}, MANY, trial.folder, datasets=DATASETS)
            tracker.end_run(run, FINISHED, trial.folder, metrics={"best/val_top1": 0.5}, tags={"host": "a"})
            wait_for(lambda run=run: run.closed)
            assert proxy.times == 0
    assert client.get_experiment(number).tags["mlflow.experimentKind"] == "custom_model_development"
    runs = client.search_runs([number])
    assert len(runs) == len(trials)
    for trial in trials.values():
        (run,) = [run for run in runs if run.data.tags["deit_ray.folder"] == trial.folder]
        told = [(p.key, p.step, p.value, p.timestamp) for p in history_of(server.uri, run)]
        assert sorted(told) == trial.written()
        assert run.data.params == {key: str(value) for key, value in MANY.items()}
        assert inputs_of(run) == {
            "training": ("digits train", "f" * 32 + "-0.1", 90),
            "validation": ("digits val", "f" * 32 + "-0.1", 90),
        }
        assert [p.value for p in client.get_metric_history(run.info.run_id, "best/val_top1")] == [0.5]
        assert run.data.tags["host"] == "a"
    client.set_experiment_tag(number, "mlflow.experimentKind", "genai_development")  # a person's choice
    with Tracker(server.uri, name, None, Told()) as tracker:
        again = start(tracker, trial)
        wait_for(lambda: again.seen)
    assert client.get_experiment(number).tags["mlflow.experimentKind"] == "genai_development"


def test_training_does_not_wait_for_a_slow_server_and_its_thread_shows_that_it_delivers(server, proxy, trial):
    proxy.delay_s = 0.2
    proxy.misbehave("delay")
    begin = time.monotonic()
    with Tracker(proxy.uri, EXPERIMENT, None, Told()) as tracker:
        run = start(tracker, trial)
        trial.measure()
        tracker.end_run(run, Outcome.stopped_early(3), trial.folder)
        assert time.monotonic() - begin < 0.3
        comm = Path(f"/proc/self/task/{tracker.thread.native_id}/comm")
        wait_for(lambda: comm.read_text() == "delivery\n")
        wait_for(lambda: run.closed)
        wait_for(lambda: comm.read_text() == "tracking\n")
    assert trial.delivered(server.uri) == trial.written()
    (kept,) = trial.runs(server.uri)
    assert (kept.info.status, kept.data.tags["outcome"]) == ("FINISHED", "stopped early at epoch 3")


NOTE = "mlflow.note.content"


def test_the_last_description_arrives_through_lost_answers_and_after_the_end(server, proxy, trial):
    """The proxy performs requests and answers 500."""
    with Tracker(proxy.uri, EXPERIMENT, None, Told()) as tracker:
        run = start(tracker, trial)
        proxy.misbehave("fail_after", "log-batch", times=3)
        for number in range(5):
            tracker.describe_run(run, f"text {number}")
            wait_for(lambda number=number: note_of(trial, server.uri) == f"text {number}")
        tracker.describe_run(run, "the end")
        tracker.end_run(run, Outcome.finished(), trial.folder)
        wait_for(lambda: run.is_complete)
        assert note_of(trial, server.uri) == "the end"
        tracker.describe_run(run, "a word after the end")
    assert note_of(trial, server.uri) == "a word after the end"
    (kept,) = trial.runs(server.uri)
    assert (kept.info.status, kept.data.tags["outcome"]) == ("FINISHED", "finished")


def test_an_interrupted_run_keeps_its_description_and_one_that_is_there_is_not_sent_again(proxy, trial):
    for changes in (["log-batch"], []):
        with Tracker(proxy.uri, EXPERIMENT, None, Told()) as tracker:
            run = start(tracker, trial)
            wait_for(lambda run=run: run.seen)
            proxy.seen.clear()
            tracker.describe_run(run, "interrupted; resume it")
        sent = [path.rpartition("/")[2] for path in proxy.seen]
        assert [name for name in sent if name in ("log-batch", "update", "create")] == changes
        (kept,) = trial.runs(proxy.uri)
        assert (kept.data.tags[NOTE], kept.info.status) == ("interrupted; resume it", "RUNNING")


@pytest.mark.parametrize("when", ["before", "while it runs"])
def test_a_description_that_a_person_has_written_stays(server, trial, when):
    client = mlflow.MlflowClient(server.uri)
    with Tracker(server.uri, EXPERIMENT, None, Told()) as tracker:
        run = start(tracker, trial)
        wait_for(lambda: run.seen)
        if when == "while it runs":
            tracker.describe_run(run, "text 0")
            wait_for(lambda: note_of(trial, server.uri) == "text 0")
        client.set_tag(run.record.run_id, NOTE, "mine")
        tracker.describe_run(run, "text 1")
        tracker.end_run(run, Outcome.finished(), trial.folder)
    assert note_of(trial, server.uri) == "mine"
    assert trial.runs(server.uri)[0].info.status == "FINISHED"


def note_of(trial: Trial, uri: str) -> str | None:
    return next((run.data.tags.get(NOTE) for run in trial.runs(uri)), None)


def test_what_a_worker_measures_after_the_end_of_its_run_arrives(server, trial):
    trial.measure()
    with Tracker(server.uri, EXPERIMENT, None, Told()) as tracker:
        run = start(tracker, trial)
        tracker.end_run(run, Outcome.stopped_early(3), trial.folder)
        wait_for(lambda: run.closed and not tracker.runs.pending())
        trial.measure()
    assert trial.delivered(server.uri) == trial.written()
    (kept,) = trial.runs(server.uri)
    assert (kept.info.status, kept.data.tags["outcome"]) == ("FINISHED", "stopped early at epoch 3")


def test_a_repeated_delivery_doubles_nothing(server, trial):
    trial.measure()
    deliver(server.uri, trial)
    first = trial.delivered(server.uri)
    for forgotten in (
        {"segments": 0, "outcome": None},
        {"run_id": None, "segments": 0, "outcome": None, "described": False},
    ):
        trial.change_record(**forgotten)  # as after the kill of a driver that had not noted its request
        trial.measure()
        deliver(server.uri, trial)
        assert trial.delivered(server.uri) == trial.written() != first


def test_an_early_stop_of_an_earlier_version_is_brought_up_to_date_once_and_a_resume_takes_it_back(
    proxy, trial
):
    early = Outcome.stopped_early(3)
    trial.measure()
    deliver(proxy.uri, trial, outcome=early)
    (run,) = trial.runs(proxy.uri)
    ended_ms = run.info.end_time
    client = mlflow.MlflowClient(proxy.uri)
    client.delete_tag(run.info.run_id, "state")  # the earlier version set no such tag, another status,
    client.set_terminated(run.info.run_id, "KILLED", ended_ms)
    record = trial.record()
    assert (record.pop("status"), record.pop("version"), record.pop("parent_id")) == ("FINISHED", 1, None)
    Path(trial.folder, "tracking.json").write_text(json.dumps(record))  # and recorded none
    assert not Record.read(trial.folder).is_delivered(early)

    for changes in (["log-batch", "update"], []):
        proxy.seen.clear()
        deliver(proxy.uri, trial, outcome=early)
        asked = [path.rpartition("/")[2].partition("?")[0] for path in proxy.seen]
        assert [name for name in asked if name not in ("get", "get-by-name", "search")] == changes
        assert Record.read(trial.folder).is_delivered(early)
        (run,) = trial.runs(proxy.uri)
        assert (run.info.status, run.data.tags["outcome"], run.data.tags["state"]) == (
            "FINISHED",
            "stopped early at epoch 3",
            "PRUNED",
        )
    assert trial.delivered(proxy.uri) == trial.written()

    with Tracker(proxy.uri, EXPERIMENT, None, Told()) as tracker:
        resumed = start(tracker, trial)
        wait_for(lambda: resumed.seen and trial.runs(proxy.uri)[0].info.status == "RUNNING")
        assert not {"outcome", "state"} & set(trial.runs(proxy.uri)[0].data.tags)
        assert (trial.record()["outcome"], trial.record()["status"]) == (None, None)
        tracker.end_run(resumed, Outcome.finished(), trial.folder)
    (run,) = trial.runs(proxy.uri)
    assert (run.info.status, run.data.tags["outcome"]) == ("FINISHED", "finished")
    assert "state" not in run.data.tags


def test_a_server_that_does_not_know_the_run_gets_all_of_it_again(server, trial, tmp_path):
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
        tracker.end_run(run, Outcome.finished(), trial.folder)
    assert trial.delivered(server.uri) == trial.written()
    assert told == []

    other = f"sqlite:///{tmp_path}/other.db"
    deliver(other, trial)  # another tracking URI
    assert trial.delivered(other) == trial.written()
    assert trial.record()["uri"] == other


def test_the_duplicate_of_a_run_is_deleted(server, proxy, trial, tmp_path):
    told, study, client = Told(), Trial(tmp_path / "short-1"), mlflow.MlflowClient(server.uri)
    trial.measure()
    with Tracker(proxy.uri, EXPERIMENT, None, told) as tracker:
        proxy.misbehave("refuse_before", "runs/create", times=1)
        parent = tracker.start_run("short-1", {"kind": "study"}, {}, study.folder, journal=False)
        wait_for(lambda: parent.seen)
        proxy.misbehave("refuse_before", "runs/create", times=1)
        run = start(tracker, trial, parent=parent)
        wait_for(lambda: run.segments == 1)
        # both requests that seemed lost are performed late
        for folder, existing in ((study.folder, parent), (trial.folder, run)):
            tags = {"deit_ray.id": existing.record.id, "deit_ray.folder": folder}
            client.create_run(tracker.server.experiment_id, existing.started_ms - 1, tags)
        assert (len(trial.runs(server.uri)), len(study.runs(server.uri))) == (2, 2)
        tracker.end_run(run, Outcome.finished(), trial.folder)
        wait_for(lambda: run.closed)
        tracker.end_run(parent, Outcome.finished(), study.folder)
    assert trial.delivered(server.uri) == trial.written()
    (kept,), (kept_parent,) = trial.runs(server.uri), study.runs(server.uri)
    assert kept.info.start_time == run.started_ms - 1  # the earliest
    assert kept_parent.info.start_time == parent.started_ms - 1
    assert kept.data.tags["mlflow.parentRunId"] == kept_parent.info.run_id
    assert kept.data.params == {"optim.lr": "0.001"}


def test_a_refusal_by_mlflow_is_shown_once_and_stops_nothing_else(server, trial, tmp_path):
    told, other = Told(), Trial(tmp_path / "short-1" / "trial-0001")
    trial.journal.add({"no!such?name": 1.0}, 1)
    trial.journal.flush()
    trial.measure()
    other.measure()
    Path(trial.folder, "model.safetensors").mkdir()  # cannot be read
    with Tracker(server.uri, EXPERIMENT, None, told) as tracker:
        run = tracker.start_run("x" * 300, {"note": "t\0" * 9000}, {"long": "p" * 7000}, trial.folder)
        tracker.end_run(run, Outcome.failed("r" * 9000), trial.folder, "model.safetensors")
        tracker.end_run(start(tracker, other), Outcome.finished(), other.folder)
    assert trial.delivered(server.uri) == [point for point in trial.written() if point[0] != "no!such?name"]
    assert other.delivered(server.uri) == other.written()
    (kept,) = trial.runs(server.uri)
    assert kept.info.status == "FAILED"
    assert (len(kept.data.params["long"]), len(kept.data.tags["outcome"])) == (6000, 8000)
    assert len(told) == 2
    assert (
        told.count_of("its points cannot be delivered to MLflow")
        == told.count_of("its model.safetensors cannot be delivered")
        == 1
    )
    assert trial.record()["segments"] == 0  # so that a sync tries it again


def test_a_run_that_can_never_be_delivered_does_not_stop_the_others(proxy, trial, tmp_path):
    told, others = Told(), [Trial(tmp_path / "short-1" / f"trial-{number}") for number in (1, 2)]
    record = Path(trial.folder, "tracking.json")
    record.mkdir()  # cannot be read
    for other in others:
        other.measure()
    with Tracker(proxy.uri, EXPERIMENT, None, told) as tracker:
        run = start(tracker, trial)
        wait_for(lambda: told.count_of("tracking is behind") == 1)
        for other in others:
            tracker.end_run(start(tracker, other), Outcome.finished(), other.folder)
        wait_for(
            lambda: all(other.runs(proxy.uri) and other.record()["outcome"] == "finished" for other in others)
        )
        assert not run.seen
        record.rmdir()
        wait_for(lambda: told.count_of("tracking caught up") == 1)
    assert len(told) == 2
    assert [other.delivered(proxy.uri) for other in others] == [other.written() for other in others]


def test_a_store_of_artifacts_that_fails_is_named_once_and_holds_nothing_else_back(
    server, proxy, trial, tmp_path
):
    told, other = Told(), Trial(tmp_path / "short-1" / "trial-0001")
    proxy.misbehave("refuse_before", "mlflow-artifacts")
    begin = time.monotonic()
    with Tracker(proxy.uri, EXPERIMENT, None, told) as tracker:
        for each in (trial, other):
            each.measure()
            tracker.end_run(start(tracker, each), Outcome.finished(), each.folder)
    assert time.monotonic() - begin < 15
    assert [each.delivered(server.uri) for each in (trial, other)] == [trial.written(), other.written()]
    assert {run.info.status for each in (trial, other) for run in each.runs(server.uri)} == {"FINISHED"}
    assert told.count_of("MLflow takes no artifacts (it answers that it failed (HTTP status 500)") == 1
    assert not [text for text in told if "Error" in text or "Exception" in text]
    proxy.misbehave("pass")
    deliver(proxy.uri, trial)  # as a sync does
    (run,) = trial.runs(server.uri)
    names = [file.path for file in mlflow.MlflowClient(server.uri).list_artifacts(run.info.run_id)]
    assert "experiment.yaml" in names


class Answering(BaseHTTPRequestHandler):
    """A server that gives every request the same answer."""

    status, content = 200, b"<html>Welcome to nginx!</html>"

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    do_POST = do_GET

    def log_message(self, *arguments):
        pass


REASONS = {  # what answers: why nothing is delivered
    (200, b"<html>Welcome to nginx!</html>"): "what answers there is no MLflow server",
    (401, b"You are not authenticated."): "it asks for a login: set MLFLOW_TRACKING_USERNAME",
    (403, b"Permission denied"): "its login may not do that",
    (404, b"not found"): "what answers there is no MLflow server",
    (502, b"Bad Gateway"): "it answers that it failed (HTTP status 502)",
}


@pytest.mark.parametrize(("answer", "reason"), REASONS.items())
def test_what_is_no_mlflow_or_asks_for_a_login_is_said_in_one_sentence(trial, monkeypatch, answer, reason):
    monkeypatch.setattr(tracker, "PATIENCE_S", 1.0)
    handler = type("Handler", (Answering,), {"status": answer[0], "content": answer[1]})
    told = Told()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True).start()
        trial.measure()
        deliver(f"http://me:secret@127.0.0.1:{web.server_address[1]}", trial, told)
        web.shutdown()
    assert told.count_of(reason) == 1, told
    assert not [text for text in told if "Error" in text or "Exception" in text or "secret" in text]


def test_a_deleted_experiment_is_said_with_the_command_that_restores_it(server, trial, monkeypatch):
    monkeypatch.setattr(tracker, "PATIENCE_S", 1.0)
    told, client, begin = Told(), mlflow.MlflowClient(server.uri), time.monotonic()
    number = client.create_experiment("deleted")
    client.delete_experiment(number)
    trial.measure()
    with Tracker(server.uri, "deleted", None, told) as following:
        start(following, trial)
        wait_for(lambda: told)
    assert time.monotonic() - begin < 30  # it does not wait for what cannot come
    command = f"restore it with `mlflow experiments restore -x {number}`"
    assert told.count_of(f"its experiment deleted was deleted; {command}") == 1


HANGING = """
import sys, time
from deit_ray.tracking.tracker import Tracker
from deit_ray.results.journal import JournalWriter
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
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment
    )
    told, elapsed = done.stdout.splitlines()
    assert float(elapsed) < tracker.HASTE_S + 2
    assert told.endswith(
        "2 runs with 1 point not delivered; they are kept in the journals; "
        "deliver them with: deit-ray sync short-1"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    Postgres.binaries() is None, reason="PostgreSQL's initdb is neither in /usr/lib/postgresql nor on PATH"
)
def test_postgresql_killed_behind_the_server_loses_and_doubles_nothing(
    own_server, bucket, tmp_path, thorough
):
    trials, told = [Trial(tmp_path / "short-1" / f"trial-{number}") for number in range(4)], Told()
    place = f"{bucket}/artifacts"
    with (
        Postgres() as postgres,
        MlflowServer(tmp_path / "mlflow", postgres.uri, artifacts=place) as server,
    ):
        with Tracker(server.uri, EXPERIMENT, None, told) as tracker:
            runs = [start(tracker, trial, datasets=DATASETS) for trial in trials]
            writing = threading.Thread(
                target=lambda: [(trial.measure(50), time.sleep(0.02)) for _ in range(10) for trial in trials]
            )
            writing.start()
            wait_for(lambda: any(run.segments for run in runs))
            postgres.kill()
            wait_for(lambda: told.count_of("tracking is behind") == 1)
            writing.join()
            postgres.start()
            for run, trial in zip(runs, trials, strict=True):
                tracker.end_run(run, Outcome.finished(), trial.folder, metrics={"best/val_top1": 0.5})
        assert all(len(trial.delivered(server.uri)) == 1000 for trial in trials)
        assert all(trial.delivered(server.uri) == trial.written() for trial in trials)
        for trial in trials:
            trial.change_record(segments=0, outcome=None)
            deliver(server.uri, trial)
        assert all(trial.delivered(server.uri) == trial.written() for trial in trials)
        for trial in trials:
            (run,) = trial.runs(server.uri)
            assert set(inputs_of(run)) == {"training", "validation"}
            assert run.data.metrics["best/val_top1"] == 0.5
            stored = f"{place}/{run.info.artifact_uri.partition(':/')[2]}/experiment.yaml"
            assert storage.read_bytes(stored) == Path(trial.folder, "experiment.yaml").read_bytes()


def test_a_port_where_nothing_listens_is_reported_once(trial, monkeypatch):
    monkeypatch.setattr(tracker, "PATIENCE_S", 1.0)
    told, begin = Told(), time.monotonic()
    trial.measure()
    deliver(f"http://127.0.0.1:{free_port()}", trial, told)
    assert time.monotonic() - begin < 4
    assert [text.split(":")[0] for text in told] == ["tracking is behind", "MLflow at http"]
