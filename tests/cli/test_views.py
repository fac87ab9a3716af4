"""Tables fit the terminal: columns are dropped from the right, and what people type is never cut."""

import io
import json
import re

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from deit_ray.cli.views import show_difference, show_studies, show_study
from deit_ray.commands.diff import Difference
from deit_ray.data import shards
from deit_ray.experiment.load import load_experiment
from deit_ray.outcome import Outcome
from deit_ray.study.leaderboard import leaderboard
from deit_ray.study.records import StudyRecord, TrialRecord
from deit_ray.study.story import Story
from deit_ray.terminal.console import Console as DeitConsole
from deit_ray.terminal.live import RunView, StudyView
from deit_ray.terminal.progress import shown_on
from deit_ray.terminal.table import FittedTable
from deit_ray.trial.remarks import remarks_before, teacher_remark
from tests.conftest import EXPERIMENTS

WIDTHS = (40, 60, 80, 200)
STUDY = "own_images_search_of_the_second_camera-12"
REASON = (
    "patience: 8 trials in a row ended without a value better than the best one, which search.budget allows"
)
KEYS = ["augment.strength", "optim.lr", "distillation.weight", "student.drop_path"]
IMAGES = 24


def rendered(shown, width: int) -> str:
    """What a terminal of this width gets, as `Console` prints it."""
    console = Console(width=width, highlight=False, soft_wrap=True, file=io.StringIO())
    console.print(shown)
    return console.file.getvalue()


def record(number: int, values: list[float], state=TrialState.COMPLETE, images: int = IMAGES) -> TrialRecord:
    ended = {"value": max(values)} if state == TrialState.COMPLETE else {}
    trial = optuna.trial.create_trial(
        state=state,
        params=dict.fromkeys(KEYS, 0.123456 * (number + 1)),
        distributions={key: optuna.distributions.FloatDistribution(0, 1e4) for key in KEYS},
        intermediate_values=dict(enumerate(values, 1)),
        user_attrs={"images": images} | ({"outcome": "finished"} if ended else {}),
        **ended,
    )
    trial.number = number
    return TrialRecord(trial)


def status(trials: list[TrialRecord], **changes) -> Story:
    board = leaderboard(trials, KEYS)
    fields = {
        "name": STUDY, "folder": f"/results/{STUDY}",
        "metric": "val/top1", "keys": KEYS, "epochs": 30, "state": REASON, "driver": None,
        "counts": dict(board["state"].value_counts()), "missing": 3, "spent_s": 5000.0, "gpu_s": 0.0,
        "board": board, "images": IMAGES, "tested": {}, "largest": {},
    }  # fmt: skip
    return Story(**fields | changes)


TRIALS = [
    record(1000, [0.5, 1.0, 0.9]),
    record(1001, [0.5, 0.958]),
    record(1002, [0.25, 0.2]),
    record(1003, [0.3], TrialState.RUNNING),
]


@pytest.mark.parametrize("width", WIDTHS)
def test_no_width_cuts_a_study_or_a_trial(width):
    whole = rendered(show_studies([status(TRIALS)]), width)
    assert STUDY in whole.replace("\n", "")
    assert "…" not in whole
    shown = rendered(show_study(status(TRIALS)), width)
    assert all(re.search(rf"^ *{number} ", shown, re.MULTILINE) for number in (1000, 1001, 1002, 1003))
    assert STUDY in shown
    assert "…" not in shown
    table = [line for line in shown.splitlines() if re.match(r" *(\d{4}|trial) ", line)]
    assert max(map(len, table)) <= width
    if width >= 60:
        assert (
            "1.0000 (0.807-1.000)" in shown
        )  # Wilson's interval for 24 of 24, the best of three evaluations
    assert ("drop_path" in next(line for line in table if "trial" in line)) == (width == 200)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_reason_of_an_ended_study_takes_lines_and_no_columns(width):
    shown = rendered(show_studies([status(TRIALS), status(TRIALS, name="short-1", state="running")]), width)
    first = shown.splitlines()[0].split()
    assert first[:2] == ["study", "best"]
    assert "short-1" in shown
    if width >= 80:
        words = " ".join(" ".join(line.split()) for line in shown.splitlines())
        assert all(word in words for word in REASON.split())


@pytest.mark.parametrize("width", WIDTHS)
def test_the_live_table_never_cuts_a_trials_number(width):
    console = DeitConsole()
    console.out = Console(width=width, height=24, file=io.StringIO())
    view = StudyView(console, STUDY, load_experiment(EXPERIMENTS / "digits_search.yaml"))
    params = {"augment.strength": 1.5, "optim.lr": 0.00123, "distillation.weight": 0.123}
    for number in range(1000, 1100):
        view.trial_started(number, params)
        view.trial_reported(
            number,
            {"epoch": 3, "step": 12345, "val/top1": 1.0, "val/images": 24.0, "perf/images_per_s": 1234.0},
        )
        if number > 1001:
            view.trial_ended(number, Outcome.finished(), 1.0)
    shown = rendered(view._table(), width)
    assert "1000" in shown  # running trials are shown first, however many have ended since
    assert "1099" in shown
    assert all(len(line) <= width for line in shown.splitlines() if re.match(r" *\d{4} ", line))
    assert len(shown.splitlines()) <= 24
    assert "…" not in shown
    assert "± 0.000" not in shown


@pytest.mark.parametrize("width", WIDTHS)
def test_a_difference_shows_whole_names_keys_and_values(width):
    names = (f"{STUDY}/trial-0007", f"{STUDY}/trial-0011")
    settings = {"distillation.teacher.weights": ("run:own_images_teacher-1", None), "optim.lr": (0.1, 0.2)}
    found = Difference(names, settings, {}, "", {}, {}, {}, "val/top1", ((1.0, 0.9), None))
    shown = rendered(show_difference(found), width)
    flat = re.sub(r"\s", "", shown)
    assert all(name in flat for name in (*names, "run:own_images_teacher-1", "distillation.teacher.weights"))
    assert "…" not in shown


def test_a_pipe_gets_no_spaces_at_the_ends_of_lines(capsys):
    table = FittedTable("name", "value")
    table.add_row("a", "1")
    table.add_row("b " * 9, "")
    DeitConsole().out.print(table)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [line.rstrip() for line in lines]
    assert len({line.index(word) for line, word in zip(lines, ("value", "1"), strict=False)}) == 1


def test_brackets_in_a_cell_are_text():
    table = FittedTable("class")
    table.add_row("[bold]red[/bold] [x")
    assert "[bold]red[/bold] [x" in rendered(table, 40)


@pytest.mark.parametrize("width", WIDTHS)
def test_progress_keeps_its_name_and_counts(width):
    console = DeitConsole()
    console.out = Console(width=width, height=24, file=io.StringIO(), force_terminal=True)
    with shown_on(console)("checking images", 123456) as advance:
        advance(120000)
    shown = console.out.file.getvalue()
    assert "checking images" in shown
    assert "120000/123456" in shown


def test_ties_are_marked_by_the_interval_and_the_best_is_not_green_at_chance():
    board = leaderboard(TRIALS, KEYS).set_index("trial")
    assert list(board.index[:3]) == [1000, 1001, 1002]
    assert dict(board["close"]) == {1000: False, 1001: True, 1002: False, 1003: False}
    assert board.loc[1000, "error"] > 0.05  # 24 of 24
    many = leaderboard([record(0, [0.76], images=50_000), record(1, [0.75], images=50_000)], KEYS)
    assert not many["close"].any()
    tested = {"test/top1": 0.35, "test/images": 60.0}
    shown = rendered(show_study(status(TRIALS, tested=tested, largest={"test": 0.4})), 80)
    assert "test/top1 is not better than always answering the largest class (0.4000)" in shown
    shown = rendered(show_study(status(TRIALS, largest={"val": 0.4})), 80)
    assert "not better" not in shown


def test_one_winner_for_the_leaderboard_and_optuna_whatever_the_last_values_are():
    # the last value of trial 1 is the highest, its best one is not
    study = optuna.create_study(direction="maximize")
    for values in ([0.5, 0.9, 0.1], [0.2, 0.8, 0.85], [0.9, 0.1, 0.3]):
        trial = study.ask({"optim.lr": optuna.distributions.FloatDistribution(0, 1)})
        for epoch, value in enumerate(values, 1):
            trial.report(value, epoch)
        study.tell(trial.number, max(values))
    trials = StudyRecord(study).records()
    board = leaderboard(trials, ["optim.lr"])
    assert list(board["trial"]) == [0, 2, 1]  # of equal ones, the first
    assert board["best"][0] == study.best_value == 0.9
    assert board["trial"][0] == study.best_trial.number


@pytest.mark.parametrize(("images", "warned"), [(24, True), (500, False)])
def test_few_val_images_are_said_and_their_accuracy_is_shown_with_its_interval(images, warned, capsys):
    experiment = load_experiment(
        EXPERIMENTS / "digits_search.yaml", {"distillation.kind": "none", "search.space": {}}
    )
    manifest = shards.Manifest(["a"], {"train": [shards.Shard("x", [10 * images], 0, "")]}, {}, "")
    remarks = remarks_before(experiment, manifest)
    StudyView(DeitConsole(), STUDY, experiment).start("cpu", 1, 10, {}, remarks)
    view = RunView(DeitConsole(), "run-1", experiment)
    view.started("cpu", remarks)
    metrics = {"epoch": 1, "val/top1": 1.0, "val/images": float(images), "perf/images_per_s": 5.0}
    view.reported(metrics)
    view.kept("val/top1", {10: 0.5, 20: 1.0, 30: float("nan")}, metrics)
    output = capsys.readouterr()
    assert output.err.count(f"val has only {images} images") == (2 if warned else 0)
    assert ("val/top1 1.000 (0.862-1.000)" in output.out) == warned
    assert "kept: the model of step 20, val/top1 1.0000 (" in output.out


def test_a_failure_to_compile_is_said_once(capsys):
    experiment = load_experiment(EXPERIMENTS / "digits_search.yaml")
    metrics = {"epoch": 1, "step": 5, "val/top1": 0.5, "val/images": 100.0, "perf/images_per_s": 5.0}
    for compiled, warnings in ((1.0, 0), (0.0, 1)):
        console = DeitConsole()
        run, study = RunView(console, "run-1", experiment), StudyView(console, STUDY, experiment)
        run.reported(metrics | {"perf/compiled": compiled})
        for number in range(2):
            study.trial_reported(number, metrics | {"perf/compiled": compiled})
        assert capsys.readouterr().err.count("could not compile the models") == warnings


@pytest.mark.parametrize(("top1", "said"), [(0.1, True), (0.13, True), (0.9, False)])
def test_a_teacher_at_chance_is_said_with_its_own_accuracy(top1, said, tmp_path):
    folder = tmp_path / "teacher-1"
    folder.mkdir()
    (folder / "run.json").write_text(
        json.dumps({"outcome": "finished", "metrics": {"test/top1": top1, "test/images": 200.0}})
    )
    manifest = shards.Manifest(list("abcdefghij"), {}, {"train": [9] * 10, "test": [20] * 10}, "")
    for weights in ("run:teacher", "run:teacher-1", f"{folder}/model.safetensors"):
        keys = {"distillation.teacher.weights": weights, "results.uri": str(tmp_path)}
        remark = teacher_remark(load_experiment(EXPERIMENTS / "digits_student.yaml", keys), manifest)
        assert (remark is not None) == said
        if said:
            assert remark.startswith(f"the teacher teacher-1 has test/top1 {top1:.4f} (")
            assert "not better than always answering the largest class (0.1000)" in remark
    keys["distillation.teacher.weights"] = "run:nobody"
    assert teacher_remark(load_experiment(EXPERIMENTS / "digits_student.yaml", keys), manifest) is None
