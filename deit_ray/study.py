"""A study's memory: its folder, its Optuna database, and what can be read from them at any time."""

import posixpath

import optuna
import pandas as pd
from optuna.trial import TrialState

from deit_ray import report, storage
from deit_ray.config import Experiment
from deit_ray.errors import UserError
from deit_ray.load import dump_experiment, load_experiment
from deit_ray.run import EXPERIMENT, MODEL, new_folder, runs_of
from deit_ray.space import Distribution

DATABASE = "study.db"


class Study:
    """A search over an experiment, finished or not.

    Attributes:
        name: of the study.
        folder: URI of its results.
        experiment: what it searches.
        optuna: the Optuna study.
    """

    def __init__(self, folder: str, experiment: Experiment):
        self.folder, self.experiment = folder, experiment
        self.name = posixpath.basename(folder)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.optuna = optuna.create_study(
            study_name=self.name,
            storage=f"sqlite:///{storage.join(folder, DATABASE)}",
            direction="maximize",
            load_if_exists=True,
        )

    @classmethod
    def create(cls, experiment: Experiment) -> "Study":
        study = cls(new_folder(experiment), experiment)
        base = {key: experiment.get(key) for key in experiment.search.space}
        if all(_contains(experiment.search.space[key], value) for key, value in base.items()):
            study.optuna.enqueue_trial(base)  # the first trial is the file's own values
        return study

    @classmethod
    def open(cls, name: str, results: str = "results") -> "Study":
        """An existing study by its name, such as digits_search-1, or digits_search for the newest.

        Raises:
            UserError: there is none.
        """
        found = [run for run in runs_of(name, results) or [name] if storage.exists(storage.join(results, run, DATABASE))]
        if not found:
            known = [n for n in storage.list_names(results) if storage.exists(storage.join(results, n, DATABASE))]
            raise UserError(f"{name}: no such study in {results}; there are: {', '.join(known) or 'none'}")
        folder = storage.join(storage.absolute(results), found[-1])
        return cls(folder, load_experiment(storage.join(folder, EXPERIMENT)))

    def trial_folder(self, number: int) -> str:
        return storage.join(self.folder, f"trial-{number:04d}")

    def trial_experiment(self, params: dict) -> Experiment:
        """The experiment of one trial: the study's with the searched values set and nothing left to search."""
        return self.experiment.with_overrides({**params, "search.space": {}})

    def leaderboard(self) -> pd.DataFrame:
        """All trials, best first; see `report.leaderboard`."""
        return report.leaderboard(self.optuna, list(self.experiment.search.space))

    def best(self) -> optuna.trial.FrozenTrial:
        """The trial with the best value among those of full length.

        Raises:
            UserError: no trial has finished.
        """
        finished = [t for t in self.optuna.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
        if not finished:
            raise UserError(f"{self.name}: no trial has finished yet, so there is no best one")
        return max(finished, key=lambda t: t.value)

    def save_best(self) -> tuple[str, str]:
        """Writes best.yaml and model.safetensors into the study's folder; returns their URIs."""
        best = self.best()
        experiment = self.trial_experiment(best.params).with_overrides({"name": f"{self.experiment.name}_best"})
        value = f"{self.experiment.search.metric} {best.value:.4f}"
        text = dump_experiment(experiment, f"The best of {self.name}: trial {best.number}, {value}.\nTrain it anew: deit-ray train FILE")
        config, model = storage.join(self.folder, "best.yaml"), storage.join(self.folder, MODEL)
        storage.write_bytes(config, text.encode())
        storage.write_bytes(model, storage.read_bytes(storage.join(self.trial_folder(best.number), MODEL)))
        return config, model


def list_studies(results: str) -> list[tuple[str, dict[str, int]]]:
    """The studies in a results folder, each with the number of its trials by state."""
    found = []
    for name in storage.list_names(results):
        if storage.exists(storage.join(results, name, DATABASE)):
            states = Study.open(name, results).leaderboard()["state"]
            found.append((name, dict(states.value_counts())))
    return found


def _contains(d: Distribution, value) -> bool:
    return value in d.values if d.kind == "choice" else d.values[0] <= value <= d.values[1]
