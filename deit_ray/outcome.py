"""How a run, trial or study ends: the table in docs/architecture.md as one type.

This file imports neither MLflow nor Optuna.
"""

from dataclasses import dataclass
from enum import StrEnum

MODEL, BAD_IMAGES = "model.safetensors", "bad_images.csv"  # files that MLflow gets when a run ends


REFUSED = "not started: "  # begins the reason of a trial that cannot run with its searched values


class Kind(StrEnum):
    """The four ways to end. A run that was interrupted has no outcome until a resume decides."""

    FINISHED = "finished"
    STOPPED_EARLY = "stopped early"
    FAILED = "failed"
    CANCELLED = "cancelled"


MLFLOW_STATUS = {
    Kind.FINISHED: "FINISHED",
    Kind.STOPPED_EARLY: "FINISHED",  # as in Optuna's and Ray's own MLflow integrations
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
    """How a run, trial or study ended.

    Attributes:
        kind: one of the four ways to end.
        detail: the epoch after which a trial was stopped early, or the reason of a failure; else empty.
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
    def refused(cls, reason: str) -> "Outcome":
        """The failure of a trial that was not started, since it cannot run with its searched values."""
        return cls(Kind.FAILED, REFUSED + reason)

    @classmethod
    def cancelled(cls) -> "Outcome":
        return cls(Kind.CANCELLED)

    @classmethod
    def parse(cls, text: str) -> "Outcome":
        """The outcome that a text states: the inverse of `text`.

        Raises:
            ValueError: the text is not an outcome.
        """
        for kind in Kind:
            if text == kind:
                return cls(kind)
            for separator in (" at epoch ", ": "):
                if text.startswith(kind + separator):
                    return cls(kind, text.removeprefix(kind + separator))
        raise ValueError(
            f"{text!r} is not an outcome; allowed: finished, stopped early at epoch N, failed: REASON, "
            "cancelled"
        )

    @property
    def is_refused(self) -> bool:
        """Whether it is the outcome of a trial that was not started."""
        return self.kind == Kind.FAILED and self.detail.startswith(REFUSED)

    @property
    def text(self) -> str:
        """The outcome in words: in files, Optuna's attribute, MLflow's tag and on the terminal."""
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
        """The tags of an MLflow run with this outcome."""
        pruned = {"state": "PRUNED"} if self.kind == Kind.STOPPED_EARLY else {}
        return {"outcome": self.text} | pruned

    @property
    def optuna_state(self) -> str:
        """The name of Optuna's TrialState."""
        return OPTUNA_STATE[self.kind]
