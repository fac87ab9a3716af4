"""A study's story as the description of its run in MLflow: Markdown, as MLflow's page renders it."""

import math
import re

from deit_ray import hints
from deit_ray.results.folders import results_of
from deit_ray.study.story import BEST_SHOWN, RUNNING, TIES, Story, board_cells
from deit_ray.terminal.format import counted, short, short_key

CHARS = 8000  # of a description; MLflow takes no more
CELL_CHARS, REASON_CHARS = 40, 300  # a longer value or reason is cut
FAILURES, NUMBERS = 5, 10  # reasons, and trials of each reason, that are named
# (trials, searched keys) of the leaderboard: the first that makes a text of at most `CHARS`
SIZES = ((BEST_SHOWN, 99), (BEST_SHOWN, 12), (10, 12), (5, 8), (3, 3), (1, 0))
SPECIAL = re.compile(r"([\\`*_{}\[\]#~])")  # what Markdown reads as markup, and takes a backslash before
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "@": "&#64;"}  # what else it may read so


def describe(story: Story) -> str:
    """A study's story in at most 8,000 characters of Markdown. The same story makes the same text."""
    texts = (_describe(story, trials, story.keys[:keys]) for trials, keys in SIZES)
    return next((text for text in texts if len(text) <= CHARS), f"{story.name}: {story.state}"[:CHARS])


def _describe(story: Story, trials: int, keys: list[str]) -> str:
    sections = [
        _state(story),
        _best(story, keys),
        _leaderboard(story, trials, keys),
        _importances(story, keys),
        _stopped(story),
        _failed(story),
        _continuing(story),
    ]
    return "\n\n".join(section for section in sections if section)


def _state(story: Story) -> str:
    where = ""
    if story.state == RUNNING and story.driver:
        where = f", driven by process {story.driver.get('pid')} on {plain(str(story.driver.get('host')))}"
    lines = [f"**{plain(story.name)}: {plain(_cut(story.state, REASON_CHARS))}**{where}"]
    lines.append(f"{story.trial_counts()}; {plain(story.cost())}")
    if saved := story.saved():
        lines.append(saved)
    return "\n".join(lines)


def _best(story: Story, keys: list[str]) -> str:
    lines = [f"### Best: {plain(story.best_line())}"]
    if intervals := story.intervals():
        lines.append(f"95% interval of {plain('; '.join(intervals))}")
    if remark := story.remark():
        lines.append(f"**{plain(remark)}**")
    params = {key: value for key, value in story.best_params.items() if key in keys}
    if params:
        rows = [[f"`{key}`", _cell(short(value))] for key, value in params.items()]
        lines += ["", _table(["searched", "value"], rows)]
    for command in story.training():
        lines += ["", f"{command.purpose}:", *_typed(story, command)]
    return "\n".join(lines)


def _leaderboard(story: Story, trials: int, keys: list[str]) -> str:
    if not len(story.board):
        return ""
    shown = story.board.head(trials)
    heads = ["trial", "state", "epochs", f"best {story.metric}", "last"]
    heads += [short_key(key, story.keys) for key in keys]
    rows = [[_cell(cell) for cell in board_cells(row, keys)] for _, row in shown.iterrows()]
    lines = ["### Leaderboard", "", _table([_cell(head) for head in heads], rows), ""]
    if shown["close"].any():
        lines.append(TIES)
    if shown["low"].notna().any():
        lines.append("In brackets: the 95% interval of the best of a trial's epochs.")
    if len(story.board) > len(shown):
        lines.append(f"The best {len(shown)} of {len(story.board)} trials; the table of runs has all.")
    return "\n".join(lines)


def _importances(story: Story, keys: list[str]) -> str:
    shares = [(key, share) for key, share in story.importances.items() if key in keys]
    if not shares:
        return ""
    rows = [[f"`{key}`", f"{share:.0%}"] for key, share in shares]
    table = _table(["searched", "share"], rows)
    return (
        f"### What decides whether a trial is among the best\n\n{table}\n\nPED-ANOVA of the finished trials."
    )


def _stopped(story: Story) -> str:
    if not story.stops:
        return ""
    rows = [
        [str(stops.epoch), str(stops.count), "-" if math.isnan(stops.lowest) else _ends(stops)]
        for stops in story.stops[:BEST_SHOWN]
    ]
    table = _table(["after epoch", "trials", f"their best {_cell(story.metric)}"], rows)
    rule = story.rule[:1].upper() + story.rule[1:]
    return f"### Stopped early\n\n{plain(rule)}.\n\n{table}"


def _ends(stops) -> str:
    return f"{stops.lowest:.4f} to {stops.highest:.4f}" if stops.count > 1 else f"{stops.highest:.4f}"


def _failed(story: Story) -> str:
    if not story.failures:
        return ""
    lines = ["### Failed", ""]
    for failures in story.failures[:FAILURES]:
        numbers = ", ".join(map(str, failures.numbers[:NUMBERS]))
        more = ", ..." if len(failures.numbers) > NUMBERS else ""
        noun = "trial" if len(failures.numbers) == 1 else "trials"
        lines.append(f"- {noun} {numbers}{more}: {plain(_cut(failures.reason, REASON_CHARS))}")
    if len(story.failures) > FAILURES:
        lines.append(f"- and {counted(len(story.failures) - FAILURES, 'other reason')}")
    return "\n".join(lines)


def _continuing(story: Story) -> str:
    lines = ["### How to continue"]
    if story.refusal:
        lines += ["", plain(story.refusal)]
    for command in story.continuing():
        lines += ["", f"{command.purpose}:", *_typed(story, command)]
    there = " (as it was at the end: `report.html` among the artifacts)" if story.has_ended else ""
    lines += ["", f"one page with every figure{there}:"]
    lines += _fenced(hints.anywhere("report", story.name, results=results_of(story.folder)))
    return "\n".join(lines)


def _typed(story: Story, command) -> list[str]:
    results = results_of(story.folder) if command.takes_results else None
    return _fenced(hints.anywhere(*command.words, results=results))


def _fenced(command: str) -> list[str]:
    return ["```", command, "```"]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return plain(_cut(text.strip(), CELL_CHARS))


def _cut(text: str, chars: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= chars else f"{text[: chars - 1]}…"


def plain(text: str) -> str:
    """A text that Markdown shows as it is."""
    return SPECIAL.sub(r"\\\1", text).translate(str.maketrans(ENTITIES))
