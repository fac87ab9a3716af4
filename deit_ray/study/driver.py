"""The driver of a study. The study's Optuna database is the only truth: every start builds a Tuner from it.

So a study can be resumed after any accident: unfinished trials continue from their checkpoints, and the
scheduler sees all earlier results again.
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial

import ray.tune
from optuna.trial import TrialState

from deit_ray.cluster import connect
from deit_ray.cluster.nodes import Codes
from deit_ray.errors import Interrupted, UserError
from deit_ray.results.folders import trial_name
from deit_ray.study.database import naming_database
from deit_ray.study.listener import Listener
from deit_ray.study.observers import Database, Observer, Terminal, Tracking
from deit_ray.study.records import Evaluated
from deit_ray.study.resources import Resources
from deit_ray.study.resume import reconcile
from deit_ray.study.stop_policy import ALL_ENDED
from deit_ray.study.study import Study
from deit_ray.study.trials import Trials
from deit_ray.terminal.console import Console
from deit_ray.terminal.format import counted
from deit_ray.trial.assemble import make_trial
from deit_ray.trial.failure import Failure
from deit_ray.trial.launch import share, trial_class
from deit_ray.trial.needs import Needs
from deit_ray.trial.reading import largest_shares
from deit_ray.trial.remarks import remarks_before
from deit_ray.trial.resolve import Resolved
from deit_ray.trial.train_private import every_death_known, without_runtime_environment

TICK_S = 1.0


class Driver:
    """Runs the open trials of a study, old and new, and evaluates the best one.

    Args:
        study: the study; this process must hold its lock, see `Study.driving`.
        resolved: the parts of its experiment.
        device: cpu or cuda.
        resources: the resources of the cluster, by Ray's name.
        console: where messages go.

    Attributes:
        observers: in the order of their calls; the end of a trial reaches the database before MLflow.
    """

    def __init__(
        self, study: Study, resolved: Resolved, device: str, resources: dict[str, float], console: Console
    ):
        self.study, self.resolved, self.device = study, resolved, device
        self.experiment, self.metric = study.experiment, study.experiment.search.metric
        search, needs = self.experiment.search, Needs.of(self.experiment, device)
        fit = needs.fit(resources)
        self.concurrent = max(1, min(fit, search.trials, search.max_concurrent or fit))
        self.resources, self.tracking = Resources(study, needs.gpus), Tracking(study, console)
        remarks = remarks_before(self.experiment, resolved.manifest)
        self.terminal = Terminal(study, console, device, self.concurrent, remarks)
        self.observers: list[Observer] = [self.resources, Database(study), self.tracking, self.terminal]
        self.trials = Trials(study, self.observers, resolved.refusal)
        self.ticked = time.monotonic()
        self.codes = Codes(connect.code_of_nodes())

    def run(self) -> None:
        """Runs the study to its end.

        Raises:
            UserError: the study ended without a finished trial.
            Interrupted: Ray is gone; the study can be resumed.
            UnavailableError: a disk, data or network is gone; the study can be resumed once that is fixed.
        """
        self.study.made_with = self.experiment.as_dict()
        self.study.largest = largest_shares(self.resolved.manifest)
        with self.tracking.delivering(), contextlib.closing(self.terminal):
            for observer in self.observers:
                observer.study_opened()
            found = reconcile(self.study, self.trials.scheduler)
            resumed = sum(trial.action in ("continued", "run again") for trial in found)
            total = resumed + self.trials.searcher.remaining()
            for observer in self.observers:
                observer.study_started(found, total)
            self.trials.resume(found)
            self._check_budgets()
            if self.trials.searcher.remaining() and not self.trials.policy.ending:
                self.study.ended = None
                self._run_tuner()
            self._finish()

    def trainable(self) -> type:
        """The class that Tune runs for each trial."""
        splits = ("val", "test") if self.metric.startswith("test/") else ("val",)
        make = partial(make_trial, self.experiment, self.device, share(self.resolved), splits)
        return trial_class(make)

    # The `Listener` calls the methods below.

    @contextlib.contextmanager
    def guarding(self) -> Iterator[None]:
        """Halts the study at an exception, and raises it later: Tune would take it for a trial's failure."""
        try:
            with naming_database(self.study.folder):
                yield
        except Exception as error:
            self.trials.halt(error)

    def trial_completed(self, number: int) -> None:
        self.trials.completed(number)
        self._check_budgets()

    def trial_failed(self, number: int, failure: Failure) -> None:
        self.trials.failed(number, failure)
        self._check_budgets()

    def trial_died(self, number: int, death: str) -> None:
        self.trials.died(number, death)
        self._check_budgets()

    def tick(self) -> None:
        """Counts time, reads stop requests, checks the budgets and the code of new nodes, once a second."""
        now = time.monotonic()
        elapsed_s = now - self.ticked
        if elapsed_s < TICK_S:
            return
        self.ticked = now
        for observer in self.observers:
            observer.time_passed(elapsed_s)
        for number in self.study.take_stop_requests():
            self.trials.stop(number)
        self._check_budgets()
        self.codes.check()

    def _check_budgets(self) -> None:
        self.trials.check_budgets(self.resources.spent)

    def _run_tuner(self) -> None:
        trials = self.trials
        try:
            run_tuner(self.trainable(), trials, self.concurrent, Listener(self))
        finally:
            self.resources.sweep_now()
        if trials.policy.halted:
            raise trials.policy.halted
        self.resources.save_spent()
        self.study.add_tune_states(trials.scheduler.states())
        unfinished = self.study.records(TrialState.RUNNING, TrialState.WAITING)
        if unfinished:
            raise Interrupted(f"Ray ended with {counted(len(unfinished), 'trial')} unfinished")

    def _finish(self) -> None:
        """Evaluates the best trial on the test images, once, and closes the study."""
        study, policy = self.study, self.trials.policy
        # if the study had ended before, and no trial was left to run, the reason stays the same
        before = None if self.trials.scheduler.states() else study.ended
        study.ended = reason = policy.ending or before or self._why_all_ended()
        best = study.find_best()
        if best is not None:
            self._test(best.number, study.save_best(self.terminal.warn)[1])
        study.remove_checkpoints()
        outcome = policy.study_outcome(reason, has_best=best is not None)
        for observer in self.observers:
            observer.study_ended(outcome, best)
        if best is None:
            outcomes = sorted({trial.outcome.text if trial.outcome else "" for trial in study.records()})
            raise UserError(f"{study.name}: ended with no finished trial: {reason}; {'; '.join(outcomes)}")

    def _why_all_ended(self) -> str:
        searcher = self.trials.searcher
        if searcher.is_exhausted() and len(self.study.records()) < self.experiment.search.trials:
            return f"search.space is exhausted: each of its {searcher.size:g} combinations was tried"
        return ALL_ENDED

    def _test(self, number: int, model: str) -> None:
        """Evaluates the best trial's model on the test images, unless that was done before."""
        tested = self.study.tested
        if "test" not in self.resolved.manifest.splits or (tested and tested.trial == number):
            return
        from deit_ray.trial.evaluation import evaluate_here

        metrics = evaluate_here(model, self.experiment, self.resolved.manifest, self.device, "test")
        self.study.tested = Evaluated(number, metrics)


def run_tuner(trainable: type, trials: Trials, concurrent: int, listener: Listener) -> None:
    """Runs Ray Tune until the searcher has nothing left to propose.

    Args:
        concurrent: largest number of trials at a time.
    """
    scratch = tempfile.mkdtemp(prefix="deit_ray-tune-")  # Ray Tune writes there; nothing reads it
    head = ray.tune.PlacementGroupFactory([{connect.HEAD: 0.001}])  # the head outlives spot nodes
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trainable, head),
        tune_config=ray.tune.TuneConfig(
            search_alg=trials.searcher,
            scheduler=trials.scheduler,
            num_samples=-1,  # as many as the searcher has
            max_concurrent_trials=concurrent,
            trial_name_creator=lambda trial: trial_name(trial.config["number"]),
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=ray.tune.RunConfig(name="study", storage_path=scratch, verbose=0, callbacks=[listener]),
    )
    try:
        with without_runtime_environment(), every_death_known():
            tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
