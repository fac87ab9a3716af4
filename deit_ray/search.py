"""A study: Optuna proposes, Ray Tune runs, the scheduler stops early, and one database knows it all.

The Optuna study in its database is the only truth. Every start of the driver builds a fresh Tuner from it, so a study
can go on after any accident: unfinished trials continue from their checkpoints, the scheduler's rungs are replayed.
"""

import contextlib
import shutil
import threading
import time
from functools import partial
from types import SimpleNamespace

import optuna
import ray
import ray.tune
from optuna.trial import TrialState
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher

from deit_ray import cluster, report, rng, storage
from deit_ray.config import Experiment
from deit_ray.console import Console
from deit_ray.errors import Interrupted, UserError
from deit_ray.load import dump_experiment
from deit_ray.run import (
    EXPERIMENT,
    MODEL,
    check,
    check_fits,
    keep_best_model,
    measured,
    saved_steps,
    share,
)
from deit_ray.space import Distribution
from deit_ray.study import Study
from deit_ray.tracking import Run, Tracker
from deit_ray.trial import Needs, Trial, make_trial, read_failure, sweep

TUNE = ".tune"  # what Ray Tune writes, of which nothing is ever read
SWEEP_AFTER_S = 3.0
UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)


def tune(
    experiment: Experiment | None,
    address: str | None = None,
    resume: str | None = None,
    console: Console | None = None,
    verbose: bool = False,
    results: str = "results",
) -> "Study":
    """Runs a study to its end.

    Args:
        experiment: what to search; None with `resume`.
        address: of a Ray cluster; by default RAY_ADDRESS, or a local Ray for this study.
        resume: the name of a study that was interrupted.
        console: what a person sees; by default nothing.
        verbose: shows Ray's own output too.
        results: where the study to resume is.

    Returns:
        The study.

    Raises:
        UserError: the experiment cannot run, or has nothing to search.
        Interrupted: by Ctrl-C; the study can be resumed.
    """
    console = console or Console(quiet=True)
    study = Study.open(resume, results) if resume else None
    experiment = study.experiment if study else experiment
    if not experiment.search.space:
        raise UserError(f"{experiment.name}: search.space is empty; name what to search, such as optim.lr: {{log: [1e-4, 1e-2]}}")
    if not storage.is_local(experiment.results.uri):
        raise UserError(f"results.uri: {experiment.results.uri}: a study's database needs a local path or a shared file system")
    ready = check(experiment)
    with cluster.connected(address, verbose, console.warn):
        resources = cluster.possible_resources()
        device = check_fits(experiment, resources)
        for key, uri in (("results.uri", experiment.results.uri), ("data.uri", experiment.data.uri)):
            cluster.check_reachable(key, uri)
        study = study or Study.create(experiment)
        try:
            Driver(study, ready, device, resources, console).run()
        except KeyboardInterrupt:
            console.close()
            raise Interrupted(
                f"{study.name}: interrupted; what its trials have done is kept\ngo on with: deit-ray tune --resume {study.name}"
                + ("" if experiment.results.uri == "results" else f" --results {experiment.results.uri}")
            ) from None
    return study


class Driver:
    """Runs a study's open trials: the one place where Optuna, Tune, MLflow and the terminal are told the same."""

    def __init__(self, study: Study, ready, device: str, resources: dict[str, float], console: Console):
        self.study, self.ready, self.device, self.console = study, ready, device, console
        self.experiment = study.experiment
        search = self.experiment.search
        fit = Needs.of(self.experiment, device).fit(resources)
        self.concurrent = max(1, min(fit, search.trials, search.max_concurrent or fit))
        self.runs: dict[int, Run] = {}
        self.parent: Run | None = None

    def run(self) -> None:
        study = self.study
        searcher = StudySearcher(study)
        with Tracker.of(self.experiment, self.console) as self.tracker:
            fixed = {key: str(self.experiment.get(key)) for key in ("seed", "train.epochs", "student.model", "search.trials")}
            tags = {"study": study.name, "kind": "study"}
            self.parent = self.tracker.start_run(study.name, tags, fixed, study.folder, journal=False)
            self.console.study_started(study.name, self.experiment, self.device, self.concurrent, searcher.remaining())
            searcher.unfinished = [trial for trial in searcher.unfinished if not self._catch_up(trial)]
            if searcher.remaining():
                self._run_tuner(searcher)
            self._finish()

    def _catch_up(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Tells Optuna what a trial had saved when the driver went away; returns whether that was all of it."""
        folder = self.study.trial_folder(trial.number)
        steps = saved_steps(folder)
        epochs, values = measured(folder, "epoch"), measured(folder, self.experiment.search.metric)
        known = {int(epochs[step]): value for step, value in values.items() if steps and step <= steps[-1] and step in epochs}
        for epoch in sorted(known.keys() - trial.intermediate_values.keys()):
            self._live(trial.number).report(known[epoch], epoch)
        complete = max(known, default=0) >= self.experiment.train.epochs
        if complete:
            self.trial_started(trial.number, trial.params)
            self.trial_ended(trial.number, None)
        return complete

    def _run_tuner(self, searcher: "StudySearcher") -> None:
        self.scheduler = make_scheduler(self.experiment, self.study.optuna)
        make = partial(make_trial, self.experiment, self.device, share(self.ready), ("val",))
        resources = ray.tune.PlacementGroupFactory([{cluster.HEAD: 0.001}])  # on the head, which outlives spot nodes
        ray.tune.Tuner(
            ray.tune.with_resources(ray.tune.with_parameters(Trial, make=make), resources),
            tune_config=ray.tune.TuneConfig(
                search_alg=searcher,
                scheduler=self.scheduler,
                num_samples=searcher.remaining(),
                max_concurrent_trials=self.concurrent,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=ray.tune.RunConfig(
                name=f"tune-{time.time_ns()}",
                storage_path=storage.join(self.study.folder, TUNE),
                verbose=0,
                callbacks=[Listener(self)],
            ),
        ).fit()
        unfinished = [t.number for t in self.study.optuna.get_trials(deepcopy=False) if t.state in UNFINISHED]
        if unfinished:
            raise UserError(
                f"{self.study.name}: Ray ended with {len(unfinished)} trials unfinished; "
                f"go on with: deit-ray tune --resume {self.study.name}"
            )

    def trial_started(self, number: int, params: dict) -> None:
        folder = self.study.trial_folder(number)
        experiment = self.study.trial_experiment(params)
        if not storage.exists(storage.join(folder, EXPERIMENT)):
            storage.write_bytes(storage.join(folder, EXPERIMENT), dump_experiment(experiment).encode())
        name = f"trial {number:03d} " + " ".join(f"{k.rpartition('.')[2]}={report.short(v)}" for k, v in params.items())
        tags = {"study": self.study.name, "kind": "trial", "trial": str(number)}
        self.runs[number] = self.tracker.start_run(name, tags, params, folder, self.parent)
        self.console.trial_started(number, params)

    def replay(self, trial) -> None:
        """Shows the scheduler what a continued trial had reached, so that it decides as if nothing had come between."""
        reached = self._trial(trial.config["number"]).intermediate_values
        for epoch, value in sorted(reached.items()):
            self.scheduler.on_trial_result(None, trial, {"epoch": epoch, self.experiment.search.metric: value})

    def trial_reported(self, number: int, result: dict) -> None:
        value = result[self.experiment.search.metric]
        trial = self._trial(number)
        if result["epoch"] not in trial.intermediate_values:
            self._live(number).report(value, result["epoch"])
        images = result.get(f"{self.experiment.search.metric.split('/')[0]}/images")
        if images:
            self._live(number).set_user_attr("images", images)
        self.console.trial_reported(number, result, self.experiment)

    def trial_ended(self, number: int, error: str | None) -> None:
        """Tells everybody how a trial ended; the table in docs/architecture.md."""
        trial, folder = self._trial(number), self.study.trial_folder(number)
        if trial.state not in UNFINISHED:
            return
        if number not in self.runs:  # its actor died before it had started
            self.trial_started(number, trial.params)
        live, metric = self._live(number), self.experiment.search.metric
        last = max(trial.intermediate_values, default=0)
        values = [value for value in trial.intermediate_values.values() if value == value]
        if error is not None or not values:
            outcome = f"failed: {error or 'it reported nothing'}"
        elif last >= self.experiment.train.epochs:
            outcome = "finished"
        else:
            outcome = f"stopped early at epoch {last}"
        live.set_user_attr("outcome", outcome)
        files = []
        if outcome == "finished":
            files = [MODEL]
            self.study.optuna.tell(number, keep_best_model(folder, metric))
        else:
            self.study.optuna.tell(number, state=TrialState.FAIL if outcome.startswith("failed") else TrialState.PRUNED)
        self.tracker.end_run(self.runs[number], outcome, folder, *files)
        self.console.trial_ended(number, outcome, max(values, default=None))

    def _finish(self) -> None:
        """Evaluates the best trial on the test images, once, and closes the study."""
        study = self.study
        try:
            best = study.best()
        except UserError:
            reasons = {t.user_attrs.get("outcome", "") for t in study.optuna.get_trials(deepcopy=False)}
            self.tracker.end_run(self.parent, "failed: no trial finished", study.folder)
            raise UserError(f"{study.name}: no trial finished: {'; '.join(sorted(reasons))}") from None
        config, model = study.save_best()
        metrics = {}
        if "test" in self.ready.manifest.splits:
            from deit_ray.predict import evaluate_here

            metrics = evaluate_here(model, self.experiment, self.ready.manifest, self.device, ("test",))
            study.optuna.set_user_attr("test", metrics)
        best_metrics = {f"best/{self.experiment.search.metric}": best.value, **metrics}
        self.tracker.end_run(self.parent, "finished", study.folder, "best.yaml", MODEL, metrics=best_metrics)
        shutil.rmtree(storage.join(study.folder, TUNE), ignore_errors=True)
        self.console.study_ended(study, best, metrics, config, model)

    def _trial(self, number: int) -> optuna.trial.FrozenTrial:
        return self.study.optuna.get_trials(deepcopy=False)[number]

    def _live(self, number: int) -> optuna.trial.Trial:
        return optuna.trial.Trial(self.study.optuna, self._trial(number)._trial_id)


def _copy_as_itself(self, memo):
    """Tune copies its configuration; what speaks to the study must stay the one that does."""
    return self


def _pickle_as_nothing(self):
    """Tune saves its configuration for `Tuner.restore`, which is never called: the study's database is the truth."""
    return object, ()


class StudySearcher(Searcher):
    """Ray Tune's view of an Optuna study: what to run next. How trials end is told by the `Driver`."""

    def __init__(self, study: Study):
        experiment = study.experiment
        super().__init__(metric=experiment.search.metric, mode="max")
        self.folder_of, self.study, self.experiment = study.trial_folder, study.optuna, experiment
        self.space = {key: _optuna_distribution(d) for key, d in experiment.search.space.items()}
        trials = self.study.get_trials(deepcopy=False)
        running = [t for t in trials if t.state == TrialState.RUNNING]
        for trial in running:
            if set(trial.params) != set(self.space):  # killed while it was being asked for
                self.study.tell(trial.number, state=TrialState.FAIL)
        self.unfinished = [t for t in running if set(t.params) == set(self.space)]
        self.asked = sum(t.state != TrialState.WAITING for t in trials)

    __deepcopy__, __reduce__ = _copy_as_itself, _pickle_as_nothing

    def remaining(self) -> int:
        return len(self.unfinished) + max(0, self.experiment.search.trials - self.asked)

    def suggest(self, trial_id: str) -> dict | str:
        if self.unfinished:
            return self._config(self.unfinished.pop(0))
        if self.asked >= self.experiment.search.trials:
            return Searcher.FINISHED
        self.study.sampler = make_sampler(self.experiment, number=self.asked)
        trial = self.study.ask(self.space)
        self.asked += 1
        return self._config(trial)

    def _config(self, trial) -> dict:
        return {**trial.params, "number": trial.number, "folder": self.folder_of(trial.number)}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass  # the study's database is the state

    def restore(self, checkpoint_path: str) -> None:
        pass


class Listener(ray.tune.Callback):
    """Passes on what happens to trials, and sweeps up behind them."""

    def __init__(self, driver: Driver):
        self.driver = driver

    __deepcopy__, __reduce__ = _copy_as_itself, _pickle_as_nothing

    def on_trial_start(self, iteration, trials, trial, **info):
        params = {key: value for key, value in trial.config.items() if key in self.driver.experiment.search.space}
        self.driver.trial_started(trial.config["number"], params)
        self.driver.replay(trial)

    def on_trial_result(self, iteration, trials, trial, result, **info):
        if self.driver.experiment.search.metric in result:
            self.driver.trial_reported(trial.config["number"], result)

    def on_trial_complete(self, iteration, trials, trial, **info):
        self.driver.trial_ended(trial.config["number"], None)
        sweep_soon(trial.config["folder"])

    def on_trial_error(self, iteration, trials, trial, **info):
        self.driver.trial_ended(trial.config["number"], read_failure(trial.config["folder"]))
        sweep_soon(trial.config["folder"])


def sweep_soon(folder: str) -> None:
    """Sweeps up behind a trial once its actor has had the time to do so itself."""

    def sweep_now():
        with contextlib.suppress(ray.exceptions.RayError):  # the cluster is gone, and all that was left with it
            sweep(folder)

    timer = threading.Timer(SWEEP_AFTER_S, sweep_now)
    timer.daemon = True
    timer.start()


def make_sampler(experiment: Experiment, number: int) -> optuna.samplers.BaseSampler:
    """The sampler that draws trial `number`; its seed follows from (seed, number), so a resumed study draws the same.

    A new sampler goes here, and its name into `config.Search.sampler`.
    """
    seed = rng.integer(experiment.seed, "sampler", number) % 2**32
    if experiment.search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    startup = min(10, max(4, experiment.search.trials // 3))
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)


def make_scheduler(experiment: Experiment, study: optuna.Study):
    """The scheduler, knowing what the study knows: the ended trials' values are replayed into its rungs.

    A new scheduler goes here, and its name into `config.Search.scheduler`.
    """
    search = experiment.search
    if search.scheduler == "none":
        return FIFOScheduler()
    scheduler = ASHAScheduler(
        metric=search.metric, mode="max", time_attr="epoch", max_t=experiment.train.epochs + 1,
        grace_period=search.grace_epochs, reduction_factor=search.reduction_factor,
    )  # fmt: skip
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        stub = SimpleNamespace(trial_id=f"number{trial.number}")
        scheduler.on_trial_add(None, stub)
        for epoch, value in sorted(trial.intermediate_values.items()):
            scheduler.on_trial_result(None, stub, {"epoch": epoch, search.metric: value})
    return scheduler


def _optuna_distribution(d: Distribution) -> optuna.distributions.BaseDistribution:
    if d.kind == "choice":
        return optuna.distributions.CategoricalDistribution(d.values)
    if d.kind == "int":
        return optuna.distributions.IntDistribution(*d.values)
    return optuna.distributions.FloatDistribution(*d.values, log=d.kind == "log")
