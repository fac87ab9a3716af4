"""A study's database on an object store, on a real S3 API server behind a proxy that loses answers."""

import fnmatch
import json
import os
import re
import subprocess
import sys
import time

import boto3
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.trial import TrialState

from deit_ray import storage
from deit_ray.errors import UnavailableError, UserError
from deit_ray.results import lease
from deit_ray.study import object_log
from deit_ray.study.object_log import ObjectLog
from deit_ray.study.study import Study
from tests.conftest import ROOT
from tests.support.commands import call
from tests.support.servers import Proxy


@pytest.fixture
def line(bucket, s3_server, monkeypatch):
    """A proxy between this process and the bucket; time-outs are short."""
    with Proxy(s3_server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.uri)
        monkeypatch.setattr(storage, "PAUSES_S", (0.05, 0.05))
        monkeypatch.setattr(storage, "TIMEOUT_S", 0.5)
        monkeypatch.setattr(storage, "READS", 1)
        yield proxy


def driver_of(uri: str) -> ObjectLog:
    log = ObjectLog(uri, "made-1")
    log.begin_writing()
    return log


def logs_in(uri: str) -> list:
    """What a new reader finds."""
    return ObjectLog(uri, "made-1").read_logs(0)


def act(study: optuna.Study) -> None:
    """Does to a study what a driver does: trials that finish, are stopped, fail, and are left open."""
    study.set_user_attr("spent", {"wall_s": 1.5, "gpu_s": float("inf")})
    study.enqueue_trial({"lr": 0.1, "kind": "a"})
    for number, state in enumerate(("COMPLETE", "PRUNED", "FAIL", None)):
        trial = study.ask()
        trial.suggest_float("lr", 1e-4, 1, log=True)
        trial.suggest_categorical("kind", ["a", "b"])
        for epoch in (1, 2):
            trial.set_user_attr("times", {str(epoch): 0.1})
            trial.report(number + epoch / 10, epoch)
        if state:
            study.tell(trial, 0.5 if state == "COMPLETE" else None, state=TrialState[state])


def seen(study: optuna.Study) -> list:
    fields = ("number", "state", "params", "distributions", "values", "intermediate_values", "user_attrs")
    trials = [[getattr(trial, field) for field in fields] for trial in study.trials]
    return [*trials, study.user_attrs, study.directions]


def test_a_study_has_in_the_log_what_it_has_in_sqlite(bucket, tmp_path):
    log = driver_of(f"{bucket}/log")
    places = {"log": JournalStorage(log), "sqlite": f"sqlite:///{tmp_path}/study.db"}
    studies = {
        name: optuna.create_study(
            storage=place, study_name="s", direction="maximize", sampler=optuna.samplers.RandomSampler(0)
        )
        for name, place in places.items()
    }
    for study in studies.values():
        act(study)
    reader = optuna.load_study(study_name="s", storage=JournalStorage(ObjectLog(f"{bucket}/log", "s")))
    assert seen(studies["log"]) == seen(studies["sqlite"]) == seen(reader)
    reader_before = len(reader.trials)
    studies["log"].ask()
    assert len(reader.trials) == reader_before + 1
    with pytest.raises(UserError, match="s: only the driver of a study may write its database"):
        reader.set_user_attr("spent", 1)


def test_operations_that_belong_together_are_one_object(bucket, line):
    log = driver_of(f"{bucket}/log")
    study = optuna.create_study(storage=JournalStorage(log), study_name="s", direction="maximize")
    before = len(storage.names_after(f"{bucket}/log", ""))
    with log.as_one():
        act(study)
        assert len(study.trials) == 4  # the driver sees them before they are written
        assert len(storage.names_after(f"{bucket}/log", "")) == before
    assert len(storage.names_after(f"{bucket}/log", "")) == before + 1
    reader = optuna.load_study(study_name="s", storage=JournalStorage(ObjectLog(f"{bucket}/log", "s")))
    assert seen(study) == seen(reader)
    line.misbehave("refuse_before")
    with pytest.raises(UnavailableError), log.as_one():
        study.ask()
    with pytest.raises(UnavailableError):  # it does not write on
        study.ask()
    line.misbehave("pass")
    assert seen(reader)[:4] == seen(study)[:4]
    assert len(reader.trials) == 4


@pytest.mark.parametrize(
    ("mode", "times"),
    [
        ("fail_after", 1),
        ("fail_after", 3),
        ("close_after", 1),
        ("refuse_before", 1),
        ("close", 3),
        ("hang", 1),
    ],
)
def test_an_uncertain_write_is_read_back_before_it_is_repeated(bucket, line, mode, times):
    """Three requests fail: the write, the read that follows, and the second write."""
    log = driver_of(f"{bucket}/log")
    log.append_logs([{"n": 0}])
    line.seen.clear()
    line.misbehave(mode, times=times)
    log.append_logs([{"n": 1}])
    assert len(line.seen) > times
    log.append_logs([{"n": 2}])
    assert [entry["n"] for entry in logs_in(f"{bucket}/log")] == [0, 1, 2]
    assert len(storage.names_after(f"{bucket}/log", "")) == 3


@pytest.mark.parametrize("mode", ["fail_after", "refuse_before"])
def test_a_store_that_stays_away_ends_the_driver_and_a_resume_finds_what_was_written(bucket, line, mode):
    log = driver_of(f"{bucket}/log")
    log.append_logs([{"n": 0}])
    line.misbehave(mode)
    with pytest.raises(UnavailableError, match=r"^s3://studies/log/00000001.json: cannot be written: .*500"):
        log.append_logs([{"n": 1}])
    line.misbehave("pass")
    with pytest.raises(UnavailableError, match="cannot be written"):  # its number may be taken
        log.append_logs([{"n": 2}])
    log.end_writing()
    log.begin_writing()
    log.append_logs([{"n": 3}])
    written = [0, 1, 3] if mode == "fail_after" else [0, 3]
    assert [entry["n"] for entry in log.read_logs(0)] == written
    assert [entry["n"] for entry in logs_in(f"{bucket}/log")] == written


def test_a_second_driver_ends_the_first_one_and_loses_nothing(bucket):
    first = driver_of(f"{bucket}/log")
    first.append_logs([{"n": 0}])
    second = driver_of(f"{bucket}/log")
    for _ in range(2):
        with pytest.raises(
            UserError,
            match=rf"^made-1: another driver, process {os.getpid()} on \S+, has taken over the study;",
        ):
            first.append_logs([{"n": 1}])
    second.append_logs([{"n": 2}])
    assert [entry["n"] for entry in logs_in(f"{bucket}/log")] == [0, 2]


def test_a_late_write_of_an_earlier_driver_is_kept(bucket, monkeypatch):
    """It arrives between the new driver's look and the new driver's first write."""
    first = driver_of(f"{bucket}/log")
    first.append_logs([{"n": 0}])
    second, read_on = ObjectLog(f"{bucket}/log", "made-1"), ObjectLog._read_on

    def read_then_be_late(log):
        read_on(log)
        if len(log.ahead) == 1:
            first.append_logs([{"n": 1}])

    monkeypatch.setattr(ObjectLog, "_read_on", read_then_be_late)
    second.begin_writing()
    second.append_logs([{"n": 2}])
    assert [entry["n"] for entry in second.read_logs(0)] == [0, 1, 2]
    assert [entry["n"] for entry in logs_in(f"{bucket}/log")] == [0, 1, 2]


def test_a_thousand_objects_are_merged_into_one(bucket, monkeypatch):
    assert object_log.MERGED == 1000
    monkeypatch.setattr(object_log, "MERGED", 10)
    log, uri = driver_of(f"{bucket}/log"), f"{bucket}/log"
    behind = ObjectLog(uri, "made-1")
    for n in range(24):
        log.append_logs([{"n": n}])
        if n == 4:
            assert len(behind.read_logs(0)) == 5
    assert storage.list_names(f"{uri}/merged") == ["00000000.json", "00000010.json"]
    expected = [{"n": n} for n in range(24)]
    assert json.loads(storage.read_bytes(f"{uri}/merged/00000010.json")) == expected[10:20]
    assert behind.read_logs(5) == expected[5:]
    assert log.read_logs(24) == []
    assert log.read_logs(3) == expected[3:]
    # the driver was killed between the tenth object and the merged one
    storage.remove(f"{uri}/merged/00000000.json")
    reader = ObjectLog(uri, "made-1")
    assert reader.read_logs(0) == expected
    assert storage.list_names(f"{uri}/merged") == ["00000010.json"]
    reader.begin_writing()
    assert json.loads(storage.read_bytes(f"{uri}/merged/00000000.json")) == expected[:10]
    reader.append_logs([{"n": 24}])
    assert logs_in(uri) == [*expected, {"n": 24}]
    # an old driver cannot write a number that is in a merged object
    old = ObjectLog(uri, "made-1")
    old.begin_writing()
    old.position = 3
    with pytest.raises(UserError, match="another driver"):
        old.append_logs([{"n": -1}])


@pytest.mark.parametrize(
    ("uri", "dropped", "says"),
    [
        ("gs://bucket/results", set(), "cannot hold a study; use s3://BUCKET/PATH, a local path or a shared"),
        ("s3://studies/r?scheme=http", set(), "options follow the path; .* AWS_ENDPOINT_URL"),
        ("s3://studies/results", {"if-none-match"}, "the store has no conditional writes"),
        ("s3://studies/results", {"if-match"}, "the store has no conditional writes"),
        (
            "s3://nowhere/results",
            set(),
            "cannot be written: NoSuchBucket: The specified bucket does not exist",
        ),
    ],
)
def test_a_store_that_cannot_keep_two_drivers_apart_is_refused(bucket, line, experiment, uri, dropped, says):
    from deit_ray.trial.resolve import resolve

    line.dropped |= dropped
    keys = {"distillation.kind": "none", "search.space": {"optim.lr": {"log": [3e-4, 1e-2]}}}
    made = experiment("digits_student", {"results.uri": uri, "tracking.uri": "http://127.0.0.1:9"} | keys)
    with pytest.raises(UserError, match=f"^(results.uri: )?{uri.replace('?', '.')}.*{says}"):
        resolve(made)
    assert storage.list_names(bucket) == []


@pytest.mark.parametrize("header", ["if-none-match", "if-match"])
def test_a_store_that_says_that_it_has_no_conditional_writes_is_refused(line, header):
    line.unknown.add(header)
    says = "s3://studies/results: the store has no conditional writes"
    with pytest.raises(UserError, match=f"^results.uri: {says}"):
        storage.check_conditions("results.uri", "s3://studies/results")
    if header == "if-none-match":  # a study that was copied there, and a run, which needs none
        with pytest.raises(UserError, match=r"^s3://studies/results/driver.json: the store has no condit"):
            lease.driving("s3://studies/results", "made-1", lambda: 0).__enter__()
        storage.create_bytes("s3://studies/run/experiment.yaml", b"x")


@pytest.fixture
def study(experiment, bucket) -> Study:
    keys = {
        "distillation.kind": "none",
        "search.space": {"optim.lr": {"log": [3e-4, 1e-2]}},
        "results.uri": f"{bucket}/results",
    }
    return Study.create(experiment("digits_student", {"name": "made"} | keys))


@pytest.mark.parametrize(
    ("names", "content", "says"),
    [
        ("00000021.json", None, "00000021.json is missing"),
        ("00000023.json", None, "00000023.json is missing"),
        ("0000002[23].json", None, "00000023.json is missing"),
        ("*00000000.json", None, "00000000.json is missing"),
        ("*0000001[04].json", None, "00000010.json is missing"),
        ("0*.json", None, "00000023.json is missing"),
        ("00000022.json", b'{"driver":{},"logs"', "00000022.json is not as deit-ray wrote it"),
        ("00000022.json", b'{"driver":{}}', "00000022.json is not as deit-ray wrote it"),
        ("merged/00000000.json", b'"logs"', "merged/00000000.json is not as deit-ray wrote it"),
        ("merged/*", None, None),  # they are made again
        ("0000000[0-9].json", None, None),  # a merged one has them
    ],
)
def test_an_object_that_somebody_deleted_or_changed_is_named(study, monkeypatch, names, content, says):
    monkeypatch.setattr(object_log, "MERGED", 10)
    with study.driving():
        for n in range(24 - study.database.log.position):
            study.optuna.set_user_attr("n", n)
    folder, results = f"{study.folder}/study.log", study.experiment.results.uri
    assert study.database.log.position == 24
    bucket = boto3.resource("s3").Bucket("studies")
    known = {entry.key.partition("study.log/")[2]: entry for entry in bucket.objects.all()}
    for name in fnmatch.filter(known, names):
        known[name].delete() if content is None else known[name].put(Body=content)

    def drive() -> None:
        again = Study.open("made-1", results)
        with again.driving():
            assert seen(again.optuna) == seen(study.optuna)
            again.optuna.set_user_attr("n", -1)

    if says is None:
        drive()
        assert storage.list_names(f"{folder}/merged") == ["00000000.json", "00000010.json"]
        return
    for _ in range(2):  # the first refusal leaves no trace
        with pytest.raises(UserError, match=rf"^made-1: {folder}/{says}, so .*; restore the object from an"):
            drive()


def test_each_value_of_a_trial_costs_equally_many_bytes(study):
    with study.driving():
        study.optuna.ask()
        first = study.database.log.position
        for epoch in range(100, 130):
            study.report(0, epoch, 0.5)
    assert study.trial(0).values.keys() == study.trial(0).times.keys() == set(range(100, 130))
    folder = f"{study.folder}/study.log"
    sizes = [
        len(storage.read_version(f"{folder}/{name}").content) for name in storage.names_after(folder, "")
    ]
    assert len(sizes) == first + 30  # a value and its time together
    assert max(sizes[first:]) < 800


@pytest.mark.parametrize(
    "command", [["status", "made"], ["tune", "--resume", "made"], ["ui", "--optuna", "x"]]
)
def test_a_study_on_s3_without_boto3_says_what_to_install(study, monkeypatch, tmp_path, command):
    monkeypatch.setitem(sys.modules, "boto3", None)  # as where it is not installed
    monkeypatch.chdir(tmp_path)
    ended = call(*command, "--results", study.experiment.results.uri)
    says = "a study there needs boto3: pip install 'deit-ray[s3]'"
    assert ended.error == f"error: {study.folder}: {says}", ended
    with pytest.raises(UserError, match=f"^results.uri: s3://studies/results: {re.escape(says)}$"):
        storage.check_conditions("results.uri", "s3://studies/results")


DRIVE = """
import sys, time
from deit_ray.study.study import Study
with Study.open('made-1', 's3://studies/results').driving():
    print('drives', flush=True)
    time.sleep(60)
"""


def test_a_lease_names_the_driver_and_refuses_a_second_one(study, monkeypatch):
    with subprocess.Popen(
        [sys.executable, "-c", DRIVE],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as other:
        assert other.stdout.readline() == "drives\n"
        assert study.driver()["pid"] == other.pid
        refused = rf"made-1: is running already, on \S+ as process {other.pid}; wait for its end, or end it"
        with pytest.raises(UserError, match=refused), study.driving():
            pass
        other.kill()
        other.wait()
    assert study.driver() is None  # nothing runs on this machine under its number
    uri = f"{study.folder}/{lease.LEASE}"
    left = json.loads(storage.read_bytes(uri))
    for there in ({"host": "elsewhere"}, {"machine": "another of the same name"}):
        storage.write_bytes(uri, json.dumps(left | there).encode())
        with (
            pytest.raises(UserError, match=r"is running .* as process .*after a kill: 30 s"),
            study.driving(),
        ):
            pass
    monkeypatch.setattr(lease, "LEASE_S", 0.0)
    time.sleep(1.1)  # the store's clock has whole seconds
    with study.driving():
        assert json.loads(storage.read_bytes(uri))["pid"] == os.getpid()
    assert json.loads(storage.read_bytes(uri)) == {"entries": study.database.log.position}


def test_a_lease_is_renewed_until_another_driver_takes_it(study, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    uri = f"{study.folder}/{lease.LEASE}"
    with study.driving():
        time.sleep(0.5)
        assert json.loads(storage.read_bytes(uri))["renewed"] > 1
        taken = json.dumps(
            {"host": "elsewhere", "machine": "", "pid": 1, "since": 0.0, "entries": 2}
        ).encode()
        storage.write_bytes(uri, taken)
        time.sleep(0.3)
        assert storage.read_bytes(uri) == taken
    assert storage.read_bytes(uri) == taken


def test_studies_of_one_name_that_begin_at_once_get_folders_of_their_own(study, monkeypatch):
    with monkeypatch.context() as patch:  # neither sees the other's folder; their first files are equal
        patch.setattr("deit_ray.results.folders.runs_of", lambda name, results: [])
        patch.setattr(storage, "exists", lambda uri: False)
        assert Study.create(study.experiment).name == "made-2"
    assert [Study.open(name, study.experiment.results.uri).name for name in ("made-1", "made")] == [
        "made-1",
        "made-2",
    ]


def test_a_study_is_copied_for_optunas_own_tools(study, tmp_path):
    with study.driving():
        act(study.optuna)
    results, file = study.experiment.results.uri, tmp_path / "copy.db"
    assert "open the MLflow server that tracking.uri names, or copy" in call("ui", "--results", results).error
    ended = call("ui", "--results", results, "--optuna", file)
    assert ended.out == f"made-1: copied; look at them with: optuna-dashboard sqlite:///{file}\n"
    copied = optuna.load_study(study_name="made-1", storage=f"sqlite:///{file}")
    assert seen(copied) == seen(study.optuna)
    assert "exists already; name a new file" in call("ui", "--results", results, "--optuna", file).error
    assert "has no studies" in call("ui", "--results", tmp_path, "--optuna", f"{file}2").error
