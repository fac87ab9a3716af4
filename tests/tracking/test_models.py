"""The next requests about models in every situation of a run: a table, without a server."""

from dataclasses import replace

import pytest

from deit_ray.outcome import Outcome
from deit_ray.tracking.model_state import Best, FoundModel, Registered, Version, Weights
from deit_ray.tracking.models import (
    CreateModel,
    CreateRegistered,
    CreateVersion,
    DeleteModel,
    DeleteVersion,
    FindModel,
    FindRegistered,
    FinishModel,
    LinkModel,
    LogModelMetrics,
    SetAlias,
    TagVersions,
    UploadModel,
    after_failure,
    after_request,
    best_of,
    model_name,
    next_requests,
    versions_text,
)
from deit_ray.tracking.requests import Note, Terminate, after_refusal
from deit_ray.tracking.tracked import VERSION, Delivered, Desired, Ending, Found, Record, Run

FOLDER = "/r/s-1/trial-0007"
FILE, EXPERIMENT = f"{FOLDER}/model.safetensors", f"{FOLDER}/experiment.yaml"
IDENTITY = "identity-epoch-3"
TAGS = {"deit_ray.study": "s-1", "deit_ray.folder": FOLDER, "deit_ray.kind": "trial"}
ENDING = Ending(Outcome.finished(), (), {"best/val_top1": 0.5}, 2000, model=Weights(FILE, "epoch-3"))
TRIAL = Desired("trial 007", FOLDER, TAGS, {"optim.lr": "0.001"}, None, 1000, ENDING)
OPEN = Record("identity", "http://mlflow", "tests", run_id="a", described=True)
THERE = Found(
    "a",
    "FINISHED",
    {"deit_ray.id": "identity", "outcome": "finished", **TAGS},
    frozenset(["optim.lr"]),
    {"best/val_top1": 0.5},
)
ENDED = Delivered(OPEN, True, THERE, duplicates=())  # all but its model was delivered

CREATE = CreateModel(
    "s-1-trial-0007",
    (
        ("deit_ray.id", IDENTITY),
        ("deit_ray.run", "identity"),
        ("deit_ray.study", "s-1"),
        ("deit_ray.folder", FOLDER),
    ),
    (("optim.lr", "0.001"),),
)
METRICS = (("best/val_top1", 0.5),)
MADE = FoundModel("m-1", "/mlruns/m-1")
UPLOADED = replace(MADE, is_uploaded=True)
WHOLE = FoundModel("m-1", "/mlruns/m-1", is_ready=True, is_linked=True, metrics=frozenset(METRICS))
CLOSE = Note(True, "finished", "FINISHED", VERSION)
CLOSED = replace(OPEN, outcome="finished", status="FINISHED", version=VERSION)

BEST = Best(IDENTITY, "m-1", "/mlruns/m-1", "a", "trial 007")
STUDY = replace(TRIAL, name="s-1", folder="/r/s-1", params={}, ending=replace(ENDING, model=None), best=BEST)
OWN_TAGS = (("deit_ray.id", "identity"), ("deit_ray.study", "s-1"), ("deit_ray.folder", FOLDER))
FIRST = Version("1", IDENTITY, "m-1")
TAG, TAG_2, TAG_9 = (f'[{{"name": "s-1", "version": {number}}}]' for number in (1, 2, 9))
REGISTERED = Registered("s-1", True, (FIRST,), "1", TAG, is_linked=True)


def registers(**changes) -> Delivered:
    return replace(ENDED, registered=replace(REGISTERED, **changes))


SITUATIONS = {
    # the model of a run
    "it has ended, and nothing is known of its model": (TRIAL, ENDED, [FindModel(IDENTITY, FILE)]),
    "its end is not delivered": (
        TRIAL,
        replace(ENDED, found=replace(THERE, status="RUNNING")),
        [Terminate("FINISHED", 2000)],
    ),
    "it has not finished": (replace(TRIAL, ending=replace(ENDING, model=None)), ENDED, [CLOSE]),
    "it runs": (
        replace(TRIAL, ending=None),
        replace(ENDED, found=replace(THERE, status="RUNNING", tags=TAGS | {"deit_ray.id": "identity"})),
        [],
    ),
    "MLflow has no model": (TRIAL, replace(ENDED, model=FoundModel()), [CREATE]),
    "there is no file": (TRIAL, replace(ENDED, model=FoundModel(has_file=False)), [CLOSE]),
    "its model was created": (
        TRIAL,
        replace(ENDED, model=MADE),
        [UploadModel("m-1", "/mlruns/m-1", FILE, EXPERIMENT)],
    ),
    "its files are there": (
        TRIAL,
        replace(ENDED, model=UPLOADED),
        [LinkModel("m-1"), LogModelMetrics("m-1", METRICS, 2000), FinishModel("m-1")],
    ),
    "its driver was killed before it had said that the model is whole": (
        TRIAL,
        replace(ENDED, model=replace(WHOLE, is_ready=False)),
        [UploadModel("m-1", "/mlruns/m-1", FILE, EXPERIMENT)],
    ),
    "its model is there": (TRIAL, replace(ENDED, model=WHOLE), [CLOSE]),
    "its model is there, and its folder says so": (
        TRIAL,
        replace(ENDED, model=WHOLE, record=CLOSED),
        [],
    ),
    "an earlier version had delivered its end": (
        TRIAL,
        replace(ENDED, record=CLOSED),
        [FindModel(IDENTITY, FILE)],
    ),
    "it was delivered in this process": (TRIAL, replace(ENDED, closed=ENDING), []),
    "its model was created twice": (
        TRIAL,
        replace(ENDED, model=replace(WHOLE, others=("m-2", "m-3"))),
        [DeleteModel("m-2"), DeleteModel("m-3")],
    ),
    "MLflow has only the model of its deleted run": (
        TRIAL,
        replace(ENDED, model=FoundModel(others=("m-0",))),
        [CREATE],
    ),
    "the creation was refused": (
        TRIAL,
        replace(ENDED, model=FoundModel(), refused=frozenset([CREATE])),
        [],  # its record stays open for a sync
    ),
    # the registered model of a study
    "the study's best model is not in MLflow": (replace(STUDY, best=None), ENDED, [CLOSE]),
    "nothing is known of the registered model": (STUDY, ENDED, [FindRegistered("s-1", "identity", "m-1")]),
    "there is none": (
        STUDY,
        replace(ENDED, registered=Registered("s-1")),
        [CreateRegistered("s-1", "s-1", OWN_TAGS)],
    ),
    "its name is another study's": (
        STUDY,
        replace(ENDED, registered=Registered("s-1-identity")),
        [CreateRegistered("s-1-identity", "s-1", OWN_TAGS)],
    ),
    "it has no version": (
        STUDY,
        registers(versions=(), best=None, versions_tag="", is_linked=False),
        [CreateVersion("s-1", BEST)],
    ),
    "its version was made": (
        STUDY,
        registers(best=None, versions_tag="", is_linked=False),
        [LinkModel("m-1"), TagVersions("m-1", TAG), SetAlias("s-1", "1")],
    ),
    "the best model is registered": (STUDY, registers(), [CLOSE]),
    "a resumed study has another best": (
        STUDY,
        registers(versions=(Version("1", "other-epoch-2", "m-0"),), versions_tag="", is_linked=False),
        [CreateVersion("s-1", BEST)],
    ),
    "its new version was made": (
        STUDY,
        registers(versions=(Version("1", "other-epoch-2", "m-0"), replace(FIRST, number="2"))),
        [TagVersions("m-1", TAG_2), SetAlias("s-1", "2")],
    ),
    "its version was made twice": (
        STUDY,
        registers(versions=(replace(FIRST, number="10"), replace(FIRST, number="9")), best="9"),
        [
            TagVersions("m-1", TAG_9),
            DeleteVersion("s-1", "10"),
        ],
    ),
    "the model of its version was deleted, and made again": (
        STUDY,
        registers(versions=(replace(FIRST, model_id="m-0"),)),
        [CreateVersion("s-1", BEST)],
    ),
    "its version of the new model was made": (
        STUDY,
        registers(versions=(replace(FIRST, model_id="m-0"), replace(FIRST, number="2"))),
        [
            TagVersions("m-1", TAG_2),
            SetAlias("s-1", "2"),
            DeleteVersion("s-1", "1"),
        ],
    ),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_next_requests(situation):
    desired, delivered, expected = SITUATIONS[situation]
    assert next_requests(desired, delivered) == expected


ANSWERED = (FindModel, FindRegistered, CreateModel, CreateVersion, Note, Terminate)  # not by `after_request`


@pytest.mark.parametrize("situation", SITUATIONS)
def test_no_request_is_repeated_once_it_was_performed_or_refused(situation):
    desired, delivered, expected = SITUATIONS[situation]
    known = [request for request in expected if not isinstance(request, ANSWERED)]
    performed = refused = delivered
    for request in known:
        performed, refused = after_request(performed, request), after_refusal(refused, request)
    for after in (performed, refused):
        assert not [request for request in next_requests(desired, after) if request in known]


def test_after_a_failure_models_are_looked_for_again():
    for delivered in (replace(ENDED, model=WHOLE), registers()):
        assert (after_failure(delivered).model, after_failure(delivered).registered) == (None, None)


def test_only_a_whole_model_is_registered():
    run = Run(TRIAL)
    for found, best in ((None, None), (FoundModel(), None), (UPLOADED, None), (WHOLE, BEST)):
        made = best_of(run.desired, replace(ENDED, model=found))
        assert made == (best and replace(best, tags=OWN_TAGS[1:]))


def test_names_and_tags_are_as_mlflow_takes_them():
    assert model_name("s3://b/my.study_1-2/trial-0007") == "my-study_1-2-trial-0007"
    assert versions_text(replace(REGISTERED, versions_tag='[{"name": "mine", "version": 4}]'), FIRST) == (
        '[{"name": "mine", "version": 4}, {"name": "s-1", "version": 1}]'
    )
