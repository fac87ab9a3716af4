"""The tables that commands print: plans, differences, reproductions, studies and trials."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from deit_ray import hints, storage
from deit_ray.outcome import Kind
from deit_ray.results.folders import BEST, MODEL, results_of
from deit_ray.terminal.format import STATE_COLOURS, duration, short, short_key

if TYPE_CHECKING:  # their imports take seconds, and `status` does not need them
    import pandas as pd

    from deit_ray.commands.diff import Difference, Pair
    from deit_ray.commands.plan import Plan
    from deit_ray.commands.reproduce import Reproduction
    from deit_ray.study.resume import Preview
    from deit_ray.study.status import StudyStatus, TrialStatus
    from deit_ray.study.study import Study
    from deit_ray.trial.failure import Failure


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
    "hours": "the study has run {0:g} hours",
    "gpu_hours": "{0:g} GPU-hours are used",
    "target": "{1} reaches {0:g}",
    "patience": "{0} trials in a row are no better than the best",
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
        return (
            "not known: no run of such a student has been measured here; "
            "set the speed of one worker in cost.images_per_s"
        )
    unit = "GPU-hours" if found.device == "cuda" else "CPU-worker-hours"
    speed = f"{found.rate.images_per_s:.0f} images/s a worker ({found.rate.source})"
    training = f"{found.worker_hours:.3g} {unit} of training, which take {_duration(found.hours)}"
    return f"{training}; {speed}; plus starts and evaluations"


def _duration(hours: float) -> str:
    return f"{hours:.3g} hours" if hours >= 1 else f"{60 * hours:.3g} min"


def _money(found: Plan) -> str:
    if found.money is not None:
        return f"{found.money:,.2f} (cost.per_gpu_hour {found.experiment.cost.per_gpu_hour:g})"
    if found.device != "cuda":
        return "not known: cost.per_gpu_hour is the price of a GPU, and no GPU is used"
    return "not known: " + (
        "no speed is known"
        if found.experiment.cost.per_gpu_hour is not None
        else "set the price in cost.per_gpu_hour"
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
        parts.append(Text("code, packages, data and machine: not known for both", style="yellow"))
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
            f"{found.names[1]}: {found.equal} of {total} metric points up to step {found.step} "
            f"equal those of {found.names[0]}",
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
        lines.append(Text("code, packages, data and machine of the first run: not recorded", "yellow"))
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


def show_result(study: Study) -> Group:
    """A study that has ended, with its best trial and what to do next."""
    best, metric, keys = study.best(), study.experiment.search.metric, list(study.experiment.search.space)
    tested = study.tested.metrics if study.tested else {}
    score = f", test/top1 {tested['test/top1']:.4f}" if "test/top1" in tested else ""
    config, model = (storage.absolute(storage.join(study.folder, name)) for name in (BEST, MODEL))
    ui = hints.command("ui", results=results_of(study.folder))
    evaluate = hints.command("evaluate", model, "--data", storage.absolute(study.experiment.data.uri))
    return Group(
        show_leaderboard(study.leaderboard(), metric, keys),
        Text(f"\nbest: trial {best.number}, {metric} {best.value:.4f}{score}", "bold green"),
        *(Text(f"  {key}: {short(value)}") for key, value in best.params.items()),
        Text("\nlook at every run in MLflow"),
        Text(f"  {ui}"),
        Text("train the best configuration again, or use its weights"),
        Text(f"  {hints.command('train', config)}"),
        Text(f"  {evaluate}"),
    )


def show_leaderboard(board: pd.DataFrame, metric: str, keys: list[str]) -> Group:
    """A leaderboard (see `leaderboard.leaderboard`); trials within the error of the best are marked."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    searched = [short_key(key, keys) for key in keys]
    for name in ("trial", "state", "epochs", f"best {metric}", "last", *searched):
        table.add_column(name, justify="right" if name in ("trial", "epochs") else "left", no_wrap=True)
    for place, row in board.iterrows():
        table.add_row(*_board_cells(row, keys), style="bold" if place == 0 else None)
    parts = [table]
    if board["close"].any():
        parts.append(Text("= within the standard error of the best: too few images to say which is better"))
    for _, row in board[board["state"] == str(Kind.FAILED)].iterrows():
        parts.append(Text(f"trial {row['trial']} {row['outcome']}", "red"))
    return Group(*parts)


def _board_cells(row: pd.Series, keys: list[str]) -> list[str]:
    close = "=" if row["close"] else " "
    error = f" ± {row['error']:.4f}" if row["error"] == row["error"] else ""
    value = f"{close} {row['best']:.4f}{error}" if row["best"] == row["best"] else "  -"
    last = f"{row['last']:.4f}" if row["last"] == row["last"] else "-"
    colour = STATE_COLOURS.get(row["state"], "")
    state = f"[{colour}]{row['state']}[/]" if colour else row["state"]
    searched = ["-" if row[key] is None else short(row[key]) for key in keys]
    return [str(row["trial"]), state, str(row["epochs"]), value, last, *searched]


def show_resume(preview: Preview) -> Group:
    """A `Preview` as the terminal shows it."""
    lines = [Text(f"{preview.name}: a resume would do this", "bold")]
    lines += [Text(f"  trial {number:>3} {text}") for number, text in preview.trials.items()]
    if preview.ends:
        lines.append(Text(f"  and end at once, cancelling open trials: {preview.ends}"))
    else:
        lines.append(Text(f"  and run {preview.missing} new trial{'s' * (preview.missing != 1)}"))
    return Group(*lines)


def show_studies(found: list[StudyStatus]) -> Group:
    """All studies, one line each."""
    if not found:
        return Group(Text("no studies here yet; start one with: deit-ray tune EXPERIMENT"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("study", "trials", "best", "state"):
        table.add_column(name, no_wrap=True)
    for status in found:
        full = status.board[status.board["state"] == str(Kind.FINISHED)]
        best = f"{status.metric} {full.iloc[0]['best']:.4f}" if len(full) else "-"
        table.add_row(status.name, _counts(status), best, status.state)
    return Group(table)


def show_study(status: StudyStatus) -> Group:
    """A `StudyStatus` as the terminal shows it."""
    lines = [Text(f"{status.name}: {status.state}", "bold")]
    if status.driver is not None and "since" in status.driver:
        elapsed = duration(time.time() - status.driver["since"])
        pid, host = status.driver["pid"], status.driver["host"]
        lines.append(Text(f"  driven by process {pid} on {host} for {elapsed}"))
    elif status.state == "interrupted":
        again = hints.command("tune", "--resume", status.name, results=results_of(status.folder))
        lines.append(Text(f"  resume with: {again}"))
    gpu = f", {status.gpu_s / 3600:.2f} GPU-hours" if status.gpu_s else ""
    lines.append(Text(f"  {_counts(status)}; {duration(status.spent_s)} so far{gpu}"))
    return Group(*lines, show_leaderboard(status.board, status.metric, status.keys))


def _counts(status: StudyStatus) -> str:
    """How many trials are in which state, in words."""
    counts = [f"{count} {state}" for state, count in status.counts.items()]
    if status.missing:
        counts.append(f"{status.missing} not drawn yet")
    return ", ".join(counts) or "none"


def show_trial(status: TrialStatus) -> Group:
    """A `TrialStatus` as the terminal shows it."""
    state = status.outcome.text if status.outcome else status.state
    colour = STATE_COLOURS.get(status.state, "")
    lines = [Text(f"{status.study}, trial {status.number}: {state}", f"bold {colour}".strip())]
    facts = _trial_facts(status)
    width = max(map(len, facts))
    lines += [Text(f"  {name:<{width}}  {value}") for name, value in facts.items()]
    shown = [
        f"{name} {value:.4g}"
        for name, value in status.metrics.items()
        if name.startswith(("train/loss", "train/lr", "perf/", "cost/", "data/"))
    ]
    if shown:
        lines.append(Text(f"  last: {'  '.join(shown)}"))
    if status.failure is not None:
        lines += _failure_lines(status.failure)
    log = status.log if status.failure is None else status.failure.log
    if log:
        lines += [Text("\nthe last lines of the worker's log", "bold"), Text("\n".join(log))]
    return Group(*lines)


def _trial_facts(status: TrialStatus) -> dict[str, str]:
    facts = {key: short(value) for key, value in status.params.items()}
    facts["epoch"] = f"{status.epoch} of {status.epochs}"
    facts["step"] = "none logged" if status.step is None else f"{status.step} is the last one logged"
    if status.value is not None:
        facts[status.metric] = f"best {status.value:.4f}, last {status.last:.4f}"
    for worker in status.workers:
        facts[f"rank {worker['rank']}"] = f"on {worker['host']}, process {worker['pid']}"
    facts["checkpoint"] = status.checkpoint if status.checkpoint else "none"
    return facts


def _failure_lines(failure: Failure) -> list[Text]:
    where = "in the trial's own process, "
    if failure.rank is not None:
        where = f"on rank {failure.rank} ({failure.host}), "
    when = f"after step {failure.step}" if failure.step else "before a step was logged"
    return [Text(f"\nfailed {where}{when}", "red"), Text(failure.traceback.rstrip())]
