"""The searcher: a trial's values follow from its number, whatever happened before."""

import optuna
import pytest
from ray.tune.search import Searcher

from deit_ray.study.searcher import StudySearcher

SPACE = {
    "augment.strength": {"float": [0, 2]},
    "optim.lr": {"log": [3e-4, 1e-2]},
    "student.depth": {"int": [2, 6]},
}


@pytest.fixture
def searcher_of(experiment):
    def make(study, **keys):
        fixed = {"distillation.kind": "none", "search.space": SPACE, "search.trials": 6}
        return StudySearcher(
            study, experiment("digits_student", fixed | keys), lambda number: f"trial-{number}"
        )

    return make


def draw(searcher: StudySearcher, count: int) -> list[dict]:
    return [searcher.suggest(f"tune-{k}") for k in range(count)]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_study_resumed_after_any_trial_draws_what_an_undisturbed_one_draws(searcher_of, tmp_path, sampler):
    keys = {"search.sampler": sampler}
    undisturbed = draw(searcher_of(optuna.create_study(), **keys), 6)
    resumed = []
    for _ in range(6):  # a new process each time
        study = optuna.create_study(
            storage=f"sqlite:///{tmp_path}/study.db", study_name="s", load_if_exists=True
        )
        resumed += draw(searcher_of(study, **keys), 1)
    assert resumed == undisturbed
    assert len({config["optim.lr"] for config in undisturbed}) == 6


@pytest.mark.parametrize("already_drawn", [0, 1, 2])
def test_a_driver_killed_while_it_asked_leaves_a_trial_that_gets_the_values_it_would_have_had(
    searcher_of, already_drawn
):
    keys = {"search.sampler": "random"}
    expected = draw(searcher_of(optuna.create_study(), **keys), 3)[2]
    study = optuna.create_study()
    searcher = searcher_of(study, **keys)
    draw(searcher, 2)
    number = study._storage.create_new_trial(study._study_id)
    for key in list(SPACE)[:already_drawn]:
        distribution = searcher.space[key]
        study._storage.set_trial_param(
            number, key, distribution.to_internal_repr(expected[key]), distribution
        )
    searcher.complete(2)
    assert study.trials[2].params == {key: expected[key] for key in SPACE}


def test_the_first_trial_has_the_files_own_values_where_they_lie_in_the_space(searcher_of, experiment):
    first = draw(searcher_of(optuna.create_study()), 1)[0]
    assert (first["augment.strength"], first["optim.lr"], first["student.depth"]) == (1.0, 2e-3, 4)
    outside = draw(searcher_of(optuna.create_study(), **{"optim.lr": 0.5}), 1)[0]
    assert 3e-4 <= outside["optim.lr"] <= 1e-2


def test_the_searcher_waits_while_trials_run_that_may_have_to_be_continued(searcher_of):
    study = optuna.create_study()
    searcher = searcher_of(study, **{"search.trials": 2})
    draw(searcher, 2)
    assert searcher.suggest("tune-2") is None
    searcher.on_trial_complete("tune-0")
    searcher.on_trial_complete("tune-1", error=True)
    searcher.put_back(1)  # its process died
    assert searcher.suggest("tune-3")["number"] == 1
    searcher.on_trial_complete("tune-3")
    assert searcher.suggest("tune-4") == Searcher.FINISHED
