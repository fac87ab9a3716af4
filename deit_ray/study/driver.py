"""The driver of a study. The Optuna study in its database is the only truth: every start builds a fresh Tuner from it.

So a study can go on after any accident: unfinished trials continue from their checkpoints, and all results so far are
shown to the scheduler again.
"""

import contextlib
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial

import optuna
import ray
import ray.tune
from optuna.trial import TrialState

from deit_ray.cluster import connect
from deit_ray.cluster.holdings import cancel, forget_cancel
from deit_ray.errors import Interrupted, UnavailableError, UserError
from deit_ray.results.folders import keep_best_model, saved_steps, trial_name
from deit_ray.study.budget import exceeded
from deit_ray.study.listener import Listener, Sweeps
from deit_ray.study.resume import Reconciled, decide, late_results, reconcile
from deit_ray.study.schedule import StudyScheduler
from deit_ray.study.searcher import StudySearcher
from deit_ray.study.study import Study, naming_database
from deit_ray.study.sync import end_study, end_trial, is_told, start_study, start_trial
from deit_ray.terminal.console import Console
from deit_ray.tracking.tracked import Run
from deit_ray.tracking.tracker import Tracker
from deit_ray.trial.assemble import make_trial
from deit_ray.trial.failure import Failure, TrialFailed, describe_failure, read_failure
from deit_ray.trial.needs import Needs
from deit_ray.trial.run import share, warn_of_bad
from deit_ray.trial.trial import Trial

TICK_S = 1.0
SAVE_SPENT_S = 10.0
PERSON = "stopped by a person"


class Driver:
    """Runs a study's open trials: the one place where Optuna, Tune, MLflow and the terminal are told the same."""

    def __init__(self, study: Study, ready, device: str, resources: dict[str, float], console: Console):
        self.study, self.ready, self.device, self.console = study, ready, device, console
        self.experiment = study.experiment
        search, needs = self.experiment.search, Needs.of(self.experiment, device)
        fit = needs.fit(resources)
        self.concurrent, self.gpus = max(1, min(fit, search.trials, search.max_concurrent or fit)), needs.gpus
        self.scheduler = StudyScheduler(self.experiment)
        self.searcher = StudySearcher(study.optuna, self.experiment, study.trial_folder)
        self.live: set[int] = set()  # trials whose process runs
        self.asked: dict[
            int, str | None
        ] = {}  # trials asked to end, with the outcome; None leaves them open for a resume
        self.deaths: dict[
            int, tuple[int, int]
        ] = {}  # of a trial's process in a row, and the last step saved by then
        self.ending: str | None = None  # why the study ends before all its trials are drawn
        self.halt: Exception | None = None  # why it cannot go on now
        self.runs: dict[int, Run] = {}
        self.parent: Run | None = None
        self.sweeps = Sweeps()
        self.spent, self.ticked, self.spent_saved = study.spent, time.monotonic(), time.monotonic()

    def run(self) -> None:
        study = self.study
        study.optuna.set_user_attr("experiment", self.experiment.as_dict())
        with Tracker.of(self.experiment, self.console) as self.tracker:
            study.optuna.set_user_attr("outcome", None)
            self.parent = start_study(self.tracker, study)
            found = reconcile(study, self.scheduler)
            going_on = sum(trial.action in ("continued", "run again") for trial in found)
            self.console.study_started(
                study, self.device, self.concurrent, going_on + self.searcher.remaining(), found
            )
            self._resume(found)
            self._check_budgets()
            if self.searcher.remaining() and not self.ending:
                study.optuna.set_user_attr("ended", None)
                self._run_tuner()
            self._finish()

    def _resume(self, found: list[Reconciled]) -> None:
        """Brings the study up to what its trials had done when its last driver went away."""
        for decided in found:
            if decided.action != "kept":
                forget_cancel(self.study.trial_folder(decided.number))
                self._live(decided.number).set_user_attr(
                    "outcome", None
                )  # of an end that was not told to the end
                self._take_up(decided)
            elif not is_told(
                self.study, decided.number
            ):  # the driver ended it, and MLflow did not hear of it
                trial = self.study.trial(decided.number)
                end_trial(
                    self.tracker, self.study, trial, start_trial(self.tracker, self.study, trial, self.parent)
                )

    def _take_up(self, decided: Reconciled) -> None:
        """Ends a trial, or lets it go on, after Optuna was told what it had measured."""
        trial = self.searcher.complete(self.study.trial(decided.number))
        for _, epoch, value in decided.late:
            self._report(trial.number, epoch, value)
        if decided.outcome:
            self._end(trial.number, decided.outcome, read_failure(self.study.trial_folder(trial.number)))
        else:
            self.searcher.unfinished.append(self.study.trial(decided.number))

    def _run_tuner(self) -> None:
        scratch = tempfile.mkdtemp(
            prefix="deit_ray-tune-"
        )  # what Ray Tune writes, of which nothing is ever read
        resources = ray.tune.PlacementGroupFactory(
            [{connect.HEAD: 0.001}]
        )  # on the head, which outlives spot nodes
        try:
            ray.tune.Tuner(
                ray.tune.with_resources(self.trainable(), resources),
                tune_config=ray.tune.TuneConfig(
                    search_alg=self.searcher,
                    scheduler=self.scheduler,
                    num_samples=-1,  # as many as the searcher has
                    max_concurrent_trials=self.concurrent,
                    trial_name_creator=lambda trial: trial_name(trial.config["number"]),
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=ray.tune.RunConfig(
                    name="study", storage_path=scratch, verbose=0, callbacks=[Listener(self)]
                ),
            ).fit()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            self.sweeps.close()
        if self.halt:
            raise self.halt
        self.study.spent = self.spent
        states = {str(number): trial.status for number, trial in self.scheduler.trials.items()}
        self.study.optuna.set_user_attr("tune", self.study.optuna.user_attrs.get("tune", {}) | states)
        unfinished = self.study.optuna.get_trials(
            deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)
        )
        if unfinished:
            raise Interrupted(f"Ray ended with {len(unfinished)} trials unfinished")

    def trainable(self) -> type:
        """What Tune runs for each trial."""
        splits = ("val", "test") if self.experiment.search.metric.startswith("test/") else ("val",)
        make = partial(make_trial, self.experiment, self.device, share(self.ready), splits)
        return ray.tune.with_parameters(Trial, make=make)

    # what happens to trials, told by the Listener

    def trial_started(self, number: int) -> None:
        self.live.add(number)
        self._open_run(number)
        self.console.trial_started(number, self.study.trial(number).params)

    def trial_reported(self, number: int, result: dict) -> None:
        metric = self.experiment.search.metric
        self._report(number, result["epoch"], result[metric])
        images = result.get(f"{metric.split('/')[0]}/images")
        if images and "images" not in self.study.trial(number).user_attrs:
            self._live(number).set_user_attr("images", images)
        self.console.trial_reported(number, result, self.experiment)

    def trial_completed(self, number: int) -> None:
        """It finished, was stopped by the scheduler, or ended because it was asked to."""
        self.live.discard(number)
        values = self.study.trial(number).intermediate_values
        last = max(values, default=0)
        if last >= self.experiment.train.epochs:
            outcome = "finished"
        elif number in self.asked:
            outcome = self.asked[number]
        else:
            outcome = f"stopped early at epoch {last}" if last else "failed: it reported nothing"
        forget_cancel(self.study.trial_folder(number))
        if outcome:
            self._end(number, outcome)
        self._check_budgets()

    def trial_failed(self, number: int, error: BaseException) -> None:
        """It raised an error, or its process died."""
        self.live.discard(number)
        folder, cause = self.study.trial_folder(number), getattr(error, "cause", error)
        if isinstance(cause, TrialFailed):
            failure = cause.failure
        elif isinstance(error, ray.exceptions.RayTaskError):
            failure = describe_failure(error, folder)
        else:  # its process, its node or its owner died: an interruption
            failure = None
        forget_cancel(folder)
        if number in self.asked:  # it died while it was to end anyway; None leaves it open
            if self.asked[number]:
                self._end(number, self.asked[number])
        elif failure is None:
            self._continue(number)
        elif failure.kind == "unavailable":
            self._halt(UnavailableError(f"trial {number}: {failure.reason}"))
        else:
            self._end(number, f"failed: {failure.reason}", failure)
        self._check_budgets()

    def tick(self) -> None:
        """Looks, once a second, at what people ask for and at what is spent."""
        now = time.monotonic()
        if now - self.ticked < TICK_S:
            return
        self.spent.wall_s += now - self.ticked
        self.spent.gpu_s += (now - self.ticked) * self.gpus * len(self.live)
        self.ticked = now
        if now - self.spent_saved > SAVE_SPENT_S:
            self.study.spent, self.spent_saved = self.spent, now
        for number in self.study.take_stop_requests():
            if number is None:
                self._end_study(PERSON)
            else:
                self._ask_to_end(number, "cancelled")
        self._check_budgets()

    # what follows from it

    def _check_budgets(self) -> None:
        reason = exceeded(self.experiment, self.study.optuna.get_trials(deepcopy=False), self.spent)
        if reason and not self.ending:
            self._end_study(reason)

    def _end_study(self, reason: str) -> None:
        """No more trials are started, and those that run are cancelled."""
        self.ending = reason
        self.searcher.closed = True
        for trial in self.searcher.unfinished:
            self._end(trial.number, "cancelled")
        self.searcher.unfinished = []
        for number in list(self.scheduler.trials):
            self._ask_to_end(number, "cancelled")

    def _halt(self, error: Exception) -> None:
        """The study cannot go on now: trials are let go, as they are, for a resume."""
        self.halt = self.halt or error
        self.searcher.closed = True
        for number in list(self.scheduler.trials) if connect.is_alive() else []:
            self._ask_to_end(number, None)

    def _ask_to_end(self, number: int, outcome: str | None) -> None:
        waiting = next((trial for trial in self.searcher.unfinished if trial.number == number), None)
        if waiting is not None and outcome:
            self.searcher.unfinished.remove(waiting)
            self._end(number, outcome)
        trial = self.scheduler.trials.get(number)
        if trial is None or trial.is_finished() or number in self.asked:
            return
        self.asked[number] = outcome
        if trial.status == trial.RUNNING:
            cancel(self.study.trial_folder(number))
        else:
            self.scheduler.controller.stop_trial(trial)

    def _continue(self, number: int) -> None:
        """Goes on with a trial whose process died, from its last checkpoint, as long as that helps."""
        folder = self.study.trial_folder(number)
        saved = max(saved_steps(folder), default=0)
        deaths, saved_before = self.deaths.get(number, (0, -1))
        deaths = deaths + 1 if saved == saved_before else 1
        self.deaths[number] = (deaths, saved)
        if not connect.is_alive():
            self._halt(Interrupted("Ray is gone"))
        elif deaths > self.experiment.train.max_failures:
            self._end(number, f"failed: its process died {deaths} times in a row at step {saved}")
        elif not self.searcher.closed:
            trial = self.study.trial(number)
            late = late_results(self.study, trial)
            for _, epoch, value in late:
                self.scheduler.judge(number, epoch, value)
            decided = decide(self.study, trial, self.scheduler, late)
            if not decided.outcome:
                self.console.trial_interrupted(number, saved)
            self._take_up(decided)
        elif self.halt is None:
            self._end(number, "cancelled")

    def _report(self, number: int, epoch: int, value: float) -> None:
        """Tells Optuna a value once, and when that was, so that a resume can show the scheduler all values in their order."""
        trial = self.study.trial(number)
        if epoch in trial.intermediate_values:
            return
        live = self._live(number)
        live.set_user_attr("times", {**trial.user_attrs.get("times", {}), str(epoch): time.time()})
        live.report(value, epoch)

    def _open_run(self, number: int) -> None:
        if number not in self.runs:
            self.runs[number] = start_trial(self.tracker, self.study, self.study.trial(number), self.parent)

    def _end(self, number: int, outcome: str, failure: Failure | None = None) -> None:
        """Tells everybody how a trial ended; the table in docs/architecture.md."""
        trial, folder, metric = (
            self.study.trial(number),
            self.study.trial_folder(number),
            self.experiment.search.metric,
        )
        if trial.state != TrialState.RUNNING:
            return
        self._open_run(number)  # where it has none: it ended before it had started
        live, value = self._live(number), None
        if outcome == "finished":
            value = keep_best_model(folder, metric)
            if value is None or not math.isfinite(value):
                outcome = f"failed: {metric} was never a finite number"
        live.set_user_attr("outcome", outcome)
        if outcome.startswith("failed") and failure is not None and "NonFiniteLoss" not in failure.reason:
            live.set_user_attr("signature", failure.signature)
        if outcome == "finished":
            self.study.optuna.tell(number, value)
        else:
            self.study.optuna.tell(
                number, state=TrialState.PRUNED if outcome.startswith("stopped early") else TrialState.FAIL
            )
        end_trial(self.tracker, self.study, self.study.trial(number), self.runs.pop(number))
        values = [v for v in trial.intermediate_values.values() if math.isfinite(v)]
        self.console.trial_ended(number, outcome, max(values, default=None))
        warn_of_bad(folder, lambda text: self.console.warn(f"trial {number}: {text}"))

    def _finish(self) -> None:
        """Evaluates the best trial on the test images, once, and closes the study."""
        study = self.study
        reason = (
            self.ending or (study.ended if not self.scheduler.trials else None) or "all trials have ended"
        )
        study.optuna.set_user_attr("ended", reason)
        try:
            best = study.best()
        except UserError:
            outcomes = sorted(
                {t.user_attrs.get("outcome", "") for t in study.optuna.get_trials(deepcopy=False)}
            )
            self._close("cancelled" if reason == PERSON else "failed: no trial finished")
            raise UserError(
                f"{study.name}: ended with no finished trial: {reason}; {'; '.join(outcomes)}"
            ) from None
        config, model = study.save_best()
        tested = study.optuna.user_attrs.get("test", {})
        if "test" in self.ready.manifest.splits and tested.get("trial") != best.number:
            from deit_ray.trial.evaluation import evaluate_here

            tested = {
                "trial": best.number,
                **evaluate_here(model, self.experiment, self.ready.manifest, self.device, ("test",)),
            }
            study.optuna.set_user_attr("test", tested)
        self._close("cancelled" if reason == PERSON else "finished")
        metrics = {name: value for name, value in tested.items() if name != "trial"}
        self.console.study_ended(study, best, metrics, config, model)

    def _close(self, outcome: str) -> None:
        self.study.optuna.set_user_attr("outcome", outcome)
        end_study(self.tracker, self.study, self.parent, outcome)

    def _live(self, number: int) -> optuna.trial.Trial:
        return optuna.trial.Trial(self.study.optuna, self.study.trial(number)._trial_id)

    @contextlib.contextmanager
    def guarding(self) -> Iterator[None]:
        """Tune would take an exception of ours for one of the trial's: it halts the study instead, and is raised at its end."""
        try:
            with naming_database(self.study.folder):
                yield
        except Exception as error:
            self._halt(error)
