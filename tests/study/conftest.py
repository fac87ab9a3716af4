"""A study that was never run, to tell its story."""

import pytest
from optuna.trial import FrozenTrial

from deit_ray.study.study import Study
from tests.support.studies import told_study


@pytest.fixture
def make_told(experiment):
    """Makes a study with some trials of 30 epochs, in a database in memory."""
    keys = {
        "name": "made",
        "distillation.kind": "none",
        "train.epochs": 30,
        "search.trials": 1000,
        "search.grace_epochs": 5,
    }

    def make(trials: list[FrozenTrial], ended: str | None) -> Study:
        space = {"optim.lr": {"log": [1e-5, 1e-1]}}
        study = Study.create(experiment("digits_student", keys | {"search.space": space}))
        known, searched = study.experiment.search.space, {key for trial in trials for key in trial.params}
        known.update(dict.fromkeys(sorted(searched), known["optim.lr"]))
        return told_study(study, trials, ended)

    return make
