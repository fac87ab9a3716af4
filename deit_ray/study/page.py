"""A study's story as one HTML page, which opens without a network: text, tables, figures and pictures."""

import base64
import html
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import deit_ray
from deit_ray import hints
from deit_ray.results.folders import results_of
from deit_ray.study.figures import Drawing, draw_all
from deit_ray.study.story import BEST_SHOWN, TIES, Command, Story, board_cells
from deit_ray.terminal.format import counted, short, short_key

MADE_BY = "deit_ray report"  # stands in every page, so that no other file is written over
HEAD = 400  # characters of a page in which that stands
REASONS = 20  # of failures


@dataclass(frozen=True)
class Picture:
    """A picture of the data, or why there is none.

    Attributes:
        title: what there is to see.
        note: how to read it.
        jpeg: the content of the file; None if there is none, and then `note` says why.
        width: in pixels.
    """

    title: str
    note: str
    jpeg: bytes | None = None
    width: int = 0


def is_page(content: bytes) -> bool:
    """Whether a file is a page that `make_page` made."""
    return MADE_BY.encode() in content[:HEAD]


def make_page(story: Story, pictures: Iterable[Picture] = ()) -> bytes:
    """The page, UTF-8. It is about 5 MB, most of them plotly's code."""
    from plotly.offline import get_plotlyjs

    drawings = draw_all(story)
    sections = [
        _summary(story),
        _leaderboard(story),
        _figures("How the trials learned", drawings, "curves"),
        _stopped(story),
        _figures("What decides", drawings, "importances", "slices", "contours", "parallel"),
        _failed(story),
        _figures("When the trials ran", drawings, "timeline"),
        _pictures(pictures),
        _continuing(story),
    ]
    made = time.strftime("%Y-%m-%d %H:%M %Z")
    title = html.escape(story.name)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{MADE_BY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{"".join(sections)}
</main>
<footer>Made by deit-ray {deit_ray.__version__} on {made}, from {html.escape(story.folder)}</footer>
<script>{get_plotlyjs()}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""
    return page.encode()


def _summary(story: Story) -> str:
    facts = {"state": story.state, "trials": story.trial_counts(), "cost": story.cost()}
    if saved := story.saved():
        facts["epochs"] = saved
    for line in story.intervals():
        facts.setdefault("95% interval", "")
        facts["95% interval"] += f"{'; ' if facts['95% interval'] else ''}{line}"
    if remark := story.remark():
        facts["beware"] = remark
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    params = [[f"<code>{_text(k)}</code>", _text(short(value))] for k, value in story.best_params.items()]
    best = _table(["searched", "value"], params) if params else ""
    commands = "".join(_command(story, command) for command in story.training())
    return f"""<header><p class="kind">deit_ray study</p><h1>{_text(story.name)}</h1>
<p class="best">{"Best: " if story.best is not None else ""}{_text(story.best_line())}</p>
<dl>{rows}</dl></header>
{f'<section id="best"><h2>The best configuration</h2>{best}{commands}</section>' if params else ""}
"""


def _leaderboard(story: Story) -> str:
    if not len(story.board):
        return '<section id="leaderboard"><h2>Leaderboard</h2><p>No trial has started yet.</p></section>'
    shown = story.board.head(BEST_SHOWN)
    heads = ["trial", "state", "epochs", f"best {story.metric}", "last"]
    heads += [short_key(key, story.keys) for key in story.keys]
    rows = [[_text(cell.strip()) for cell in board_cells(row, story.keys)] for _, row in shown.iterrows()]
    notes = [TIES] if shown["close"].any() else []
    if shown["low"].notna().any():
        notes.append("in brackets: the 95% interval of the best of a trial's epochs")
    if len(story.board) > len(shown):
        notes.append(f"the best {len(shown)} of {len(story.board)} trials; deit-ray export writes all")
    said = f'<p class="note">{_text("; ".join(notes))}.</p>' if notes else ""
    table = _table([_text(head) for head in heads], rows, "board")
    return f'<section id="leaderboard"><h2>Leaderboard</h2>{table}{said}</section>'


def _figures(heading: str, drawings: list[Drawing], *kinds: str) -> str:
    chosen = [drawing for drawing in drawings if drawing.kind in kinds]
    large = "".join(_figure(drawing) for drawing in chosen if not drawing.is_small)
    for kind in kinds:  # one grid for each, since their heights differ
        small = "".join(_figure(drawing) for drawing in chosen if drawing.is_small and drawing.kind == kind)
        large += f'<div class="grid">{small}</div>' if small else ""
    return f'<section id="{kinds[0]}"><h2>{_text(heading)}</h2>{large}</section>'


def _figure(drawing: Drawing) -> str:
    note = f"<figcaption>{_text(drawing.note)}</figcaption>" if drawing.note else ""
    if drawing.figure is None:
        return f'<div class="none"><h3>{_text(drawing.title)}</h3><p>{_text(drawing.note)}</p></div>'
    data = drawing.figure.to_json().replace("</", "<\\/")  # no text in it may end the script
    return f"""<figure class="{drawing.kind}"><h3>{_text(drawing.title)}</h3>
<div class="scroll"><div class="plot" style="height:{drawing.height}px" role="img"
 aria-label="{html.escape(drawing.title)}"><script type="application/json">{data}</script></div></div>
{note}</figure>"""


def _stopped(story: Story) -> str:
    if not story.stops:
        return ""
    rows = [
        [
            str(stops.epoch),
            str(stops.count),
            "-" if math.isnan(stops.lowest) else f"{stops.lowest:.4f}",
            "-" if math.isnan(stops.highest) else f"{stops.highest:.4f}",
        ]
        for stops in story.stops
    ]
    heads = ["after epoch", "trials", f"lowest best {_text(story.metric)}", "highest"]
    rule = _text(story.rule)
    return f"""<section id="stopped"><h2>Stopped early</h2><p>{rule[:1].upper()}{rule[1:]}.</p>
{_table(heads, rows)}</section>"""


def _failed(story: Story) -> str:
    if not story.failures:
        return ""
    rows = [
        [str(len(found.numbers)), _text(", ".join(map(str, found.numbers[:10]))), _text(found.reason)]
        for found in story.failures[:REASONS]
    ]
    more = len(story.failures) - REASONS
    said = f'<p class="note">and {counted(more, "other reason")}</p>' if more > 0 else ""
    table = _table(["trials", "such as", "reason"], rows, "reasons")
    return f'<section id="failed"><h2>Failed</h2>{table}{said}</section>'


def _pictures(pictures: Iterable[Picture]) -> str:
    shown = "".join(_picture(picture) for picture in pictures)
    return f'<section id="data"><h2>The data</h2>{shown}</section>' if shown else ""


def _picture(picture: Picture) -> str:
    if picture.jpeg is None:
        return f'<div class="none"><h3>{_text(picture.title)}</h3><p>{_text(picture.note)}</p></div>'
    data = base64.b64encode(picture.jpeg).decode()
    return f"""<figure><h3>{_text(picture.title)}</h3>
<div class="scroll"><img alt="{html.escape(picture.title)}" width="{picture.width}"
 src="data:image/jpeg;base64,{data}"></div><figcaption>{_text(picture.note)}</figcaption></figure>"""


def _continuing(story: Story) -> str:
    said = "".join(_command(story, command) for command in story.continuing())
    if story.refusal:
        said = f"<p>{_text(story.refusal)}</p>"
    said = said or "<p>There is nothing to continue.</p>"
    return f'<section id="continue"><h2>How to continue</h2>{said}</section>'


def _command(story: Story, command: Command) -> str:
    results = results_of(story.folder) if command.takes_results else None
    typed = hints.anywhere(*command.words, results=results)
    purpose = f"{command.purpose[:1].upper()}{command.purpose[1:]}:"
    return f"<p>{_text(purpose)}</p><pre><code>{_text(typed)}</code></pre>"


def _table(heads: list[str], rows: list[list[str]], kind: str = "") -> str:
    """A table whose cells are HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _text(text: str) -> str:
    return html.escape(text, quote=False)


STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5d6670; --line: #dde1e6; --ground: #ffffff;
  --panel: #f5f7f9; --accent: #1768ac; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #a2abb5; --line: #353b42; --ground: #16191d; --panel: #1f2429;
    --accent: #7db8ea; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 16px; }
footer { max-width: 1120px; margin: 0 auto; padding: 16px 24px 48px; color: var(--soft); font-size: 14px;
  overflow-wrap: anywhere; }
h1 { font-size: 32px; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 21px; margin: 48px 0 12px; padding-top: 16px; border-top: 1px solid var(--line); }
h3 { font-size: 16px; margin: 0 0 4px; overflow-wrap: anywhere; }
p { margin: 8px 0; max-width: 75ch; }
.kind { color: var(--soft); margin: 0; font-size: 14px; }
.best { font-size: 20px; color: var(--accent); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 16px 0 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 15px; }
th, td { text-align: left; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
.board tbody tr:first-child { font-weight: 600; }
.reasons td:last-child { white-space: normal; overflow-wrap: anywhere; min-width: 16em; }
pre { background: var(--panel); padding: 10px 14px; border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 14px; margin: 4px 0 12px; }
code { font-family: ui-monospace, monospace; }
figure { margin: 0 0 28px; min-width: 0; }
figcaption, .note { color: var(--soft); font-size: 14px; max-width: 80ch; }
.grid { display: grid; gap: 8px 28px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.parallel .plot { min-width: 640px; }
.none { background: var(--panel); border-radius: 6px; padding: 12px 16px; margin: 0 0 16px; }
.none p { color: var(--soft); }
img { max-width: 100%; height: auto; display: block; border-radius: 4px; }
@media (max-width: 600px) {
  main, footer { padding-left: 14px; padding-right: 14px; }
  h1 { font-size: 25px; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; } }
"""

SCRIPT = """
const dark = matchMedia('(prefers-color-scheme: dark)');
const ink = () => getComputedStyle(document.body).color;
for (const div of document.querySelectorAll('.plot')) {
  const found = JSON.parse(div.querySelector('script').textContent);
  div.replaceChildren();
  found.layout.font.color = ink();
  const options = {responsive: true, displaylogo: false, displayModeBar: false};
  Plotly.newPlot(div, found.data, found.layout, options);
}
dark.addEventListener('change', () => {
  for (const div of document.querySelectorAll('.plot')) Plotly.relayout(div, {'font.color': ink()});
});
"""
