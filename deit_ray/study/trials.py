"""The trials of a running study: they start, report, continue and end as the `StopPolicy` decides."""

import math

from optuna.trial import TrialState

from deit_ray.cluster import connect
from deit_ray.cluster.holdings import cancel
from deit_ray.experiment.space import Refusal
from deit_ray.outcome import Kind, Outcome
from deit_ray.results.folders import keep_best_model, saved_steps
from deit_ray.study.observers import Observer, TrialEnd
from deit_ray.study.records import Spent
from deit_ray.study.resume import Reconciled, decide, late_results
from deit_ray.study.schedule import StudyScheduler
from deit_ray.study.searcher import StudySearcher
from deit_ray.study.stop_policy import Continue, Decision, End, Halt, OpenTrials, Orders, StopPolicy
from deit_ray.study.study import Study
from deit_ray.trial.failure import Failure, read_failure


class Trials:
    """Carries out what the policy decides about trials, and calls each observer in turn.

    Args:
        observers: in the order in which they are called.
        refusal: says why a trial with some searched values cannot run; None if it can.

    Attributes:
        searcher: proposes trials to Ray Tune.
        scheduler: stops trials early.
        policy: decides which other trials end.
    """

    def __init__(self, study: Study, observers: list[Observer], refusal: Refusal):
        self.study, self.observers = study, observers
        self.metric = study.experiment.search.metric
        self.policy = StopPolicy(study.experiment)
        self.scheduler = StudyScheduler(study.experiment)
        self.searcher = StudySearcher(
            study.optuna, study.experiment, study.trial_folder, refusal, self.refused, study.as_one
        )

    # events

    def started(self, number: int) -> None:
        for observer in self.observers:
            observer.trial_started(number)

    def reported(self, number: int, result: dict) -> None:
        for observer in self.observers:
            observer.trial_reported(number, result)

    def completed(self, number: int) -> None:
        """A trial finished, was stopped by the scheduler, or ended because it was asked to."""
        for observer in self.observers:
            observer.trial_left(number)
        self._do(number, self.policy.after_completion(number, self.study.trial(number).epoch))

    def failed(self, number: int, failure: Failure) -> None:
        """A trial raised an error."""
        for observer in self.observers:
            observer.trial_left(number)
        self._do(number, self.policy.after_failure(number, failure), failure)

    def died(self, number: int, death: str) -> None:
        """The process of a trial died; `death` says so."""
        for observer in self.observers:
            observer.trial_left(number)
        saved = max(saved_steps(self.study.trial_folder(number)), default=0)
        self._do(number, self.policy.after_death(number, death, saved, connect.is_alive()))

    def refused(self, number: int, why: str) -> None:
        """A trial drew values with which it cannot run; it ends without being started."""
        self._end(number, Outcome.refused(why))

    def has_ended(self, number: int) -> bool:
        return self.study.trial(number).state.is_finished()

    # requests

    def resume(self, found: list[Reconciled]) -> None:
        """Brings database and MLflow up to date with the trials that the last driver left."""
        for decided in found:
            if decided.action == "kept":
                for observer in self.observers:
                    observer.trial_kept(decided.number)
            else:
                for observer in self.observers:
                    observer.trial_reopened(decided.number)
                self._end_or_propose(decided)

    def stop(self, number: int | None) -> None:
        """A person asks to cancel a trial; None asks to end the study."""
        self._carry_out(self.policy.stop(number, self._open()))

    def check_budgets(self, spent: Spent) -> None:
        self._carry_out(self.policy.check_budgets(self.study.records(), spent, self._open()))

    def halt(self, error: Exception) -> None:
        """An error stops the study: its trials stay as they are, for a resume."""
        self._carry_out(self.policy.halt(error, self._open() if connect.is_alive() else OpenTrials()))

    # how decisions are carried out

    def _open(self) -> OpenTrials:
        return OpenTrials(self.searcher.waiting(), self.scheduler.started())

    def _carry_out(self, orders: Orders) -> None:
        if self.policy.is_closed:
            self.searcher.close()
        for number in orders.end:
            self.searcher.remove(number)
            self._end(number, Outcome.cancelled())
        for number in orders.ask:
            if self.scheduler.is_running(number):
                cancel(self.study.trial_folder(number))
            else:
                self.scheduler.stop(number)

    def _do(self, number: int, decision: Decision, failure: Failure | None = None) -> None:
        match decision:
            case End(outcome):
                self._end(number, outcome, failure)
            case Continue(death, step):
                self._continue(number, death, step)
            case Halt(error):
                self.halt(error)

    def _end(self, number: int, outcome: Outcome, failure: Failure | None = None) -> None:
        """Ends a trial, unless it has ended; the table in docs/architecture.md shows the effects."""
        if self.study.trial(number).state != TrialState.RUNNING:
            return
        value = None
        if outcome.kind == Kind.FINISHED:
            value = keep_best_model(self.study.trial_folder(number), self.metric)
            if value is None or not math.isfinite(value):
                outcome, value = Outcome.failed(f"{self.metric} was never a finite number"), None
        for observer in self.observers:
            observer.trial_ended(TrialEnd(number, outcome, value, failure))

    def _continue(self, number: int, death: str, step: int) -> None:
        """Continues a trial whose process died, unless its journal says that it had ended."""
        trial = self.study.trial(number)
        late = late_results(self.study, trial)
        for _, epoch, value in late:
            self.scheduler.judge(number, epoch, value)
        decided = decide(self.study, trial, self.scheduler, late)
        if not decided.outcome:
            for observer in self.observers:
                observer.trial_interrupted(number, death, step)
        self._end_or_propose(decided)

    def _end_or_propose(self, decided: Reconciled) -> None:
        """Notes the late results of a trial; then ends the trial, or proposes it again."""
        number = decided.number
        self.searcher.complete(number)
        for observer in self.observers:
            observer.results_found(number, decided.late)
        if decided.outcome:
            self._end(number, decided.outcome, read_failure(self.study.trial_folder(number)))
        else:
            self.searcher.put_back(number)
