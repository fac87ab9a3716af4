"""How a run, trial or study ends: the table of docs/architecture.md as one type.

It imports neither MLflow nor Optuna.
"""

from dataclasses import dataclass
from enum import StrEnum

MODEL, BAD_IMAGES = "model.safetensors", "bad_images.csv"  # names of the files that an end makes artifacts


class Kind(StrEnum):
    """The four ways to end. A run that was interrupted has no outcome until a resume decides."""

    FINISHED = "finished"
    STOPPED_EARLY = "stopped early"
    FAILED = "failed"
    CANCELLED = "cancelled"


MLFLOW_STATUS = {
    Kind.FINISHED: "FINISHED",
    Kind.STOPPED_EARLY: "FINISHED",  # as Optuna's and Ray's own integrations: nothing went wrong
    Kind.FAILED: "FAILED",
    Kind.CANCELLED: "KILLED",
}
OPTUNA_STATE = {
    Kind.FINISHED: "COMPLETE",
    Kind.STOPPED_EARLY: "PRUNED",
    Kind.FAILED: "FAIL",
    Kind.CANCELLED: "FAIL",
}


@dataclass(frozen=True)
class Outcome:
    """How something ended.

    Attributes:
        kind: which of the four ways.
        detail: the epoch of one that was stopped early, the reason of one that failed; else empty.
    """

    kind: Kind
    detail: str = ""

    @classmethod
    def finished(cls) -> "Outcome":
        return cls(Kind.FINISHED)

    @classmethod
    def stopped_early(cls, epoch: int) -> "Outcome":
        return cls(Kind.STOPPED_EARLY, str(epoch))

    @classmethod
    def failed(cls, reason: str) -> "Outcome":
        return cls(Kind.FAILED, reason)

    @classmethod
    def cancelled(cls) -> "Outcome":
        return cls(Kind.CANCELLED)

    @classmethod
    def parse(cls, text: str) -> "Outcome":
        """The inverse of `text`.

        Raises:
            ValueError: the text is no outcome.
        """
        for kind in Kind:
            if text == kind:
                return cls(kind)
            for separator in (" at epoch ", ": "):
                if text.startswith(kind + separator):
                    return cls(kind, text.removeprefix(kind + separator))
        raise ValueError(
            f"{text!r} is no outcome; allowed: finished, stopped early at epoch N, failed: REASON, cancelled"
        )

    @property
    def text(self) -> str:
        """As files, Optuna's attribute, MLflow's tag and the terminal have it."""
        if self.kind == Kind.STOPPED_EARLY:
            return f"{self.kind} at epoch {self.detail}"
        return f"{self.kind}: {self.detail}" if self.detail else str(self.kind)

    @property
    def brief(self) -> str:
        """The text without the reason of a failure."""
        return str(self.kind) if self.kind == Kind.FAILED else self.text

    @property
    def mlflow_status(self) -> str:
        return MLFLOW_STATUS[self.kind]

    @property
    def mlflow_tags(self) -> dict[str, str]:
        """The tags of a run that ended so."""
        pruned = {"state": "PRUNED"} if self.kind == Kind.STOPPED_EARLY else {}
        return {"outcome": self.text} | pruned

    @property
    def optuna_state(self) -> str:
        """The name of Optuna's TrialState."""
        return OPTUNA_STATE[self.kind]

    @property
    def artifacts(self) -> tuple[str, ...]:
        """The files of a run's folder that become MLflow's artifacts at its end, where they exist."""
        return (MODEL, BAD_IMAGES) if self.kind == Kind.FINISHED else (BAD_IMAGES,)
