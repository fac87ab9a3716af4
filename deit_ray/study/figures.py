"""The figures of a study's story, drawn by plotly; most of them by optuna.visualization.

Each says in its title what there is to see. A figure that cannot be drawn is a sentence instead.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from deit_ray.outcome import Kind
from deit_ray.study.records import TrialRecord
from deit_ray.study.story import LEAST_FINISHED, Story, evaluator
from deit_ray.terminal.format import counted, duration, short

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

DRAWN = 200  # trials of a figure that has a line for each; more would make the page slow
MAPPED = 60  # trials of a contour, which takes the square of that
SLICES, PAIRS = 12, 3  # searched keys with a slice; pairs of keys with a contour
TOP = 5  # trials whose values the title of a slice names
# Okabe and Ito's colours, which colour-blind people can tell apart
COLOURS = {
    "best": "#D55E00",
    str(Kind.FINISHED): "#0072B2",
    str(Kind.STOPPED_EARLY): "#8C8C8C",
    str(Kind.FAILED): "#CC79A7",
    str(Kind.CANCELLED): "#E69F00",
    "running": "#009E73",
}
ENDS = {  # the mark at the end of a curve
    str(Kind.STOPPED_EARLY): "x",
    str(Kind.FAILED): "triangle-down",
    str(Kind.CANCELLED): "square-open",
    "running": "circle-open",
}
LINES = [[0, "#B9BEC4"], [0.5, "#6FA8D6"], [1, "#1768AC"]]  # from the worst trial to the best
AREAS = "Cividis"  # even steps for the eye, also of colour-blind people
AXIS = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "automargin": True}


@dataclass(frozen=True)
class Drawing:
    """A figure, or why there is none.

    Attributes:
        kind: curves, importances, slices, contours, parallel or timeline.
        title: what there is to see.
        note: how to read it.
        figure: None if it cannot be drawn; then `note` says why.
        height: in pixels.
        is_small: whether several stand side by side.
    """

    kind: str
    title: str
    note: str
    figure: Figure | None = None
    height: int = 420
    is_small: bool = False


def draw_all(story: Story) -> list[Drawing]:
    """All figures of a study, in the order in which people read them."""
    finished = [trial for trial in story.records if trial.state == TrialState.COMPLETE]
    finished.sort(key=lambda trial: -trial.best)
    varied = [key for key in ranked_keys(story) if len(_values(finished, key)) > 1]
    return [
        draw_curves(story),
        draw_importances(story, finished),
        *draw_slices(story, finished, varied),
        *draw_contours(story, finished, varied),
        draw_parallel(story, finished, varied),
        draw_timeline(story),
    ]


def ranked_keys(story: Story) -> list[str]:
    """The searched keys, the most important first."""
    return [*story.importances, *(key for key in story.keys if key not in story.importances)]


def draw_curves(story: Story) -> Drawing:
    """The learning curves, with the ends of those that did not finish marked."""
    import plotly.graph_objects as go

    number = None if story.best is None else int(story.best["trial"])
    shown = [trial for trial in story.records if trial.values]
    if not shown:
        return Drawing("curves", "Learning curves", "No trial has been evaluated yet.")
    ranked = sorted(shown, key=lambda trial: -(trial.best if trial.best is not None else -math.inf))[:DRAWN]
    groups: dict[str, list[TrialRecord]] = {}
    for trial in ranked:
        if trial.number != number:
            groups.setdefault(_state(trial), []).append(trial)
    figure = go.Figure()
    for state in COLOURS:
        if state in groups:
            figure.add_traces(list(_curve_traces(state, groups[state])))
    if number is not None:
        best = next(trial for trial in ranked if trial.number == number)
        figure.add_traces(list(_curve_traces("best", [best])))
    figure.update_xaxes(title_text="epoch")
    figure.update_yaxes(title_text=f"{story.metric} (fraction of the images)")
    early = sum(stops.count for stops in story.stops)
    title = f"{counted(early, 'trial')} stopped early" if early else "No trial was stopped early"
    if story.best is not None:
        title = f"Trial {number} learned most: {story.metric} {story.best['best']:.4f}. {title}"
    note = f"A line is a trial; a cross is where it was stopped early. {_sentence(story.rule)}"
    if len(shown) > len(ranked):
        note += f" The best {len(ranked)} of {counted(len(shown), 'trial')} are drawn."
    return Drawing("curves", f"{title}.", note, styled(figure), 460)


def _curve_traces(state: str, trials: list[TrialRecord]) -> Iterable:
    """The curves of some trials as one trace, with gaps between them; and the marks at their ends."""
    import plotly.graph_objects as go

    epochs, values, names = [], [], []
    for trial in trials:
        points = sorted(trial.values.items())
        epochs += [*(epoch for epoch, _ in points), None]
        values += [*(_rounded(value) for _, value in points), None]
        names += [f"trial {trial.number}"] * (len(points) + 1)
    name = f"trial {trials[0].number}, the best" if state == "best" else state
    hover = "%{text}, epoch %{x}: %{y:.4f}<extra></extra>"
    yield go.Scatter(
        x=epochs,
        y=values,
        text=names,
        name=name,
        mode="lines+markers" if all(len(trial.values) == 1 for trial in trials) else "lines",
        line={"color": COLOURS[state], "width": 3 if state == "best" else 1.3},
        opacity=1 if state == "best" else 0.75,
        hovertemplate=hover,
    )
    if state in ENDS:
        yield go.Scatter(
            x=[trial.epoch for trial in trials],
            y=[_rounded(trial.last) for trial in trials],
            text=[
                f"trial {trial.number}, {trial.outcome.brief if trial.outcome else state}" for trial in trials
            ],
            mode="markers",
            marker={"symbol": ENDS[state], "size": 8, "color": COLOURS[state]},
            showlegend=False,
            hovertemplate=hover,
        )


def draw_importances(story: Story, finished: list[TrialRecord]) -> Drawing:
    """The importances, as Optuna draws them."""
    title = "Which searched values decide"
    if len(finished) < LEAST_FINISHED:
        need = f"Importances need {LEAST_FINISHED} finished trials; there {_are(len(finished))}."
        return Drawing("importances", title, need)
    if not story.importances:
        return Drawing(
            "importances", title, "No searched value makes a difference among the finished trials."
        )
    study = _study_of(finished)
    figure = optuna.visualization.plot_param_importances(
        study, evaluator=evaluator(len(finished)), target_name=story.metric
    )
    figure.update_traces(
        marker_color=COLOURS[str(Kind.FINISHED)], hovertemplate="%{y}: %{x:.0%}<extra></extra>"
    )
    figure.update_xaxes(title_text="share of what makes a trial one of the best", tickformat=".0%")
    figure.update_yaxes(title_text="")
    first = next(iter(story.importances))
    return Drawing(
        "importances",
        f"{first} decides most: {story.importances[first]:.0%}.",
        f"PED-ANOVA of {counted(len(finished), 'finished trial')}: how far the values of the best differ "
        "from those of all.",
        styled(figure),
        120 + 34 * len(story.importances),
    )


def draw_slices(story: Story, finished: list[TrialRecord], varied: list[str]) -> Iterable[Drawing]:
    """The metric over each searched key."""
    if len(finished) < 2 or not varied:
        yield Drawing("slices", "The metric over each searched value", _too_few(finished, varied))
        return
    study, ordered = _study_of(finished), _ordered(finished)
    for key in varied[:SLICES]:
        figure = optuna.visualization.plot_slice(study, [key], target_name=story.metric)
        is_log = figure.layout.xaxis.type == "log"
        edge = {"width": 0.5, "color": "#555"}
        marker = {"size": 8, "color": LINES[-1][1], "showscale": False, "line": edge}
        figure.update_traces(marker=marker, hovertemplate="%{x}: %{y:.4f}<extra></extra>")
        if figure.layout.xaxis.type == "category":
            figure.update_xaxes(categoryarray=_plain_categories(figure))
        else:
            names = [f"trial {trial.number}" for trial in ordered if key in trial.params]
            figure.update_traces(text=names, hovertemplate="%{text}: %{x:.4g}, %{y:.4f}<extra></extra>")
        figure.update_xaxes(title_text=f"{key} (log scale)" if is_log else key)
        figure.update_yaxes(title_text=story.metric)
        yield Drawing("slices", _where_the_best_are(key, finished), "", styled(figure), 300, is_small=True)


def _where_the_best_are(key: str, finished: list[TrialRecord]) -> str:
    values = [trial.params[key] for trial in finished[:TOP] if key in trial.params]
    count = f"best {len(values)} trials" if len(values) > 1 else "best trial"
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        low, high = short(min(values)), short(max(values))
        return f"{key}: {low if low == high else f'{low} to {high}'} in the {count}"
    named = list(dict.fromkeys(short(value) for value in values))
    return f"{key}: {' or '.join(named)} in the {count}"


def draw_contours(story: Story, finished: list[TrialRecord], varied: list[str]) -> Iterable[Drawing]:
    """The metric over pairs of the most important searched keys."""
    pairs = list(combinations(varied, 2))[:PAIRS]
    if len(finished) < 3 or not pairs:
        note = _too_few(finished, varied, 3, 2)
        yield Drawing("contours", "The metric over two searched values at once", note)
        return
    mapped = finished[:: -(-len(finished) // MAPPED)]  # good and bad ones alike, the best too
    study = _study_of(mapped)
    for pair in pairs:
        figure = optuna.visualization.plot_contour(study, list(pair), target_name=story.metric)
        figure.update_traces(
            selector={"type": "contour"},
            colorscale=AREAS,
            reversescale=False,
            colorbar={"title": {"text": story.metric, "side": "right"}, "thickness": 12},
        )
        figure.update_traces(
            selector={"type": "scatter"},
            marker={"size": 6, "color": "white", "line": {"width": 1, "color": "black"}},
            hovertemplate="%{x}, %{y}<extra></extra>",
        )
        for axis in (figure.layout.xaxis, figure.layout.yaxis):
            axis.title.text += " (log scale)" if axis.type == "log" else ""
        title = f"{story.metric} over {' and '.join(pair)}"
        note = "Brighter is better. A dot is a finished trial; between the dots the values are guessed."
        if len(mapped) < len(finished):
            note += f" {len(mapped)} of {len(finished)} are drawn, from the best to the worst."
        yield Drawing("contours", title, note, styled(figure), 380, is_small=True)


def draw_parallel(story: Story, finished: list[TrialRecord], varied: list[str]) -> Drawing:
    """All searched values of the finished trials at once."""
    from plotly.colors import sample_colorscale

    title = "What the best trials have in common"
    if len(finished) < 2 or not varied:
        return Drawing("parallel", title, _too_few(finished, varied))
    study = _study_of(finished[:DRAWN])
    figure = optuna.visualization.plot_parallel_coordinate(study, varied, target_name=story.metric)
    lines = [trace for trace in figure.data if trace.mode == "lines" and trace.customdata is not None]
    for trace in lines:  # the first axis is the metric, from 0 for the worst to 1 for the best
        trace.line.color = sample_colorscale(LINES, [min(1.0, max(0.0, trace.y[0]))])[0]
        trace.opacity = 0.8
    figure.update_traces(
        selector={"mode": "markers"},
        marker={
            "colorscale": LINES,
            "reversescale": False,
            "colorbar": {"title": {"text": story.metric, "side": "right"}, "thickness": 12},
        },
    )
    figure.update_annotations(font_color=None)  # the page's
    note = (
        f"A line is a finished trial, from its {story.metric} to its searched values; a bluer one is better."
    )
    if len(finished) > DRAWN:
        note += f" The best {DRAWN} of {len(finished)} are drawn."
    return Drawing("parallel", title, note, styled(figure), 460)


def draw_timeline(story: Story) -> Drawing:
    """When each trial ran."""
    started = [trial for trial in story.records if trial.started]
    if not started:
        return Drawing("timeline", "When each trial ran", "No trial has started yet.")
    figure = optuna.visualization.plot_timeline(_study_of(story.records))
    names = {"COMPLETE": "finished", "PRUNED": "stopped early", "FAIL": "failed", "RUNNING": "running"}
    for trace in figure.data:
        state = names.get(trace.name, "running")
        trace.marker.color = COLOURS[state]
        trace.name = "failed or cancelled" if state == "failed" else state
        trace.text = [f"trial {number}" for number in trace.y]
        trace.hovertemplate = "%{text}: %{base} to %{x}<extra></extra>"
    figure.update_xaxes(title_text="time on the driver's clock")
    figure.update_yaxes(title_text="trial", autorange="reversed", tickformat="d")
    title = f"{counted(len(started), 'trial')} in {duration(story.spent_s)}"
    height = min(900, 160 + 18 * len(started))
    return Drawing("timeline", f"{title}.", "A bar is the time of a trial.", styled(figure), height)


def styled(figure: Figure) -> Figure:
    """The figure without its title, on a transparent ground: the page decides about light and dark."""
    figure.update_layout(
        template="none",
        title=None,
        width=None,
        autosize=True,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 56, "r": 16, "t": 28, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        hoverlabel={"font": {"size": 13}},
    )
    figure.update_xaxes(**AXIS)
    figure.update_yaxes(**AXIS)
    return figure


def _study_of(trials: list[TrialRecord]) -> optuna.Study:
    """An Optuna study of these trials, in their order, without notes that would fill a figure's labels."""
    study = optuna.create_study(direction="maximize")
    study.add_trials([_bare(trial.frozen) for trial in _ordered(trials)])
    return study


def _ordered(trials: list[TrialRecord]) -> list[TrialRecord]:
    return sorted(trials, key=lambda trial: trial.number)


def _bare(trial: FrozenTrial) -> FrozenTrial:
    bare = copy.copy(trial)
    bare.user_attrs = {}
    return bare


def _plain_categories(figure: Figure) -> list[str]:
    """Writes categories as people do, where Optuna writes them as Python; returns all of them."""
    for trace in figure.data:
        trace.x = [_plain(value) for value in trace.x]
    return [_plain(value) for value in figure.layout.xaxis.categoryarray]


def _plain(value: Any) -> str:
    return str(value).strip("'\"")


def _values(trials: list[TrialRecord], key: str) -> set:
    return {repr(trial.params[key]) for trial in trials if key in trial.params}


def _state(trial: TrialRecord) -> str:
    return str(trial.ending.kind) if trial.state.is_finished() else "running"


def _too_few(finished: list[TrialRecord], varied: list[str], trials: int = 2, keys: int = 1) -> str:
    if len(finished) < trials:
        return f"This figure needs {trials} finished trials; there {_are(len(finished))}."
    need = counted(keys, "searched key")
    return f"This figure needs {need} in which the finished trials differ; there {_are(len(varied))}."


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count or 'none'}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _rounded(value: float | None) -> float | None:
    """A value for a figure; None, which is a gap, where it is no finite number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
