"""The two private names of Optuna that this project uses; tests/study/test_optuna_private.py checks them."""

import optuna
from optuna.trial import FrozenTrial, Trial


def read_trial(study: optuna.Study, number: int) -> FrozenTrial:
    """One trial as the database has it now.

    Reads `Study._storage` and `Study._study_id`, because the public `Study.get_trials` reads and sorts all
    trials. Once these names are gone, return `study.get_trials(deepcopy=False)[number]`, which is slower.
    """
    return study._storage.get_trial(_trial_id(study, number))


def open_trial(study: optuna.Study, number: int) -> Trial:
    """A running trial, to write to it.

    Reads the same two names, because `Study.ask` gives a `Trial` only to the process that asked for it, and
    a resumed study continues trials that another process asked for. Once they are gone, make an
    `RDBStorage` for `optuna.create_study` and ask it for the ids: its methods are public.
    """
    return Trial(study, _trial_id(study, number))


def _trial_id(study: optuna.Study, number: int) -> int:
    return study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
