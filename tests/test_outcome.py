"""Outcomes of runs, trials and studies: one table, with the texts that files of every version have."""

import subprocess
import sys

import pytest

from deit_ray.outcome import Outcome

# as in docs/architecture.md: text (MLflow's tag, Optuna's attribute), Optuna's state, MLflow's status and
# tag `state`
TABLE = [
    (Outcome.finished(), "finished", "COMPLETE", "FINISHED", None),
    (Outcome.stopped_early(3), "stopped early at epoch 3", "PRUNED", "FINISHED", "PRUNED"),
    (Outcome.failed("OSError: x: y at epoch 1"), "failed: OSError: x: y at epoch 1", "FAIL", "FAILED", None),
    (Outcome.cancelled(), "cancelled", "FAIL", "KILLED", None),
]


@pytest.mark.parametrize(("outcome", "text", "optuna", "mlflow", "state"), TABLE)
def test_every_outcome_has_its_text_states_and_tags(outcome, text, optuna, mlflow, state):
    assert outcome.text == text
    assert Outcome.parse(text) == outcome
    assert (outcome.optuna_state, outcome.mlflow_status) == (optuna, mlflow)
    assert outcome.mlflow_tags == {"outcome": text} | ({"state": state} if state else {})


def test_the_brief_text_leaves_out_the_reason_of_a_failure_alone():
    assert [outcome.brief for outcome, *_ in TABLE] == [
        "finished",
        "stopped early at epoch 3",
        "failed",
        "cancelled",
    ]


@pytest.mark.parametrize("text", ["", "running", "finishedly", "stopped", "stopped early at"])
def test_another_text_is_refused(text):
    with pytest.raises(
        ValueError, match="is not an outcome; allowed: finished, stopped early at epoch N, failed"
    ):
        Outcome.parse(text)


def test_outcome_loads_neither_mlflow_nor_optuna():
    code = "import sys, deit_ray.outcome; print(sorted({'mlflow', 'optuna', 'ray'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"[]\n"
