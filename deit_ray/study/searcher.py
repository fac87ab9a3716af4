"""Proposes the next trial: an Optuna study as a searcher of Ray Tune, and the samplers."""

import contextlib
from collections.abc import Callable, Iterable

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from deit_ray import rng
from deit_ray.experiment.config import Experiment
from deit_ray.experiment.space import Distribution, Refusal, combinations_of, size_of
from deit_ray.results.folders import saved_steps
from deit_ray.study.optuna_private import open_trial, read_trial
from deit_ray.study.records import AsOne

MOST_LISTED = 1024  # combinations of a space in which no trial repeats an earlier one


class StudySearcher(Searcher):
    """Proposes a study's waiting trials first, then new ones. The `Driver` ends trials, not the searcher.

    Args:
        study: the Optuna study.
        experiment: the experiment whose search space is searched.
        folder_of: gives the results folder of a trial's number.
        refusal: says why a trial with some searched values cannot run; None if it can. By default all can.
        refused: called with the number of a trial that cannot run, and the reason, instead of proposing it.
        as_one: entered while a trial is drawn; see `StudyDatabase.as_one`.
    """

    def __init__(
        self,
        study: optuna.Study,
        experiment: Experiment,
        folder_of: Callable[[int], str],
        refusal: Refusal = lambda params: None,
        refused: Callable[[int, str], None] = lambda number, why: None,
        as_one: AsOne = contextlib.nullcontext,
    ):
        super().__init__(metric=experiment.search.metric, mode="max")
        self.study, self.experiment, self.folder_of = study, experiment, folder_of
        self.refusal, self.refused, self.as_one = refusal, refused, as_one
        self.space = {key: make_distribution(d) for key, d in experiment.search.space.items()}
        self._waiting: list[int] = []  # trials to continue
        self._is_closed = False
        self._running: set[str] = set()  # Tune's names of its trials

    def __deepcopy__(self, memo):
        return self  # Tune copies its configuration, but the study has one searcher

    def __reduce__(self):
        return object, ()  # Tune saves its configuration for `Tuner.restore`, which is never called

    def remaining(self) -> int:
        """The number of trials that are still to run: those that wait, and those not drawn yet."""
        trials = self.study.get_trials(deepcopy=False)
        drawn = sum(trial.state != TrialState.WAITING for trial in trials)
        undrawn = min(self.experiment.search.trials - drawn, self.size - len(combinations_drawn(trials)))
        return len(self._waiting) + max(0, undrawn)

    @property
    def size(self) -> float:
        """The number of different trials that the space has."""
        return size_of(self.experiment.search.space)

    def is_exhausted(self) -> bool:
        """Whether every combination of the space has been drawn, so that a new trial would repeat one."""
        return len(combinations_drawn(self.study.get_trials(deepcopy=False))) >= self.size

    def waiting(self) -> tuple[int, ...]:
        """The numbers of the trials that wait to be continued, in their order."""
        return tuple(self._waiting)

    def put_back(self, number: int) -> None:
        """Lets a trial wait to be proposed again; it then continues from its checkpoint."""
        self._waiting.append(number)

    def remove(self, number: int) -> None:
        """Removes a trial from those that wait."""
        self._waiting.remove(number)

    def close(self) -> None:
        """Ends the search: no more trials are proposed."""
        self._is_closed = True

    def suggest(self, trial_id: str) -> dict | str | None:
        if self._is_closed:
            return Searcher.FINISHED
        while self.remaining():
            begun = bool(self._waiting) and saved_steps(self.folder_of(self._waiting[0]))
            trial = read_trial(self.study, self._waiting.pop(0)) if self._waiting else self.ask()
            why = None if begun else self.refusal(trial.params)
            if why is None:
                self._running.add(trial_id)
                return {**trial.params, "number": trial.number, "folder": self.folder_of(trial.number)}
            self.refused(trial.number, why)
        return None if self._running else Searcher.FINISHED  # a running trial may have to be continued

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self._running.discard(trial_id)

    def ask(self) -> optuna.trial.Trial:
        """Draws a new trial. The first one has the experiment's own values, if they lie in the space."""
        number = len(self.study.get_trials(deepcopy=False))
        base = {key: self.experiment.get(key) for key in self.space}
        space = self.experiment.search.space
        lies_inside = all(space[key].contains(value) for key, value in base.items())
        has_own_values = number == 0 and lies_inside and self.refusal(base) is None
        self.study.sampler = make_sampler(self.experiment, number)
        with self.as_one():
            if has_own_values:
                self.study.enqueue_trial(base)
            return self.study.ask(self.space)

    def complete(self, number: int) -> None:
        """Draws the values that a running trial lacks because its driver was killed while it drew them."""
        self.study.sampler = make_sampler(self.experiment, number)
        live = open_trial(self.study, number)
        for name, distribution in self.space.items():
            suggest(live, name, distribution)

    def save(self, checkpoint_path: str) -> None:
        pass  # the study's database is the state

    def restore(self, checkpoint_path: str) -> None:
        pass


class SeededSampler(optuna.samplers.BaseSampler):
    """A sampler whose draws for a trial depend only on its number, not on draws for other parameters.

    So a trial that was interrupted while its values were drawn gets the values that it would have had. In a
    space of few combinations, a combination that an earlier trial has is not drawn again.

    Args:
        make: makes Optuna's sampler from a seed.
        seed: the experiment's.
        number: the trial's.
        space: the search space.
    """

    def __init__(self, make, seed: int, number: int, space: dict[str, Distribution]):
        self.make, self.seed, self.number, self.space = make, seed, number, space
        self.joint = make(rng.integer(seed, "sampler", number) % 2**32)

    def infer_relative_search_space(self, study, trial):
        if size_of(self.space) <= MOST_LISTED:
            return {key: make_distribution(d) for key, d in self.space.items()}
        return self.joint.infer_relative_search_space(study, trial)

    def sample_relative(self, study, trial, search_space):
        if size_of(self.space) > MOST_LISTED:
            return self.joint.sample_relative(study, trial, search_space)
        drawn = self.joint.sample_relative(study, trial, self.joint.infer_relative_search_space(study, trial))
        for key, distribution in search_space.items():
            if key not in drawn:
                drawn[key] = self.sample_independent(study, trial, key, distribution)
        earlier = combinations_drawn(t for t in study.get_trials(deepcopy=False) if t.number < self.number)
        left = [own for own in combinations_of(self.space, MOST_LISTED) if identity(own) not in earlier]
        if identity(drawn) not in earlier or not left:
            return drawn
        return left[rng.integer(self.seed, "sampler left", self.number) % len(left)]

    def sample_independent(self, study, trial, param_name, param_distribution):
        alone = self.make(rng.integer(self.seed, f"sampler {param_name}", self.number) % 2**32)
        return alone.sample_independent(study, trial, param_name, param_distribution)


def combinations_drawn(trials: Iterable[FrozenTrial]) -> set[str]:
    """The different combinations of values among trials."""
    return {identity(trial.params) for trial in trials if trial.params}


def identity(params: dict) -> str:
    """A text that is equal for equal values of a trial."""
    return repr(sorted(params.items()))


def make_sampler(experiment: Experiment, number: int) -> optuna.samplers.BaseSampler:
    """The sampler of trial `number`. It has its own seed, so that a resumed study draws the same values.

    To add a sampler, add it here, and its name to `config.Search.sampler`.
    """
    seed, space = experiment.seed, experiment.search.space
    if experiment.search.sampler == "random":
        return SeededSampler(optuna.samplers.RandomSampler, seed, number, space)
    startup = min(10, max(4, experiment.search.trials // 3))
    return SeededSampler(
        lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup), seed, number, space
    )


def make_distribution(d: Distribution) -> BaseDistribution:
    if d.kind == "choice":
        return CategoricalDistribution(d.values)
    if d.kind == "int":
        return IntDistribution(*d.values)
    return FloatDistribution(*d.values, log=d.kind == "log")


def suggest(trial: optuna.trial.Trial, name: str, distribution: BaseDistribution) -> None:
    """Draws one value of a trial, unless the trial has it already."""
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
    elif isinstance(distribution, IntDistribution):
        trial.suggest_int(name, distribution.low, distribution.high)
    else:
        trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
