"""The next requests to MLflow in every situation of a run: a table, without a server."""

import math
from dataclasses import replace

import pytest

from deit_ray.outcome import Outcome
from deit_ray.results.journal import Point
from deit_ray.tracking.datasets import Dataset
from deit_ray.tracking.requests import (
    CreateRun,
    DeleteDuplicate,
    DeleteTag,
    Describe,
    FindDuplicates,
    FindRun,
    LogArtifact,
    LogDatasets,
    LogEnding,
    LogPoints,
    Note,
    ReadJournal,
    ReadRecord,
    Refusable,
    ReopenRun,
    ResetRecord,
    SetDescription,
    ShareView,
    Terminate,
    after_failure,
    after_refusal,
    after_request,
    next_requests,
    opening_requests,
)
from deit_ray.tracking.tracked import VERSION, Delivered, Desired, Ending, Found, Record
from deit_ray.tracking.view import View

EXPERIMENT, MODEL, BAD, JOURNAL = (
    f"/r/s-1/t/{name}" for name in ("experiment.yaml", "model.safetensors", "bad_images.csv", "journal")
)
TAGS = {"deit_ray.kind": "trial", "deit_ray.id": "identity", "mlflow.parentRunId": "study"}
PAIRS = tuple(TAGS.items())
LR = ("optim.lr", "0.001")
EARLY = "stopped early at epoch 3"


def ended(outcome: Outcome, **metrics: float) -> Desired:
    return replace(RUNS, ending=Ending(outcome, (MODEL, BAD), metrics, 2000))


RUNS = Desired("trial 000", "/r/s-1/t", {"deit_ray.kind": "trial"}, dict([LR]), JOURNAL, 1000, None, "study")
VIEW = View("s-1", "{}")
STUDY = replace(RUNS, journal=None, view=VIEW)
FINISHES = ended(Outcome.finished())
STOPS_EARLY = ended(Outcome.stopped_early(3))

NEW = Record("identity", "http://mlflow", "tests")  # a new record
MADE = replace(NEW, run_id="a")
OPEN = replace(MADE, described=True, segments=2)  # a record of a run that runs
CLOSED = replace(OPEN, outcome="finished", status="FINISHED", version=VERSION, parent_id="study")
CLOSED_EARLY = replace(CLOSED, outcome=EARLY)
CLOSED_BEFORE = replace(CLOSED, version=0, parent_id=None)  # by an earlier version
NOTED = {"version": VERSION, "parent_id": "study"}

THERE = Found(
    "a", tags=TAGS, params=frozenset(["optim.lr"]), metrics={"loss": 0.5}
)  # MLflow has a run that runs
THERE_FINISHED = replace(THERE, status="FINISHED", tags=TAGS | {"outcome": "finished"})
THERE_EARLY = replace(THERE, status="FINISHED", tags=TAGS | {"outcome": EARLY, "state": "PRUNED"})
THERE_EARLY_0_1 = replace(THERE, status="KILLED", tags=TAGS | {"outcome": EARLY})  # by an earlier version

RUNNING = Delivered(OPEN, True, THERE, {"loss": 0.5}, segments=2, unsent=())
ALONE = replace(RUNNING, duplicates=())  # all runs of the identity were looked for: there is one
POINTS = ([Point("loss", 0.4, 30, 1)], [Point("loss", 0.3, 40, 2)], [Point("loss", 0.2, 50, 3)])

TRAIN, VAL = (Dataset.of("/data/digits", "f" * 64, split, 0.1, 10) for split in ("train", "val"))
DATASETS = (TRAIN, VAL)
MANY = tuple((f"key{number:03d}", "1") for number in range(201))

CREATE = CreateRun("trial 000", 1000, PAIRS)
DESCRIBE = Describe((), (LR,))
OLD_TEXT, TEXT = SetDescription("**short-1**: running"), SetDescription("**short-1**: ended")
DESCRIBED = replace(RUNS, description=TEXT.text)


def described(request: SetDescription, **changed: str) -> Delivered:
    """A run that runs, with a description in MLflow; `changed` tags are as a person has left them."""
    return replace(RUNNING, found=replace(THERE, tags=TAGS | dict(request.tags) | changed))


END_FINISHED = LogEnding((), (("outcome", "finished"),), 2000)
END_EARLY = LogEnding((), (("outcome", EARLY), ("state", "PRUNED")), 2000)

SITUATIONS = {
    # a new run
    "its folder was not read yet": (RUNS, Delivered(), [ReadRecord()]),
    "its identity is new": (RUNS, Delivered(NEW, False, duplicates=()), [ResetRecord(None), CREATE]),
    "it was created": (
        RUNS,
        Delivered(NEW, True, replace(THERE, params=frozenset()), duplicates=()),
        [ResetRecord("a")],
    ),
    "its record has the id that MLflow gave it": (
        RUNS,
        Delivered(MADE, True, replace(THERE, params=frozenset()), duplicates=()),
        [DESCRIBE, LogArtifact(EXPERIMENT)],
    ),
    "it reads data sets": (
        replace(RUNS, datasets=DATASETS),
        Delivered(MADE, True, replace(THERE, params=frozenset()), duplicates=()),
        [DESCRIBE, LogDatasets(DATASETS), LogArtifact(EXPERIMENT)],
    ),
    "its experiment was sent": (
        RUNS,
        Delivered(MADE, True, replace(THERE, files=frozenset([EXPERIMENT])), duplicates=()),
        [Note(True)],
    ),
    "its experiment was refused: the record stays open for a sync": (
        RUNS,
        replace(RUNNING, record=replace(OPEN, described=False), refused=frozenset([LogArtifact(EXPERIMENT)])),
        [],
    ),
    "it is described": (RUNS, replace(RUNNING, unsent=None), [ReadJournal(2)]),
    "its journal has more": (RUNS, replace(RUNNING, unsent=POINTS), [LogPoints(2, 3)]),
    "its journal has no more": (RUNS, RUNNING, []),
    "it is the study's own, which has no journal": (
        replace(RUNS, journal=None),
        replace(RUNNING, last={}, unsent=None),
        [],
    ),
    "it is the study's own, and MLflow may lack the study's view": (
        STUDY,
        replace(RUNNING, last={}, unsent=None),
        [ShareView(VIEW)],
    ),
    "the study's view is there": (STUDY, replace(RUNNING, last={}, unsent=None, is_shared=True), []),
    "the study's view was refused": (
        STUDY,
        replace(RUNNING, last={}, unsent=None, refused=frozenset([ShareView(VIEW)])),
        [],
    ),
    "it has ended, and a part of its journal is left": (
        FINISHES,
        replace(RUNNING, unsent=POINTS[:1], duplicates=()),
        [LogPoints(2, 1)],
    ),
    "it has ended": (
        FINISHES,
        ALONE,
        [LogArtifact(MODEL), LogArtifact(BAD), END_FINISHED, Terminate("FINISHED", 2000)],
    ),
    "the scheduler stopped it early": (
        STOPS_EARLY,
        ALONE,
        [LogArtifact(MODEL), LogArtifact(BAD), END_EARLY, Terminate("FINISHED", 2000)],
    ),
    "a person cancelled it": (
        ended(Outcome.cancelled()),
        replace(ALONE, found=replace(THERE, files=frozenset([MODEL, BAD]))),
        [LogEnding((), (("outcome", "cancelled"),), 2000), Terminate("KILLED", 2000)],
    ),
    "its end is in MLflow": (
        FINISHES,
        replace(ALONE, found=replace(THERE_FINISHED, files=frozenset([MODEL, BAD]))),
        [Note(True, "finished", "FINISHED", **NOTED)],
    ),
    "its end is in MLflow, and its folder says so": (
        FINISHES,
        replace(ALONE, record=CLOSED, found=THERE_FINISHED),
        [],
    ),
    "its end was delivered in this process": (
        FINISHES,
        replace(RUNNING, record=CLOSED, found=THERE_FINISHED, closed=FINISHES.ending),
        [],
    ),
    # its description
    "it has no description": (DESCRIBED, RUNNING, [TEXT]),
    "its description is not up to date": (DESCRIBED, described(OLD_TEXT), [TEXT]),
    "its description is up to date": (DESCRIBED, described(TEXT), []),
    "a person has changed its description": (
        DESCRIBED,
        described(OLD_TEXT, **{"mlflow.note.content": "mine"}),
        [],
    ),
    "a person has described it": (
        DESCRIBED,
        replace(RUNNING, found=replace(THERE, tags=TAGS | {"mlflow.note.content": "mine"})),
        [],
    ),
    "a person has removed its description, which is written again": (
        DESCRIBED,
        described(OLD_TEXT, **{"mlflow.note.content": ""}),
        [TEXT],
    ),
    "its description was refused": (DESCRIBED, replace(RUNNING, refused=frozenset([TEXT])), []),
    "its points come before its description": (
        DESCRIBED,
        replace(RUNNING, unsent=POINTS),
        [LogPoints(2, 3)],
    ),
    "it has ended, and gets its description first": (
        replace(FINISHES, description=TEXT.text),
        ALONE,
        [TEXT],
    ),
    "it had ended in this process, and gets another description": (
        replace(FINISHES, description=TEXT.text),
        replace(described(OLD_TEXT), closed=FINISHES.ending),
        [TEXT],
    ),
    "its description is too long": (
        replace(RUNS, description="d" * 9000),
        RUNNING,
        [SetDescription("d" * 8000)],
    ),
    # after a lost answer, or a kill
    "the answer to its creation was lost": (RUNS, Delivered(NEW), [FindRun(None, "identity")]),
    "its creation was lost, answer and all": (
        RUNS,
        Delivered(NEW, may_exist=False),
        [ResetRecord(None), CREATE],
    ),
    "its driver was killed and started again": (RUNS, Delivered(OPEN), [FindRun("a", "identity")]),
    "it was created twice, and ends": (FINISHES, RUNNING, [FindDuplicates("identity")]),
    "it was created twice, and the other run is kept": (
        FINISHES,
        replace(RUNNING, found=Found("b"), last={}, duplicates=("a",)),
        [ResetRecord("b")],
    ),
    "the kept run lacks everything": (
        FINISHES,
        Delivered(replace(MADE, run_id="b"), True, Found("b"), duplicates=("a",)),
        [Describe(PAIRS, (LR,)), LogArtifact(EXPERIMENT)],
    ),
    "it was created twice, and this run is kept": (
        FINISHES,
        replace(ALONE, record=CLOSED, found=THERE_FINISHED, duplicates=("b", "c")),
        [DeleteDuplicate("b"), DeleteDuplicate("c")],
    ),
    # MLflow knows less than before
    "a person deleted it": (RUNS, Delivered(OPEN, may_exist=False), [ResetRecord(None), CREATE]),
    "the database was restored from an older backup": (
        RUNS,
        replace(RUNNING, last={"loss": 0.4}),
        [ResetRecord("a")],
    ),
    "the older backup has fewer curves": (
        RUNS,
        replace(RUNNING, last={"loss": 0.5, "top1": 0.9}),
        [ResetRecord("a")],
    ),
    "its last loss was infinite, which MLflow stores as its largest number": (
        RUNS,
        replace(
            RUNNING, last={"loss": math.inf}, found=replace(THERE, metrics={"loss": 1.7976931348623157e308})
        ),
        [],
    ),
    "its last loss was NaN": (
        RUNS,
        replace(RUNNING, last={"loss": math.nan}, found=replace(THERE, metrics={"loss": math.nan})),
        [],
    ),
    "its study's run was created again": (
        replace(RUNS, parent_id="study 2"),
        RUNNING,
        [Describe((("mlflow.parentRunId", "study 2"),), ())],
    ),
    # it had ended
    "it is resumed, and its folder says that it had ended": (
        RUNS,
        replace(RUNNING, record=CLOSED, found=THERE_FINISHED),
        [Note(True)],
    ),
    "it is resumed after it had finished": (
        RUNS,
        replace(RUNNING, found=THERE_FINISHED),
        [DeleteTag("outcome"), ReopenRun()],
    ),
    "it is resumed after it had been stopped early": (
        RUNS,
        replace(RUNNING, found=THERE_EARLY),
        [DeleteTag("outcome"), DeleteTag("state"), ReopenRun()],
    ),
    "it is resumed after its driver was killed between the tag and the status": (
        RUNS,
        replace(RUNNING, found=replace(THERE, status="FINISHED")),
        [ReopenRun()],
    ),
    "it had been stopped early, and is failed": (
        replace(ended(Outcome.failed("OSError: x")), params={}),
        replace(ALONE, record=CLOSED_EARLY, found=THERE_EARLY, closed=STOPS_EARLY.ending),
        [
            LogArtifact(MODEL),
            LogArtifact(BAD),
            DeleteTag("state"),
            LogEnding((), (("outcome", "failed: OSError: x"),), 2000),
            Terminate("FAILED", 2000),
        ],
    ),
    "it ends in another way in the same process": (
        STOPS_EARLY,
        replace(RUNNING, record=CLOSED, found=THERE_FINISHED, closed=FINISHES.ending),
        [FindDuplicates("identity")],
    ),
    "the study got a better best trial": (
        ended(Outcome.finished(), best=0.9),
        replace(ALONE, record=CLOSED, found=replace(THERE_FINISHED, metrics={"loss": 0.5, "best": 0.8})),
        [LogArtifact(MODEL), LogArtifact(BAD), LogEnding((("best", 0.9),), (), 2000)],
    ),
    # an earlier version delivered less, or recorded less
    "an earlier version delivered no final values, params and data sets": (
        replace(ended(Outcome.finished(), best=0.9), params=dict([LR, ("seed", "0")]), datasets=DATASETS),
        replace(ALONE, record=CLOSED_BEFORE, found=replace(THERE_FINISHED, datasets=frozenset([TRAIN.key]))),
        [Describe((), (("seed", "0"),)), LogDatasets((VAL,))],
    ),
    "its final values are missing, and no file is sent again": (
        ended(Outcome.finished(), best=0.9),
        replace(ALONE, record=CLOSED_BEFORE, found=THERE_FINISHED),
        [LogEnding((("best", 0.9),), (), 2000)],
    ),
    "its study's run was created again after its end": (
        replace(FINISHES, parent_id="study 2"),
        replace(
            ALONE,
            record=CLOSED,
            found=replace(THERE_FINISHED, tags=THERE_FINISHED.tags | {"mlflow.parentRunId": "study 2"}),
        ),
        [Note(True, "finished", "FINISHED", VERSION, "study 2")],
    ),
    "an earlier version delivered its early stop": (
        STOPS_EARLY,
        replace(ALONE, record=replace(CLOSED_EARLY, status=None), found=THERE_EARLY_0_1),
        [LogEnding((), (("state", "PRUNED"),), 2000), Terminate("FINISHED", 2000)],
    ),
    "its early stop was brought up to date, and its folder does not say so": (
        STOPS_EARLY,
        replace(ALONE, record=replace(CLOSED_EARLY, status=None), found=THERE_EARLY),
        [Note(True, EARLY, "FINISHED", **NOTED)],
    ),
    "its early stop is up to date": (STOPS_EARLY, replace(ALONE, record=CLOSED_EARLY, found=THERE_EARLY), []),
    "an earlier version delivered that it finished": (
        FINISHES,
        replace(ALONE, record=replace(CLOSED_BEFORE, status=None), found=THERE_FINISHED),
        [Note(True, "finished", "FINISHED", **NOTED)],
    ),
    # MLflow refuses a part
    "its creation was refused": (FINISHES, Delivered(NEW, may_exist=False, refused=frozenset([CREATE])), []),
    "its parameters were refused": (
        RUNS,
        replace(
            RUNNING, found=replace(THERE, params=frozenset()), unsent=POINTS, refused=frozenset([DESCRIBE])
        ),
        [LogPoints(2, 3)],
    ),
    "some of its points were refused": (
        RUNS,
        replace(RUNNING, unsent=POINTS, refused=frozenset([LogPoints(2, 3)])),
        [LogPoints(2, 1), LogPoints(3, 1), LogPoints(4, 1)],
    ),
    "its data sets were refused": (
        replace(RUNS, datasets=DATASETS),
        replace(RUNNING, unsent=POINTS, refused=frozenset([LogDatasets(DATASETS)])),
        [LogPoints(2, 3)],
    ),
    "its model was refused": (
        FINISHES,
        replace(ALONE, refused=frozenset([LogArtifact(MODEL)])),
        [LogArtifact(BAD), END_FINISHED, Terminate("FINISHED", 2000)],
    ),
    "its points were refused, and all else is there": (  # its folder does not say that it is closed
        FINISHES,
        replace(
            ALONE,
            found=replace(THERE_FINISHED, files=frozenset([MODEL, BAD])),
            refused=frozenset([LogPoints(2, 3), LogPoints(2, 1)]),
        ),
        [],
    ),
    # values that servers cut, refuse or fail on
    "its name and values are too long": (
        replace(RUNS, name="n" * 300, tags={"note": "t\0" * 9000}),
        Delivered(NEW, may_exist=False),
        [
            ResetRecord(None),
            CreateRun("n" * 250, 1000, (("note", "t" * 8000), *PAIRS[1:])),
        ],
    ),
    "it has more parameters than a request takes": (
        replace(RUNS, params=dict(MANY)),
        RUNNING,
        [Describe((), MANY[:100]), Describe((), MANY[100:200]), Describe((), MANY[200:])],
    ),
    "its parameter is too long, and no UTF-8": (
        replace(RUNS, params={"long": "p" * 5999 + "\ud800" + "p"}),
        RUNNING,
        [Describe((), (("long", "p" * 5999 + "?"),))],
    ),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_next_requests(situation):
    desired, delivered, expected = SITUATIONS[situation]
    assert next_requests(desired, delivered) == expected


@pytest.mark.parametrize("situation", SITUATIONS)
def test_no_request_is_repeated_once_it_was_performed_or_refused(situation):
    desired, delivered, expected = SITUATIONS[situation]
    known = [request for request in expected if not isinstance(request, ASKING)]
    performed = refused = delivered
    for request in known:
        performed = after_request(performed, request)
        is_refused = isinstance(request, Refusable)
        refused = (after_refusal if is_refused else after_request)(refused, request)
    for after in (performed, refused):
        again = next_requests(desired, after)
        assert not [request for request in again if request in known]


ASKING = (ReadRecord, ReadJournal, FindRun, FindDuplicates, CreateRun)  # their answers say more


def test_a_refused_segment_leaves_a_gap_that_the_record_does_not_skip():
    delivered = replace(RUNNING, unsent=POINTS)
    together, *alone = LogPoints(2, 3), LogPoints(2, 1), LogPoints(3, 1), LogPoints(4, 1)
    delivered = after_refusal(delivered, together)
    assert (delivered.segments, delivered.unsent) == (2, POINTS)
    delivered = after_request(delivered, alone[0])
    assert (delivered.segments, delivered.record.segments) == (3, 3)
    delivered = after_refusal(delivered, alone[1])
    delivered = after_request(delivered, alone[2])
    assert (delivered.segments, delivered.record.segments) == (5, 3)  # a sync tries again from segment 3 on
    assert next_requests(RUNS, delivered) == [ReadJournal(5)]


def test_after_a_failure_a_run_that_may_have_been_created_is_looked_for_again():
    new = Delivered(NEW, may_exist=False, duplicates=())
    creating = after_request(new, ResetRecord(None))
    failed = after_failure(RUNS, creating)
    assert next_requests(RUNS, failed) == [FindRun(None, "identity")]
    assert failed.duplicates is None  # a request that seemed lost may still be performed

    assert next_requests(FINISHES, after_failure(FINISHES, ALONE)) == [FindDuplicates("identity")]
    assert (
        after_failure(RUNS, replace(RUNNING, unsent=POINTS)).found == THERE
    )  # sent again, points are the same
    half_open = replace(RUNNING, record=MADE)
    assert next_requests(RUNS, after_failure(RUNS, half_open)) == [FindRun("a", "identity")]


def test_another_database_is_asked_for_everything_again():
    gone = replace(RUNNING, record=CLOSED, closed=FINISHES.ending, is_shared=True).unknown()
    assert not gone.is_shared
    assert next_requests(FINISHES, gone) == [FindRun("a", "identity")]
    again = after_request(replace(gone, may_exist=False), ResetRecord(None))
    assert again.record == NEW
    assert (again.segments, again.unsent) == (0, None)


def test_a_trial_waits_for_its_studys_run_to_be_there_not_to_be_closed():
    study = replace(FINISHES, journal=None, parent_id=None)
    delivered = replace(RUNNING, found=THERE, last={})
    assert opening_requests(study, delivered) == []
    assert next_requests(study, delivered) == [FindDuplicates("identity")]


@pytest.mark.parametrize(
    ("outcome", "record", "is_delivered"),
    [
        (Outcome.finished(), OPEN, False),
        (Outcome.finished(), CLOSED, True),
        (Outcome.finished(), CLOSED_BEFORE, False),  # an earlier version delivered less
        (Outcome.failed("x"), replace(CLOSED, outcome="failed: x"), True),
        (Outcome.cancelled(), replace(CLOSED, outcome="cancelled"), True),
        (Outcome.stopped_early(3), CLOSED_EARLY, True),
        (Outcome.stopped_early(4), CLOSED_EARLY, False),
    ],
)
def test_a_record_says_whether_an_outcome_was_delivered(outcome, record, is_delivered):
    assert record.is_delivered(outcome) is is_delivered


def test_a_record_of_an_earlier_version_is_read(tmp_path):
    known = (
        '{"id": "i", "uri": "u", "experiment": "e", "run_id": "r", "described": true, "segments": 7, '
        '"outcome": "cancelled"}'
    )
    (tmp_path / "tracking.json").write_text(known)
    assert Record.read(str(tmp_path)) == Record("i", "u", "e", "r", True, 7, "cancelled", None)
    assert Record.read(str(tmp_path / "none")) is None


def test_a_data_set_is_identified_by_its_images_and_by_what_is_held_out_of_them():
    names = [(found.name, found.digest) for found in DATASETS]
    assert names == [("digits train", "f" * 32 + "-0.1"), ("digits val", "f" * 32 + "-0.1")]
    test = Dataset.of("s3://bucket/digits/", "f" * 64, "test", 0.1, None)
    assert test.key == ("digits test", "f" * 36)
