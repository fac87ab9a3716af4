"""Checks the private names of Optuna in study/optuna_private.py: this finds what a new version breaks."""

import inspect
import re
from pathlib import Path

import optuna
import pytest
from optuna.storages import BaseStorage
from optuna.trial import Trial, TrialState

from deit_ray.study.optuna_private import open_trial, read_trial
from tests.conftest import ROOT


@pytest.fixture(params=["memory", "database"])
def study(request, tmp_path) -> optuna.Study:
    return optuna.create_study(
        storage=None if request.param == "memory" else f"sqlite:///{tmp_path}/study.db"
    )


def test_a_study_has_a_storage_and_an_id(study):
    assert isinstance(study._storage, BaseStorage)
    assert isinstance(study._study_id, int)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (BaseStorage.get_trial, ["self", "trial_id"]),
        (BaseStorage.get_trial_id_from_study_id_trial_number, ["self", "study_id", "trial_number"]),
        (Trial.__init__, ["self", "study", "trial_id"]),
    ],
)
def test_the_signatures_are_known(function, parameters):
    assert list(inspect.signature(function).parameters) == parameters


def test_a_trial_is_read_and_written_by_its_number(study):
    study.ask()
    study.ask().report(0.5, 1)
    assert read_trial(study, 1).intermediate_values == {1: 0.5}
    open_trial(study, 1).report(0.7, 2)
    open_trial(study, 1).set_user_attr("key", "value")
    found = study.trials[1]
    assert (found.intermediate_values, found.user_attrs) == ({1: 0.5, 2: 0.7}, {"key": "value"})
    assert study.trials[0].intermediate_values == {}
    study.tell(1, 0.7)
    assert read_trial(study, 1).state == TrialState.COMPLETE


def test_a_number_without_a_trial_is_an_error(study):
    with pytest.raises(KeyError):
        read_trial(study, 0)


def test_no_other_file_uses_private_names_of_optuna():
    private = re.compile(r"\._(storage|study_id|trial_id|suggest)\b")
    files = [path for path in Path(ROOT, "deit_ray").rglob("*.py") if private.search(path.read_text())]
    # Ray Tune's Trainable has a `_storage` too
    assert {path.name for path in files} == {"optuna_private.py", "train_private.py"}
