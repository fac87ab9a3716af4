"""What bench/findings.py makes of its runs: which teachers are equal, and whether a claim holds."""

import math

import pytest

from bench import findings_report
from bench.findings_report import FINDINGS, Finding, Found, compare
from bench.findings_runs import (
    BASES,
    EVERY,
    Run,
    equal_epochs,
    keep_result,
    read_results,
    train_run,
    write_digits,
)

# deviation of 1, 2, 3, 4, 5 is sqrt(2.5), so the error of their mean, 3, is sqrt(2.5 / 5) = 0.7071; the
# one-sided bound at 95% with four degrees of freedom is 2.132 errors, 1.507
VERDICTS = [
    ([1, 2, 3, 4, 5], False, "holds"),
    ([1, 2, 3, 4, 5], True, "does not hold: better"),
    ([-1, -2, -3, -4, -5], False, "does not hold: the opposite"),
    ([-1, -2, -3, -4, -5], True, "does not hold: worse"),
    ([-0.51, 0.49, 1.49, 2.49, 3.49], False, "does not hold: no difference shown"),  # mean 1.49
    ([-0.47, 0.53, 1.53, 2.53, 3.53], False, "holds"),  # mean 1.53
    ([-2, -1, 0, 1, 2], True, "holds: no difference shown"),
    ([1], False, "one seed only"),
]


@pytest.mark.parametrize(("differences", "same", "verdict"), VERDICTS)
def test_claim_holds_by_the_error_of_the_paired_difference(differences, same, verdict):
    assert Found(differences).verdict(same) == verdict
    if len(differences) == 5:
        assert math.isclose(Found(differences).error, math.sqrt(0.5))


def test_only_seeds_that_both_sides_have_are_compared():
    tops = {("none", 0): 0.5, ("none", 1): 0.6, ("hard", 1): 0.7, ("hard", 2): 0.9}
    results = {Run("digits", arm, seed): {"top1": top1} for (arm, seed), top1 in tops.items()}
    finding = Finding("hard is better", ("hard", "top1"), ("none", "top1"), 1.2, 3)
    assert compare("digits", finding, results).differences == pytest.approx([10])
    assert compare("cifar", finding, results) is None


@pytest.mark.parametrize(
    ("first", "second", "places"),
    [
        ([0.2, 0.5, 0.8, 0.9], [0.1, 0.2, 0.7, 0.78], (2, 3)),
        ([0.1, 0.2, 0.7, 0.78], [0.2, 0.5, 0.8, 0.9], (3, 2)),
        ([0.5, 0.5, 0.6, 0.9], [0.3, 0.4, 0.4, 0.5], (1, 3)),  # the latest of the nearest ones
        ([0.5, 0.9], [0.8, 0.9], (1, 1)),
    ],
)
def test_better_teacher_is_stopped_where_it_equals_the_other(first, second, places):
    assert equal_epochs(list(enumerate(first)), list(enumerate(second))) == places


def test_runs_give_a_report_and_are_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setitem(EVERY, "digits", 1)
    monkeypatch.setattr(findings_report, "RESULTS", tmp_path / "report")
    monkeypatch.setitem(BASES["digits"], "train.epochs", 2)
    monkeypatch.setitem(BASES["digits"], "optim.warmup_epochs", 1)
    write_digits(str(tmp_path / "digits-0"), 0)
    arms = ["convnet", "transformer", "none", "token", "token_equal_convnet", "token_equal_transformer"]
    runs = [Run("digits", arm, 0) for arm in arms]
    for run in runs:
        keep_result(run, train_run(run, tmp_path), tmp_path)
    results = read_results(tmp_path, runs)
    assert [run.arm for run in results] == arms
    curves = [results[run]["curve"] for run in runs[:2]]
    assert results[runs[3]]["teacher_top1"] == curves[0][-1][1]
    # a teacher that is stopped earlier is trained again, and is the same
    stopped = [curve[place][1] for curve, place in zip(curves, equal_epochs(*curves), strict=True)]
    assert [results[run]["teacher_top1"] for run in runs[4:]] == stopped

    findings_report.write_report(results)
    table = (tmp_path / "report" / "findings.md").read_text()
    assert (tmp_path / "report" / "findings.png").stat().st_size > 10_000
    sides = [{finding.first[0], finding.second[0]} for finding in FINDINGS]
    assert table.count("| one seed only |") == sum(side <= set(arms) for side in sides)

    monkeypatch.setitem(BASES["digits"], "train.epochs", 3)
    assert read_results(tmp_path, runs) == {}
