"""The budgets that can end a study before all its trials have run."""

from optuna.trial import TrialState

from deit_ray.experiment.config import Budget, Experiment
from deit_ray.outcome import Kind
from deit_ray.study.records import Spent, TrialRecord
from deit_ray.terminal.format import counted

HOUR_S = 3600.0


def exceeded(experiment: Experiment, trials: list[TrialRecord], spent: Spent) -> str | None:
    """The budget that is used up, in words; None if no budget is used up."""
    budget = experiment.search.budget
    ended = sorted((trial for trial in trials if trial.state.is_finished()), key=lambda trial: trial.ended)
    return _time(budget, spent) or _values(budget, ended) or _failures(budget, ended)


def _time(budget: Budget, spent: Spent) -> str | None:
    if budget.hours is not None and spent.wall_s >= budget.hours * HOUR_S:
        return f"search.budget.hours: {budget.hours:g} are used up"
    if budget.gpu_hours is not None and spent.gpu_s >= budget.gpu_hours * HOUR_S:
        return f"search.budget.gpu_hours: {budget.gpu_hours:g} are used up"
    return None


def _values(budget: Budget, ended: list[TrialRecord]) -> str | None:
    """Judges the values of trials, given in the order in which they ended."""
    finished = [trial for trial in ended if trial.state == TrialState.COMPLETE]
    best = max(finished, key=lambda trial: trial.value, default=None)  # of equal ones, the earliest
    if best is None:
        return None
    if budget.target is not None and best.value >= budget.target:
        value = f"{best.value:.4f}"
        return f"search.budget.target: trial {best.number} has reached {budget.target:g} with {value}"
    if budget.patience is None:
        return None
    judged = [trial for trial in ended if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    since = len(judged) - 1 - judged.index(best)
    if since >= budget.patience:
        row = f"{budget.patience} trials in a row"
        return f"search.budget.patience: {row} were no better than trial {best.number}"
    return None


def _failures(budget: Budget, ended: list[TrialRecord]) -> str | None:
    """Counts the failures of trials, given in the order in which they ended. A trial must have started."""
    outcomes = [(trial, trial.outcome) for trial in ended if trial.outcome]
    failed = [trial for trial, outcome in outcomes if outcome.kind == Kind.FAILED and not outcome.is_refused]
    if budget.failures is not None and len(failed) >= budget.failures:
        return f"search.budget.failures: {counted(len(failed), 'trial')} failed"
    signatures = [trial.signature for trial in failed if trial.signature is not None]
    most = max(signatures, key=signatures.count, default=None)
    count = signatures.count(most)
    if budget.same_failure is not None and count >= budget.same_failure:
        last = next(trial for trial in reversed(failed) if trial.signature == most)
        return (
            f"search.budget.same_failure: {count} trials failed in the same way, the last {last.outcome.text}"
        )
    return None
