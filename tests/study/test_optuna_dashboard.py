"""optuna-dashboard opens a local study as it is, and a study on an object store after a copy."""

import pytest
from optuna_dashboard import wsgi
from werkzeug.test import Client

from deit_ray.outcome import Outcome
from deit_ray.study.study import Study
from tests.support.commands import call
from tests.support.studies import end_trial


@pytest.fixture
def make_ended(experiment):
    """Makes a study of two trials that have ended, with results in some place."""

    def make(**place) -> Study:
        space = {"search.space": {"optim.lr": {"log": [3e-4, 1e-2]}}}
        keys = {"name": "made", "distillation.kind": "none", "search.metric": "val/top1_ema"}
        study = Study.create(experiment("digits_student", keys | space | place))
        with study.driving():
            end_trial(study, Outcome.finished(), 0.75)
            end_trial(study, Outcome.stopped_early(3), 0.5)
        return study

    return make


def test_its_api_lists_a_local_study(make_ended):
    study = make_ended()
    assert listed(f"sqlite:///{study.folder}/study.db") == expected(study)
    assert Study.open("made", study.experiment.results.uri).best().number == 0  # it is still ours


def test_its_api_lists_a_copy_of_a_study_on_an_object_store(make_ended, bucket, tmp_path):
    study = make_ended(**{"results.uri": f"{bucket}/results"})
    copied = call("ui", "--results", f"{bucket}/results", "--optuna", tmp_path / "copy.db")
    address = copied.out.split()[-1]
    assert address == f"sqlite:///{tmp_path}/copy.db"
    assert listed(address) == expected(study)


def listed(address: str) -> dict[str, list[tuple]]:
    """(number, state, value) of the trials of each study, as the dashboard's API gives them."""
    client = Client(wsgi(address))
    studies = client.get("/api/studies").json["study_summaries"]
    return {
        study["study_name"]: [
            (trial["number"], trial["state"], (trial.get("values") or [None])[0])
            for trial in client.get(f"/api/studies/{study['study_id']}?after=0").json["trials"]
        ]
        for study in studies
    }


def expected(study: Study) -> dict[str, list[tuple]]:
    states = {"COMPLETE": "Complete", "PRUNED": "Pruned"}
    return {study.name: [(trial.number, states[trial.state.name], trial.value) for trial in study.records()]}
