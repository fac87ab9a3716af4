"""A study: its folder, its database, its driver, and what can be read from it at any time."""

import contextlib
import hashlib
import posixpath
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd
from optuna.trial import TrialState

from deit_ray import storage
from deit_ray.accuracy import show_accuracy
from deit_ray.errors import UserError
from deit_ray.experiment.added import with_added_keys
from deit_ray.experiment.config import Experiment, flatten
from deit_ray.experiment.load import dump_experiment
from deit_ray.results.folders import (
    BEST,
    EXPERIMENT,
    MODEL,
    experiment_of,
    new_folder,
    recorded,
    runs_of,
    trial_name,
)
from deit_ray.results.removal import KEPT, remove_checkpoints, remove_unlisted
from deit_ray.study.database import StudyDatabase, is_study
from deit_ray.study.leaderboard import leaderboard
from deit_ray.study.records import StudyRecord, TrialRecord

if TYPE_CHECKING:  # torch takes seconds to import, and most commands do not need it
    from torch import nn

    from deit_ray.study.story import Story
    from deit_ray.training.view import EvaluationView

REQUESTS = "stop"  # a folder: a file for each trial that is to be stopped, or one for the whole study
WHOLE = "study"
REMOVERS = 4  # trials whose checkpoints are removed at once; each may hold a model in memory
LOOK_S = 5.0  # between two looks for stop requests on an object store
SIGNATURE, DIGEST = "# Written by deit-ray; a file that was changed is kept. Digest: ", 16  # of best.yaml
AMENDABLE = (
    "search.trials",
    "search.budget",
    "search.max_concurrent",
    "train.max_failures",
    "tracking",
    "cost",
    "results.keep",
)


class Study(StudyRecord):
    """A search over an experiment, finished or not.

    Attributes:
        name: name of the study.
        folder: URI of its results.
        experiment: the experiment that it searches.
        database: its database. Only the driver writes it.
    """

    def __init__(self, folder: str, experiment: Experiment):
        self.folder, self.experiment = folder, experiment
        self.name = posixpath.basename(folder)
        self.database = StudyDatabase(folder, self.name)
        self.looked = 0.0  # when the driver looked for stop requests
        super().__init__(self.database.optuna, self.database.as_one)

    @classmethod
    def create(cls, experiment: Experiment) -> "Study":
        study = cls(new_folder(experiment), experiment)
        study.made_with = experiment.as_dict()
        return study

    @classmethod
    def open(cls, name: str, results: str = "results") -> "Study":
        """An existing study by its name, such as digits_search-1, or digits_search for the newest.

        Raises:
            UserError: there is no such study, or its experiment file was changed since it was made.
        """
        found = [run for run in runs_of(name, results) or [name] if is_study(storage.join(results, run))]
        if not found:
            known = [run for run in storage.list_names(results) if is_study(storage.join(results, run))]
            raise UserError(f"{name}: no such study in {results}; there are: {', '.join(known) or 'none'}")
        folder = storage.join(storage.absolute(results), found[-1])
        study = cls(folder, experiment_of(folder))
        made_with = study.made_with
        if made_with is not None:  # None if its driver was killed before it began
            _check_same(storage.join(folder, EXPERIMENT), study.experiment.as_dict(), made_with)
        return study

    def amended(self, overrides: dict) -> Experiment:
        """The experiment with values replaced. Only the keys in `AMENDABLE` may change: they affect no trial.

        Raises:
            UserError: another key is named, or a value is not allowed; or the study was made without a key
                that `added.ADDED_KEYS` does not know, so that old and new trials could not be compared.
        """
        here = flatten(self.experiment.as_dict())
        there = flatten(with_added_keys(self.made_with or self.experiment.as_dict()))
        if unknown := sorted(here.keys() - there.keys()):
            key = unknown[0]
            raise UserError(
                f"{self.name}: was made by a version of deit_ray without {key}, which would now be "
                f"{here[key]!r}; resume it with that version (origin.json in its folder names the version), "
                "or begin a new study"
            )
        for key in overrides:
            if not _amendable(key):
                raise UserError(
                    f"--set {key}: cannot change in an existing study, since its trials could not be "
                    f"compared; allowed are: {', '.join(AMENDABLE)}"
                )
        return recorded(self.folder, {"results.uri": self.experiment.results.uri, **overrides})

    def amend(self, overrides: dict) -> None:
        """Replaces the study's experiment by `amended`. Only the study's driver may call it."""
        if overrides:
            self.experiment = self.amended(overrides)
            storage.write_bytes(
                storage.join(self.folder, EXPERIMENT), dump_experiment(self.experiment).encode()
            )

    def driving(self) -> contextlib.AbstractContextManager:
        """Only this process drives the study; see `StudyDatabase.driving`."""
        return self.database.driving()

    def driver(self) -> dict | None:
        """The process that drives the study now: its host, pid and start time; None if there is none."""
        return self.database.driver()

    def request_stop(self, number: int | None = None) -> None:
        """Asks the driver, from any process, to cancel a trial; without a number, to end the study."""
        name = WHOLE if number is None else str(number)
        storage.write_bytes(storage.join(self.folder, REQUESTS, name), b"")

    def take_stop_requests(self) -> list[int | None]:
        """The stop requests since the last call: each a trial's number, or None. Only the driver calls it.

        On an object store, where each look costs a request, most calls do not look.
        """
        if not storage.is_local(self.folder) and time.monotonic() - self.looked < LOOK_S:
            return []
        self.looked = time.monotonic()
        names = storage.list_names(storage.join(self.folder, REQUESTS))
        names = [name for name in names if name == WHOLE or name.isdigit()]
        for name in names:
            storage.remove(storage.join(self.folder, REQUESTS, name))
        return [None if name == WHOLE else int(name) for name in names]

    def trial_folder(self, number: int) -> str:
        return storage.join(self.folder, trial_name(number))

    def trial_experiment(self, params: dict) -> Experiment:
        """The experiment of one trial: the study's, with the trial's values and without a search space."""
        return self.experiment.with_overrides({**params, "search.space": {}})

    def leaderboard(self, records: list[TrialRecord] | None = None) -> pd.DataFrame:
        """All trials, best first; see `leaderboard.leaderboard`.

        Args:
            records: all trials, if they were read already.
        """
        return leaderboard(self.records() if records is None else records, list(self.experiment.search.space))

    def trials(self) -> pd.DataFrame:
        """All trials, by number; see `tables.trials_frame`."""
        from deit_ray.study import tables

        return tables.trials_frame(self.story())

    def curves(self) -> pd.DataFrame:
        """Every point that the trials have measured; see `tables.curves_frame`."""
        from deit_ray.study import tables

        return tables.curves_frame(self.folder, self.records())

    def story(self) -> "Story":
        """What the study has found and cost, and how it continues; a notebook shows it as MLflow does."""
        from deit_ray.study.story import tell

        return tell(self)

    def load_model(self, trial: int | None = None) -> "tuple[nn.Module, EvaluationView]":
        """The model of a trial, with its weights, and the transform that makes its input from an image.

        Args:
            trial: number of a trial; by default the best one.

        Returns:
            (timm model in evaluation mode, on the CPU; transform). The transform turns a PIL image into
            float32 [3, size, size]; its attribute `classes` has the names of the logits. So
            `model(transform(image)[None]).softmax(1)` are the probabilities of `deit-ray predict`.

        Raises:
            UserError: there is no such trial, no trial has finished, or the trial has no model.
        """
        number = self.best().number if trial is None else trial
        model = storage.join(self.trial_folder(number), MODEL)
        if not storage.exists(model):
            known = [str(record.number) for record in self.records(TrialState.COMPLETE)]
            raise UserError(
                f"{self.name}: trial {number} has no model; finished trials have one: "
                f"{', '.join(known) or 'none yet'}"
            )
        from deit_ray.models.weights import load_described
        from deit_ray.training.view import EvaluationView

        network, described = load_described(storage.fetch(model))
        return network.eval(), EvaluationView(described)

    def remove_checkpoints(self) -> None:
        """Removes the checkpoints that an ended study does not keep; see `results.keep`. May be repeated."""
        folders = [self.trial_folder(number) for number in self.leaderboard()["trial"]]
        kept = len(folders) if self.experiment.results.keep == "all" else KEPT
        remove = partial(remove_checkpoints, metric=self.experiment.search.metric)
        with ThreadPoolExecutor(REMOVERS, thread_name_prefix="remove") as pool:
            list(pool.map(remove_unlisted, folders[:kept]))
            list(pool.map(remove, folders[kept:]))

    def find_best(self, records: list[TrialRecord] | None = None) -> TrialRecord | None:
        """The finished trial with the best value; None if no trial has finished.

        Args:
            records: all trials, if they were read already.
        """
        finished = self.records(TrialState.COMPLETE) if records is None else records
        finished = [trial for trial in finished if trial.state == TrialState.COMPLETE]
        return max(finished, key=lambda trial: trial.best, default=None)  # of equal ones, the first

    def tested_best(self, records: list[TrialRecord] | None = None) -> dict[str, float]:
        """The best trial's metrics on the test images; empty if they were not measured.

        Args:
            records: all trials, if they were read already.
        """
        best, tested = self.find_best(records), self.tested
        return tested.metrics if best and tested and tested.trial == best.number else {}

    def best(self) -> TrialRecord:
        """The finished trial with the best value.

        Raises:
            UserError: no trial has finished.
        """
        best = self.find_best()
        if best is None:
            raise UserError(f"{self.name}: no trial has finished yet, so there is no best one")
        return best

    def save_best(self, warn: Callable[[str], None] = lambda text: None) -> tuple[str, str]:
        """Writes best.yaml and model.safetensors into the study's folder; returns their URIs.

        Files of these names that a person has changed are kept under other names.

        Args:
            warn: called with a line about each file that is kept.
        """
        best = self.best()
        experiment = self.trial_experiment(best.params).with_overrides(
            {"name": f"{self.experiment.name}_best"}
        )
        value = f"{self.experiment.search.metric} {show_accuracy(best.value, best.images, best.choices)}"
        text = dump_experiment(
            experiment,
            f"The best of {self.name}: trial {best.number}, {value}.\nTrain it again: deit-ray train FILE",
        )
        config, model = storage.join(self.folder, BEST), storage.join(self.folder, MODEL)
        replace_file(config, signed(text), is_unchanged, warn)
        weights = storage.read_bytes(storage.join(self.trial_folder(best.number), MODEL))
        replace_file(model, weights, self._has_weights, warn)
        return config, model

    def _has_weights(self, weights: bytes) -> bool:
        """Whether weights are those that a trial has saved."""
        models = [storage.join(self.trial_folder(trial.number), MODEL) for trial in self.records()]
        return any(storage.exists(model) and storage.read_bytes(model) == weights for model in models)


def signed(text: str) -> bytes:
    """The content of a file whose first line is a digest of the rest: it shows changes by a person."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:DIGEST]
    return f"{SIGNATURE}{digest}\n{text}".encode()


def is_unchanged(content: bytes) -> bool:
    """Whether a content is as `signed` made it."""
    first, _, rest = content.partition(b"\n")
    return first.startswith(SIGNATURE.encode()) and signed(rest.decode(errors="replace")) == content


def replace_file(
    uri: str, content: bytes, is_ours: Callable[[bytes], bool], warn: Callable[[str], None]
) -> None:
    """Writes a file. If another content is there that is not ours, it is kept under another name."""
    if storage.exists(uri):
        before = storage.read_bytes(uri)
        if before == content:
            return
        if not is_ours(before):
            warn(f"{uri} is not as this version wrote it: it is kept as {storage.set_aside(uri, 'kept')}")
    storage.write_bytes(uri, content)


def names_of_studies(results: str) -> list[str]:
    """The names of the studies in a results folder."""
    return [name for name in storage.list_names(results) if is_study(storage.join(results, name))]


def _check_same(path: str, found: dict, made_with: dict) -> None:
    here, there = flatten(found), flatten(with_added_keys(made_with))
    searched = {key for key in here if key.startswith("search.space.")}
    keys = there.keys() | searched  # for keys that neither knows see `Study.amended`
    may_differ = {key for key in keys if _amendable(key)} | {"results.uri"}  # people move folders
    changed = [key for key in keys - may_differ if here.get(key) != there.get(key)]
    if changed:
        key, more = min(changed), f" ({len(changed)} keys differ)" if len(changed) > 1 else ""
        raise UserError(
            f"{path}: {key}: {here.get(key)!r}, but the study in this folder was made with {there.get(key)!r}"
            f"{more}; put back the file of this study"
        )


def _amendable(key: str) -> bool:
    return any(key == allowed or key.startswith(allowed + ".") for allowed in AMENDABLE)
