"""What to run next: Ray Tune's view of an Optuna study, and the samplers."""

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from deit_ray import rng
from deit_ray.experiment.config import Experiment
from deit_ray.experiment.space import Distribution


class StudySearcher(Searcher):
    """Proposes a study's unfinished trials first, then new ones. How trials end is told by the `Driver`, not here.

    Args:
        study: the Optuna study.
        experiment: what it searches.
        folder_of: the results folder of a trial's number.

    Attributes:
        unfinished: trials to go on with; one whose process died is put back here.
        closed: set when no more trials may start.
    """

    def __init__(self, study: optuna.Study, experiment: Experiment, folder_of):
        super().__init__(metric=experiment.search.metric, mode="max")
        self.study, self.experiment, self.folder_of = study, experiment, folder_of
        self.space = {key: make_distribution(d) for key, d in experiment.search.space.items()}
        self.unfinished: list[FrozenTrial] = []
        self.closed = False
        self.running: set[str] = set()  # Tune's names of the trials that it has

    def __deepcopy__(self, memo):
        return self  # Tune copies its configuration; what speaks to the study must stay the one that does

    def __reduce__(self):
        return object, ()  # Tune saves its configuration for `Tuner.restore`, which is never called

    def remaining(self) -> int:
        """Trials that are still to run: unfinished ones and those never drawn."""
        trials = self.study.get_trials(deepcopy=False)
        drawn = sum(trial.state != TrialState.WAITING for trial in trials)
        return len(self.unfinished) + max(0, self.experiment.search.trials - drawn)

    def suggest(self, trial_id: str) -> dict | str | None:
        if self.closed or not self.remaining():
            return (
                None if self.running and not self.closed else Searcher.FINISHED
            )  # one that runs may have to be continued
        trial = self.unfinished.pop(0) if self.unfinished else self.ask()
        self.running.add(trial_id)
        return {**trial.params, "number": trial.number, "folder": self.folder_of(trial.number)}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self.running.discard(trial_id)

    def ask(self) -> optuna.trial.Trial:
        """Draws a new trial; the first one has the file's own values, where they lie in the space."""
        number = len(self.study.get_trials(deepcopy=False))
        base = {key: self.experiment.get(key) for key in self.space}
        if number == 0 and all(
            contains(self.experiment.search.space[key], value) for key, value in base.items()
        ):
            self.study.enqueue_trial(base)
        self.study.sampler = make_sampler(self.experiment, number)
        return self.study.ask(self.space)

    def complete(self, trial: FrozenTrial) -> FrozenTrial:
        """Draws the values that a trial lacks because its driver was killed while it asked for them."""
        self.study.sampler = make_sampler(self.experiment, trial.number)
        live = optuna.trial.Trial(self.study, trial._trial_id)
        for name, distribution in self.space.items():
            live._suggest(name, distribution)
        return self.study.get_trials(deepcopy=False)[trial.number]

    def save(self, checkpoint_path: str) -> None:
        pass  # the study's database is the state

    def restore(self, checkpoint_path: str) -> None:
        pass


class SeededSampler(optuna.samplers.BaseSampler):
    """A sampler whose draws for a trial follow from its number alone: those of one parameter do not move another's.

    So a trial that was interrupted while its values were drawn gets the very values that it would have had.
    """

    def __init__(self, make, seed: int, number: int):
        self.make, self.seed, self.number = make, seed, number
        self.joint = make(rng.integer(seed, "sampler", number) % 2**32)

    def infer_relative_search_space(self, study, trial):
        return self.joint.infer_relative_search_space(study, trial)

    def sample_relative(self, study, trial, search_space):
        return self.joint.sample_relative(study, trial, search_space)

    def sample_independent(self, study, trial, param_name, param_distribution):
        alone = self.make(rng.integer(self.seed, f"sampler {param_name}", self.number) % 2**32)
        return alone.sample_independent(study, trial, param_name, param_distribution)


def make_sampler(experiment: Experiment, number: int) -> optuna.samplers.BaseSampler:
    """The sampler that draws trial `number`; its seed follows from (seed, number), so a resumed study draws the same.

    A new sampler goes here, and its name into `config.Search.sampler`.
    """
    if experiment.search.sampler == "random":
        return SeededSampler(optuna.samplers.RandomSampler, experiment.seed, number)
    startup = min(10, max(4, experiment.search.trials // 3))
    return SeededSampler(
        lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup), experiment.seed, number
    )


def make_distribution(d: Distribution) -> optuna.distributions.BaseDistribution:
    if d.kind == "choice":
        return optuna.distributions.CategoricalDistribution(d.values)
    if d.kind == "int":
        return optuna.distributions.IntDistribution(*d.values)
    return optuna.distributions.FloatDistribution(*d.values, log=d.kind == "log")


def contains(d: Distribution, value) -> bool:
    return value in d.values if d.kind == "choice" else d.values[0] <= value <= d.values[1]
