"""Cases of bench/faults.py: what a person sees of results, tables, recipes and versions; without a Ray."""

import re
import shutil
import sqlite3
import unicodedata
from pathlib import Path

from bench.faulty.expect import either, expect, printed, refused
from bench.faulty.experiments import DEAD_PROXY, distilled, judge
from bench.faulty.inputs import class_folders, write
from bench.faulty.stage import ROOT, Stage, case
from bench.faulty.surroundings import old_results

LONG = (
    "ended since the target was reached: val/top1 of trial 12 is 0.9123, and search.budget.target is 0.9; "
    "the trials that were open then were cancelled by the budget"
)


def change_study(results: Path, study: str, statement: str, *values) -> None:
    """Changes the database of a study, as its driver would have written it."""
    with sqlite3.connect(results / study / "study.db") as database:
        database.execute(statement, values)


def widest(text: str) -> int:
    """The width of a table's widest line in a terminal, in columns; sentences may be wrapped."""
    lines = text.splitlines()
    tables = [line for line in lines if len(re.findall(r"\S {2,}(?=\S)", line)) > 1]
    return max(
        (sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in line) for line in tables), default=0
    )


@case(
    "widths",
    "people",
    all_80=(80, "status"),
    all_60=(60, "status"),
    study_80=(80, "status", "finished-1"),
    study_60=(60, "status", "finished-1"),
)
def widths(stage: Stage, columns: int, *words: str) -> None:
    """At any width, names, numbers and best values are whole, and no line is wider than the terminal."""
    results = old_results(stage)
    ended = '"' + LONG + '"'
    change_study(
        results, "finished-1", "update study_user_attributes set value_json = ? where key = 'ended'", ended
    )
    name = "a_study_of_many_strengths_and_rates"
    shutil.copytree(results / "finished-1", results / f"{name}-1")
    change_study(results, f"{name}-1", "update studies set study_name = ?", f"{name}-1")
    if len(words) == 1:
        wanted = ("finished-1", r"0\.1875", f"{name}-1", "interrupted-1", r"0\.2083")
    else:
        wanted = (r"finished-1", r"\b0\b.*0\.1875", r"\b2\b.*0\.1042", r"\b1\b.*0\.0903")
    seen = expect(stage, words, printed(*wanted), columns=columns)
    if widest(seen.text) > columns:
        stage.fault(
            "silent", f"{seen.line}: a line of {widest(seen.text)} columns in a terminal of {columns}"
        )


@case(
    "widths",
    "people",
    plan=("plan", "results/finished-1/experiment.yaml"),
    diff=("diff", "finished-1/1", "student-1"),
    long_class=("data", "prepare", "mine", "--out", "out"),
)
def widths_of_others(stage: Stage, *words: str) -> None:
    """Other tables fit into 80 columns, and keys are whole."""
    old_results(stage)
    class_folders(
        stage / "mine",
        ("n02085620 Chihuahua of the longest haired kind that a show has seen", "猫" * 20),
        each=6,
    )
    wanted = () if "prepare" in words else (r"optim\.lr",)
    seen = expect(stage, words, printed(*wanted), columns=80)
    if widest(seen.text) > 80 and "prepare" not in words:
        stage.fault("silent", f"{seen.line}: a line of {widest(seen.text)} columns in a terminal of 80")


@case("intervals", "people", all_right=(1.0,), none_right=(0.0,))
def intervals(stage: Stage, value: float) -> None:
    """An accuracy of 0 or 1 has an interval that is not empty."""
    results = old_results(stage)
    change_study(results, "finished-1", "update trial_values set value = ?", value)
    change_study(results, "finished-1", "update trial_intermediate_values set intermediate_value = ?", value)
    seen = expect(stage, ["status", "finished-1"], printed(f"{value:.4f}"))
    if "± 0.0000" in seen.text:
        stage.fault("silent", f"{seen.line}: {value:.4f} ± 0.0000, of 144 images")


@case("few_val_images", "people", resnet=("experiments/own_images_teacher.yaml",))
def few_val_images(stage: Stage, recipe: str) -> None:
    """300 images of one's own: `plan` says that val is small, or how many images a difference needs."""
    class_folders(stage / "mine", [f"letter_{c}" for c in "abcde"], each=60)
    stage.setup("data", "prepare", "mine", "--out", "data/own")
    words = ["plan", ROOT / recipe, "--set", "data.uri=data/own"]
    seen = expect(stage, words, printed(r"\bval\b.*\bimages|images.*\bval\b"), within_s=120)
    steps = re.search(r"x (\d+) epochs = \d+ epochs, ([\d,]+) steps", " ".join(seen.text.split()))
    if steps and int(steps[2].replace(",", "")) / int(steps[1]) < 20:
        each = int(steps[2].replace(",", "")) / int(steps[1])
        stage.fault("silent", f"{seen.line}: {each:.0f} steps an epoch with 300 images, expected at least 20")


@case("recipes", "people", pretrained=("own_images_pretrained",))
def recipes(stage: Stage, start: str) -> None:
    """The recipe from named weights fails in one sentence, with the offline way, where they cannot be had."""
    found = sorted((ROOT / "experiments").glob(f"{start}_*.yaml"))  # they share the settings of {start}.yaml
    if not found:
        stage.fault("silent", f"experiments/{start}*.yaml: there is no such recipe")
    class_folders(stage / "mine", [f"kind_{c}" for c in "abc"], each=60)
    stage.setup("data", "prepare", "mine", "--out", "data/own")
    for file in found:
        told = refused(
            "pretrained|weights|run:", "network|download|reach|offline|connect|train one first|fetch"
        )
        expect(stage, ["plan", file, "--set", "data.uri=data/own"], told, env=DEAD_PROXY, within_s=90)


@case(
    "teacher_by_name",
    "people",
    typo=("run:teachr", "did you mean run:teacher"),
    recipe=("run:base", r"deit-ray train \S+/base\.yaml.*data\.uri=\S+/digits"),
    unfinished=("run:student", "--continue student-1"),
)
def teacher_by_name(stage: Stage, weights: str, remedy: str) -> None:
    """A teacher that no finished run has: the run that is meant, or a command with all that was set."""
    shutil.copytree(stage.shared / "old/results", stage / "results")
    write(
        stage / "experiments/base.yaml", "name: base\ndata: {uri: data/other}\ndistillation: {kind: none}\n"
    )
    judge(stage, distilled(weights), refused(re.escape(weights), remedy))


@case(
    "slips_of_the_pen",
    "people",
    extend=("extend: base.yaml\n", "extends"),
    indented=("optim:\n  lr: 1\n    ema_decay: 0.5\n", "line 3.*indented"),
    unindented=("optim:\n    lr: 1\n  ema_decay: 0.5\n", "line 3.*same column"),
    no_colon=("optim:\n  lr 1\n  ema_decay: 0.5\n", "line 3.*no colon"),
    no_space=("optim:\n  lr:0.1\n", "space is missing"),
    two_colons=("name: a: b\n", "line 1.*quotes"),
    quote=("name: 'a\nseed: 1\n", "quote is not closed"),
    comma=("optim:\n  lr: 0,001\n", r"write 0\.001"),
    comma_in_braces=("optim: {lr: 0,001}\n", "decimal point"),
)
def slips_of_the_pen(stage: Stage, text: str, remedy: str) -> None:
    """Slips in an experiment file: the place, and in plain words what is probably wrong."""
    write(stage / "x.yaml", text)
    yaml_words = ("mapping values", "block end", "block mapping", "scanning", "parsing")
    expect(stage, ["plan", "x.yaml"], refused(r"x\.yaml", remedy, never=yaml_words), ends_at_ray=True)


@case("runs_in_status", "people", all=("status",), one=("status", "teacher-1"))
def runs_in_status(stage: Stage, *words: str) -> None:
    """`status` shows runs of `train` too."""
    old_results(stage)
    wanted = (
        ("teacher-1", "student-1", "interrupted")
        if len(words) == 1
        else ("teacher-1", r"finished|0\.2083|0\.1950")
    )
    expect(stage, words, printed(*wanted))


@case(
    "no_results",
    "people",
    status=("status",),
    study=("status", "gone"),
    best=("best", "gone"),
    diff=("diff", "a", "b"),
    sync=("sync", "gone"),
    stop=("stop", "gone"),
    predict=("predict", "gone", "x.png"),
    ui=("ui",),
)
def no_results(stage: Stage, *words: str) -> None:
    """Without results: one sentence that names what is missing, and the folder that was looked in."""
    write(stage / "x.png", b"")
    if words == ("status",):
        expect(stage, words, either(printed("no studies|nothing|no runs|no results"), refused("results")))
    else:
        expect(stage, words, refused("results"))


@case("best_again", "people", edited=("edited",), interrupted=("interrupted",))
def best_again(stage: Stage, how: str) -> None:
    """`best` keeps a best.yaml that a person has edited, and says that a study has not ended."""
    results = old_results(stage)
    if how == "edited":
        stage.setup("best", "finished-1")
        file = results / "finished-1/best.yaml"
        edited = file.read_text().replace("seed: 1", "seed: 7  # mine")
        write(file, edited)
        seen = expect(
            stage, ["best", "finished-1"], either(printed(r"best\.yaml.*kept"), refused(r"best\.yaml"))
        )
        if edited not in [path.read_text() for path in file.parent.glob("best.yaml*")]:
            stage.fault("lost", f"{seen.line}: best.yaml was edited, and is written over")
    else:
        expect(stage, ["best", "interrupted-1"], printed("interrupted", "numerics 1"))


@case("absolute_paths", "people", best=("best", "finished-1"))
def absolute_paths(stage: Stage, *words: str) -> None:
    """Paths in messages are absolute."""
    results = old_results(stage)
    (stage / "below").mkdir()
    seen = expect(stage, [*words, "--results", results], printed(), cwd=stage / "below")
    paths = re.findall(r"\S+\.(?:yaml|safetensors)", seen.out)
    if not paths or any(not path.startswith("/") for path in paths):
        stage.fault("silent", f"{seen.line}: paths that are not absolute: {', '.join(paths) or 'none'}")


@case(
    "command_line",
    "people",
    version=(("--version",), printed(r"deit-ray \d+\.\d+")),
    help=(("--help",), printed("tune", "prepare")),
    unknown=(("trian",), refused("trian")),
    option=(("train", "--epoch"), refused("--epoch")),
    nothing=(("train",), refused("experiment")),
    both=(("tune", "x.yaml", "--resume", "a"), refused("resume")),
    typo_format=(
        ("data", "prepare", "digits", "--out", "out", "--format", "folder"),
        refused("folder", "folders"),
    ),
    no_out=(("data", "prepare", "digits"), refused("--out")),
    bad_set=(("plan", "x.yaml", "--set", "lr"), refused("lr", "=|KEY")),
    no_model=(("predict",), refused("MODEL")),
    quality=(("data", "prepare", "digits", "--out", "o", "--quality", "0"), refused("quality")),
    typo_source=(("data", "prepare", "digts", "--out", "o"), refused("digts")),
)
def command_line(stage: Stage, words: tuple, expected) -> None:
    """The command line itself: versions, help, typing errors."""
    expect(stage, words, expected)
