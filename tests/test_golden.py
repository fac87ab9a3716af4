"""What bench/golden.py takes for a difference, and which difference it accepts when it is told to."""

import mlflow
import pytest

from bench.golden import (
    check_read_apart,
    early_stopped_status,
    figures_of,
    mlflow_values,
    named,
    printed_values,
)

RUN = "mlflow trial 001 lr=0.1"
THEN = {
    f"{RUN} status": "'KILLED'",
    f"{RUN} tag outcome": "'stopped early at epoch 2'",
    f"{RUN} metric lr 1": "0.1",
}
NOW = THEN | {f"{RUN} status": "'FINISHED'", f"{RUN} tag state": "'PRUNED'"}
EXPECT = ["early-stopped-status"]


def test_the_new_status_of_a_trial_that_was_stopped_early_is_accepted_when_it_is_expected():
    assert figures_of(THEN, NOW, []) == {"differing": 2, "compared": 4, "expected": 0}
    assert figures_of(THEN, NOW, EXPECT) == {"differing": 0, "compared": 4, "expected": 2}


def test_nothing_but_that_status_with_its_tag_is_accepted():
    assert figures_of(THEN, NOW | {f"{RUN} metric lr 1": "0.2"}, EXPECT)["differing"] == 1
    without_tag = {name: text for name, text in NOW.items() if not name.endswith("tag state")}
    other_status = NOW | {f"{RUN} status": "'FAILED'"}
    finished = {f"{RUN} tag outcome": "'finished'"}
    for then, now in ((THEN, without_tag), (THEN, other_status), (THEN | finished, NOW | finished)):
        assert early_stopped_status(then, now) == set()
        assert figures_of(then, now, EXPECT)["expected"] == 0


def test_the_best_value_of_a_finished_run_is_accepted_when_it_is_expected_and_was_measured():
    curve = {f"{RUN} metric val/top1 {step}": value for step, value in ((1, "0.5"), (2, "0.75"), (3, "0.25"))}
    added = {f"{RUN} metric best/val/top1 0": "0.75", "optuna study attr largest_class val": "0.1"}
    assert figures_of(curve, curve | added, [])["differing"] == 2
    assert figures_of(curve, curve | added, ["best-value"])["differing"] == 0
    wrong = {f"{RUN} metric best/val/top1 0": "0.76", f"{RUN} metric other 0": "1"}
    assert figures_of(curve, curve | wrong, ["best-value"])["differing"] == 2
    assert figures_of(curve | added, curve, ["best-value"])["differing"] == 2


def test_more_params_tags_and_final_values_are_accepted_when_they_are_expected():
    then = {f"{RUN} metric {name}": "0.5" for name in ("val/top1 9", "best/val/top1 0", "val/images 9")}
    then |= {f"{RUN} param optim.lr": "'0.1'"}
    now = {f"{RUN} metric {name}": "0.5" for name in ("val/top1 9", "best/val_top1 0", "best/test_top1 0")}
    now |= {f"{RUN} metric best/epoch 0": "3.0", f"{RUN} param optim.lr": "'0.1'", f"{RUN} param seed": "'0'"}
    assert figures_of(then, now, ["described-runs"])["differing"] == 0
    wrong = {f"{RUN} metric best/val_top1 0": "0.6", f"{RUN} param optim.lr": "'0.2'"}
    assert figures_of(then, now | wrong, ["described-runs"])["differing"] == 3
    assert figures_of(now, then, ["described-runs"])["differing"] > 3


def test_a_value_that_one_side_lacks_or_has_twice_is_a_difference():
    once, twice = named([("journal a loss 1", 0.5)]), named([("journal a loss 1", 0.5)] * 2)
    assert figures_of(once, twice, [])["differing"] == figures_of(twice, once, [])["differing"] == 1
    assert figures_of(twice, twice, [])["differing"] == 0


def test_the_numbers_of_evaluations_and_predictions_are_read():
    output = "warning: something\ntest/loss 2.31  test/top1 0.1337\nimages/00.png: 3 97.1%, 8 1.2%\n"
    assert dict(printed_values("x", output)) == {
        "prediction x test/loss": "2.31",
        "prediction x test/top1": "0.1337",
        "prediction x images/00.png 3": "97.1",
        "prediction x images/00.png 8": "1.2",
    }


def test_the_runs_of_one_revision_are_not_read_for_both(tmp_path, thorough):
    found = []
    for revision in ("then", "now"):
        results = tmp_path / f"work of {revision}" / "results"
        results.mkdir(parents=True)
        client = mlflow.MlflowClient(f"sqlite:///{results}/mlflow.db")
        client.create_run(client.create_experiment("golden"), run_name=revision)
        found.append(named(mlflow_values(results)))
    check_read_apart(*found)
    with pytest.raises(RuntimeError, match="read for both"):
        check_read_apart(found[0], found[0])
    with pytest.raises(RuntimeError, match="read for both"):
        check_read_apart(found[0], {})
