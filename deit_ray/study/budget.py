"""What a study may spend, and what it has spent so far, over all its resumes."""

from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from deit_ray.experiment.config import Experiment

HOUR_S = 3600.0


@dataclass
class Spent:
    """Time that a study has taken.

    Attributes:
        wall_s: in which a driver ran it.
        gpu_s: of all its trials' GPUs together.
    """

    wall_s: float = 0.0
    gpu_s: float = 0.0


def exceeded(experiment: Experiment, trials: list[FrozenTrial], spent: Spent) -> str | None:
    """The budget that is used up, in words; None while there is some left of each."""
    budget = experiment.search.budget
    if budget.hours is not None and spent.wall_s >= budget.hours * HOUR_S:
        return f"search.budget.hours: {budget.hours:g} are used up"
    if budget.gpu_hours is not None and spent.gpu_s >= budget.gpu_hours * HOUR_S:
        return f"search.budget.gpu_hours: {budget.gpu_hours:g} are used up"
    ended = sorted(
        (trial for trial in trials if trial.state.is_finished()), key=lambda trial: trial.datetime_complete
    )
    finished = [trial for trial in ended if trial.state == TrialState.COMPLETE]
    best = max(finished, key=lambda trial: trial.value, default=None)  # the earliest of equals
    if budget.target is not None and best is not None and best.value >= budget.target:
        return (
            f"search.budget.target: trial {best.number} has reached {budget.target:g} with {best.value:.4f}"
        )
    judged = [trial for trial in ended if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    if (
        budget.patience is not None
        and best is not None
        and len(judged) - 1 - judged.index(best) >= budget.patience
    ):
        return f"search.budget.patience: {budget.patience} trials in a row were no better than trial {best.number}"
    failed = [trial for trial in ended if trial.user_attrs.get("outcome", "").startswith("failed")]
    if budget.failures is not None and len(failed) >= budget.failures:
        return f"search.budget.failures: {len(failed)} trial{'s' * (len(failed) > 1)} failed"
    signatures = [trial.user_attrs["signature"] for trial in failed if "signature" in trial.user_attrs]
    most = max(signatures, key=signatures.count, default=None)
    if budget.same_failure is not None and signatures.count(most) >= budget.same_failure:
        last = next(trial for trial in reversed(failed) if trial.user_attrs.get("signature") == most)
        return f"search.budget.same_failure: {signatures.count(most)} trials failed in the same way, the last {last.user_attrs['outcome']}"
    return None
