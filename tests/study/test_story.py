"""A study's story: one function tells it, and MLflow's description, `status` and `report` show it."""

import re

import optuna
import pytest
from markdown_it import MarkdownIt
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from deit_ray.outcome import Outcome
from deit_ray.study.description import CHARS, describe
from deit_ray.study.records import Spent, TrialRecord
from deit_ray.study.story import BEST_SHOWN, LEAST_FINISHED, evaluator, tell, tell_trial
from tests.support.studies import told_trial

EARLY, FAILED = Outcome.stopped_early(5), Outcome.failed("the loss is nan at step 7 | see <log>")
KINDS = {
    "augment.policy": CategoricalDistribution(["none", "randaugment", "three_augment"]),
    "augment.cutmix": CategoricalDistribution([True, False]),
    "data.views": IntDistribution(1, 3),
    "optim.lr": FloatDistribution(1e-5, 1e-1, log=True),
}


def of_kinds(number: int) -> FrozenTrial:
    """A finished trial with a value of each kind of distribution."""
    params = {
        "augment.policy": ["none", "randaugment", "three_augment"][number % 3],
        "augment.cutmix": number % 2 == 0,
        "data.views": 1 + number % 3,
        "optim.lr": 10 ** -(1 + number % 4),
    }
    return told_trial(number, [0.5, 0.5 + number / 100], distributions=KINDS, params=params)


def many(count: int, keys: int = 10) -> list[FrozenTrial]:
    """Trials with many long values, of which every second one is stopped early and every tenth fails."""
    space = {
        f"section.key_of_a_long_name_{k}": CategoricalDistribution(["v" * 60, "w" * 90]) for k in range(keys)
    }
    outcomes = [Outcome.finished(), EARLY, Outcome.finished(), EARLY, Outcome.failed("reason " * 100)]
    return [
        told_trial(
            n,
            [0.3, 0.4 + n / (2 * count)],
            outcomes[n % 5],
            space,
            dict.fromkeys(space, "v" * 60 if n % 2 else "w" * 90),
        )
        for n in range(count)
    ]


STUDIES = {  # trials, why it has ended, and words that the description has
    "no trial": (
        [],
        None,
        ["made-1: interrupted", "1000 not drawn yet", "no trial has finished yet", "--resume made-1"],
    ),
    "a trial runs": ([told_trial(0, [0.2], None)], None, ["1 interrupted", "no trial has finished yet"]),
    "one finished": (
        [told_trial(0, [0.25, 0.75, 0.5])],
        "all trials have ended",
        ["Best: trial 0, val/top1 0.7500", "as the best of 3 evaluations", "--trials +20", "best.yaml"],
    ),
    "two finished, no images": (
        [told_trial(0, [0.5], images=None), told_trial(1, [0.5], images=None)],
        "all trials have ended",
        ["| = 0.5000 |", "within the error of the best"],
    ),
    "only failures": (
        [told_trial(n, [], FAILED) for n in range(3)],
        "search.budget.failures: 3 trials failed",
        [
            "no trial has finished",
            "trials 0, 1, 2: the loss is nan at step 7 &#124; see &lt;log&gt;",
            "--set search.budget.failures=VALUE",
        ],
    ),
    "stopped early": (
        [told_trial(0, [0.5] * 30), told_trial(1, [0.125] * 5, EARLY), told_trial(2, [0.25] * 5, EARLY)],
        "all trials have ended",
        [
            "After epoch 5, 10, 20 a trial goes on",
            "| 5 | 2 | 0.1250 to 0.2500 |",
            "50 were saved by early stops",
        ],
    ),
    "every kind of value": (
        [of_kinds(n) for n in range(12)],
        "search.space is exhausted: each of its 12 combinations was tried",
        ["| `augment.cutmix` | False |", "three\\_augment", "PED-ANOVA"],
    ),
    "very many": (many(60), "all trials have ended", ["of 60 trials; the table of runs has all"]),
}  # fmt: skip


@pytest.mark.parametrize("case", STUDIES)
def test_the_description_of_every_study_fits_and_renders(make_told, case):
    trials, ended, words = STUDIES[case]
    story = tell(make_told(trials, ended))
    text = describe(story)
    assert len(text) <= CHARS
    assert [word for word in words if word not in text] == []
    assert describe(tell(make_told(trials, ended))).replace("made-2", "made-1") == text
    rendered = MarkdownIt("commonmark").enable("table").render(text)
    tables = re.findall(r"<table>(.*?)</table>", rendered, re.DOTALL)
    assert len(tables) == text.count("| --- |\n")
    for table in tables:  # no value breaks a row
        assert len({row.count("</t") for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)}) == 1
    boards = [table for table in tables if "<th>trial</th>" in table]
    assert [board.count("<tr>") > 1 for board in boards] == ([True] if trials else [])
    assert "\\_" not in rendered
    assert "<log>" not in rendered


def test_ties_and_the_order_are_the_leaderboards_and_the_best_20_are_shown(make_told):
    study = make_told([told_trial(n, [0.5 + n / 1000]) for n in range(30)], "all trials have ended")
    story = tell(study)
    board = study.leaderboard()
    text = describe(story)
    shown = re.findall(r"^\| (\d+) \| finished \| 1 \| (= )?0\.\d{4} \(", text, re.MULTILINE)
    assert [int(number) for number, _ in shown] == list(board["trial"][:BEST_SHOWN]) == list(range(29, 9, -1))
    assert [bool(close) for _, close in shown] == list(board["close"][:BEST_SHOWN])
    assert f"The best {BEST_SHOWN} of 30 trials" in text


def test_importances_are_ped_anovas_and_find_the_key_that_decides(make_told):
    space = {"optim.lr": FloatDistribution(1e-5, 1e-1, log=True), "augment.strength": FloatDistribution(0, 2)}

    def trial(n: int) -> FrozenTrial:
        params = {"optim.lr": 10 ** -(1 + 4 * (n * 7 % 40) / 40), "augment.strength": 2 * (n * 11 % 40) / 40}
        return told_trial(n, [params["augment.strength"] / 2], distributions=space, params=params)

    study = make_told([trial(n) for n in range(40)], "all trials have ended")
    found = tell(study).importances
    assert list(found) == ["augment.strength", "optim.lr"]
    assert sum(found.values()) == pytest.approx(1)
    assert found["augment.strength"] > 0.8
    assert found == pytest.approx(
        optuna.importance.get_param_importances(study.optuna, evaluator=evaluator(40))
    )
    few = make_told([trial(n) for n in range(LEAST_FINISHED - 1)], "all trials have ended")
    assert tell(few).importances == {}
    even = make_told([told_trial(n, [0.5], params={"optim.lr": 1e-3}) for n in range(12)], "x")
    assert describe(tell(even))  # no key differs


def test_cost_names_gpu_hours_and_money(make_told):
    study = make_told([told_trial(0, [0.5])], "all trials have ended")
    study.spent = Spent(wall_s=3725, gpu_s=7200)
    assert tell(study).cost() == "1 h 02 min, 2.00 GPU-hours"
    study.experiment = study.experiment.with_overrides({"cost.per_gpu_hour": 2.5})
    assert tell(study).cost() == "1 h 02 min, 2.00 GPU-hours, 5.00 (cost.per_gpu_hour)"


@pytest.mark.parametrize(
    ("values", "outcome", "line"),
    [
        (
            [0.25, 0.75, 0.5],
            Outcome.finished(),
            "finished: val/top1 0.7500 (0.655-0.826) at epoch 2, the best of 3 evaluations",
        ),
        (
            [0.25] * 5,
            EARLY,
            "stopped early by asha after epoch 5 of 30; its best val/top1 0.2500 (0.169-0.353) at epoch 5",
        ),
        ([], FAILED, "failed before its first evaluation: the loss is nan at step 7 | see <log>"),
        ([0.5], Outcome.failed("x"), "failed after epoch 1 of 30: x"),
        ([], Outcome.refused("too large"), "not started: too large"),
        ([], Outcome.cancelled(), "cancelled before its first evaluation"),
        (
            [0.5],
            Outcome.cancelled(),
            "cancelled after epoch 1 of 30; its best val/top1 0.5000 (0.419-0.581) at epoch 1",
        ),
    ],
)
def test_a_line_says_what_became_of_a_trial(values, outcome, line):
    assert tell_trial(TrialRecord(told_trial(0, values, outcome)), "val/top1", 30, "asha") == line
