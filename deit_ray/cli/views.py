"""The tables that a person sees of plans, differences and reproductions."""

from typing import Any

from rich.console import Group
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from deit_ray.commands.diff import Difference, Pair
from deit_ray.commands.plan import Plan
from deit_ray.commands.reproduce import Reproduction
from deit_ray.terminal.format import short


def show_plan(found: Plan) -> Group:
    """A `Plan` as the terminal shows it."""
    experiment, search = found.experiment, found.experiment.search
    parts = [
        _facts("differs from the defaults", {key: _setting(value) for key, value in found.settings.items()}),
        Text(),
    ]
    if found.sampled:
        parts += [_trials_table(found), Text()]
    cpus, gpus = found.resources.get("CPU", 0), found.resources.get("GPU", 0)
    have = f"{found.where} has {cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    rows = {
        "a trial needs": found.needs.sum_shown(experiment),
        "at once": f"{found.fit} fit, {found.concurrent} will run: {have}",
        "at most": _most(found),
        "time at most": _time(found),
    }
    if found.device == "cuda" or experiment.cost.per_gpu_hour is not None:
        rows["money at most"] = _money(found)
    budgets = (
        {key: value for key, value in search.budget.model_dump().items() if value is not None}
        if search.space
        else {}
    )
    if budgets:
        rows["ends early when"] = ", ".join(
            BUDGETS[key].format(value, search.metric) for key, value in budgets.items()
        )
    parts.append(_facts(f"plan of {experiment.name} on {found.device}", rows))
    return Group(*parts)


BUDGETS = {
    "hours": "it has run {0:g} hours",
    "gpu_hours": "{0:g} GPU-hours are used",
    "target": "{1} reaches {0:g}",
    "patience": "{0} trials in a row bring nothing better",
    "failures": "{0} trials fail",
    "same_failure": "{0} trials fail in the same way",
}


def _most(found: Plan) -> str:
    trials, epochs, search = found.trials, found.experiment.train.epochs, found.experiment.search
    early = f"; {search.scheduler} stops some early" if search.space and search.scheduler != "none" else ""
    run = f"{trials} trial{'s' * (trials > 1)} x {epochs} epochs = {found.epochs} epochs"
    return f"{run}, {found.steps:,} steps, {found.samples:,} samples{early}"


def _time(found: Plan) -> str:
    if found.rate is None:
        return "not known: no run of such a student has been measured here; give the speed of one worker by cost.images_per_s"
    unit = "GPU-hours" if found.device == "cuda" else "CPU-worker-hours"
    speed = f"{found.rate.images_per_s:.0f} images/s a worker ({found.rate.source})"
    return f"{found.worker_hours:.3g} {unit} of training, which take {_duration(found.hours)}; {speed}; starts and evaluations on top"


def _duration(hours: float) -> str:
    return f"{hours:.3g} hours" if hours >= 1 else f"{60 * hours:.3g} min"


def _money(found: Plan) -> str:
    if found.money is not None:
        return f"{found.money:,.2f} (cost.per_gpu_hour {found.experiment.cost.per_gpu_hour:g})"
    if found.device != "cuda":
        return "not known: cost.per_gpu_hour is of GPUs, and none is used"
    return "not known: " + (
        "no speed is known"
        if found.experiment.cost.per_gpu_hour is not None
        else "give the price by cost.per_gpu_hour"
    )


def _trials_table(found: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("trial", justify="right")
    for key in found.experiment.search.space:
        table.add_column(key, no_wrap=True)
    for number, params in enumerate(found.sampled):
        table.add_row(str(number), *(short(params[key]) for key in found.experiment.search.space))
    return table


def _facts(title: str, rows: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title, no_wrap=True)
    table.add_column("")
    for key, value in rows.items():
        table.add_row(key, Text(value, overflow="fold"))
    return table


def _setting(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def show_difference(found: Difference) -> Group:
    """A `Difference` as the terminal shows it."""
    parts = []
    for title, pairs in (("settings", found.settings), *_made_by(found)):
        if pairs:
            parts += [_table(title, pairs, found.names), Text()]
    if found.patch:
        parts += [
            Text("uncommitted changes, A's patch against B's", style="bold"),
            Syntax(found.patch, "diff", theme="ansi_dark"),
            Text(),
        ]
    if not found:
        parts.append(Text("nothing differs" if found.known else "no setting differs", style="green"))
    if not found.known:
        parts.append(Text("code, packages, data and machine: not known of both", style="yellow"))
    values = {
        f"{found.metric}, {which}": tuple(v and f"{v[i]:.4f}" for v in found.values)
        for i, which in enumerate(("best", "last"))
    }
    if any(found.values):
        parts.append(_table("result", values, found.names))
    return Group(*parts)


def show_reproduction(found: Reproduction) -> Group:
    """A `Reproduction` as the terminal shows it."""
    total = found.equal + found.differing
    style = "bold green" if found.same else "bold red"
    lines = [
        Text(
            f"{found.names[1]}: {found.equal} of {total} metric points up to step {found.step} equal those of {found.names[0]}",
            style,
        )
    ]
    if found.first:
        metric, step, then, now = found.first
        lines.append(
            Text(f"  {found.differing} differ, first {metric} at step {step}: {then!r} then, {now!r} now")
        )
    for points, when in ((found.missing, "then"), (found.added, "now")):
        if points:
            lines.append(
                Text(f"  {len(points)} measured only {when}, first {points[0][0]} at step {points[0][1]}")
            )
    made = [(title, pairs) for title, pairs in _made_by(found.difference) if pairs]
    if not found.difference.known:
        lines.append(Text("code, packages, data and machine of then: not noted", "yellow"))
    elif not made:
        lines.append(Text("code, packages, data and machine are the same"))
    return Group(*lines, *(_table(title, pairs, ("then", "now")) for title, pairs in made))


def _made_by(found: Difference) -> list[tuple[str, dict[str, Pair] | None]]:
    return [
        ("code", found.code),
        ("packages", found.packages),
        ("data", found.data),
        ("machine", found.machine),
    ]


def _table(title: str, pairs: dict[str, Pair], names: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title)
    for name in names:
        table.add_column(name, overflow="fold")
    for key, values in pairs.items():
        table.add_row(key, *(Text(_shown(value)) for value in values))
    return table


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)
