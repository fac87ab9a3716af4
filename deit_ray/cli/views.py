"""The tables that commands print: plans, differences, reproductions, studies and trials."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from deit_ray import hints, storage
from deit_ray.accuracy import chance_remark, show_accuracy
from deit_ray.outcome import Kind
from deit_ray.results.folders import BEST, MODEL, results_of
from deit_ray.results.origin import describe_other_numerics
from deit_ray.results.removal import KEPT
from deit_ray.terminal.format import STATE_COLOURS, counted, duration, in_full, short, short_key, size
from deit_ray.terminal.table import FittedTable, PairTable

if TYPE_CHECKING:  # their imports take seconds, and `status` does not need them
    import pandas as pd

    from deit_ray.commands.bench_model import ModelBench
    from deit_ray.commands.diff import Difference, Pair
    from deit_ray.commands.plan import Plan
    from deit_ray.commands.reproduce import Reproduction
    from deit_ray.study.records import TrialRecord
    from deit_ray.study.resume import Preview
    from deit_ray.study.status import RunStatus, StudyStatus, TrialStatus
    from deit_ray.study.study import Study
    from deit_ray.trial.evaluation import Evaluation
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
    have = f"{found.where} has {counted(cpus, 'CPU')}" + (f" and {counted(gpus, 'GPU')}" if gpus else "")
    rows = {
        "a trial needs": found.needs.sum_shown(experiment),
        "at once": f"{found.fit} fit, {found.concurrent} will run: {have}",
        "at most": _most(found),
        "time at most": _time(found),
        "disk at most": _disk(found),
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
    if found.remarks:
        rows["warning"] = "\n".join(found.remarks)
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
    run = f"{counted(trials, 'trial')} x {counted(epochs, 'epoch')} = {counted(found.epochs, 'epoch')}"
    return f"{run}, {found.steps:,} steps, {found.samples:,} samples{early}"


def _time(found: Plan) -> str:
    if found.rate is None:
        return (
            "not known: no run of such a student has been measured here; "
            "set the speed of one worker in cost.images_per_s"
        )
    speed = f"{found.rate.images_per_s:.0f} images/s a worker ({found.rate.source})"
    worked = f"{found.worker_hours:.3g} CPU-worker-hours"
    if found.gpu_hours is not None:
        worked = f"{found.gpu_hours:.3g} GPU-hours"
    training = f"{worked} of training, which take {_duration(found.hours)}"
    return f"{training}; {speed}; plus starts and evaluations"


def _disk(found: Plan) -> str:
    disk = found.disk
    parts = f"model {size(disk.model)}, two checkpoints of {size(disk.checkpoint)}"
    shown = f"{size(disk.trial)} a trial ({parts})"
    if disk.trials > 1:
        kept = f"results.keep: {disk.keep}"
        shown += f", {size(disk.running)} in all; {size(disk.ended)} once the study has ended ({kept})"
    return f"{shown}; and {size(disk.tracked)} of models in MLflow"


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


def _trials_table(found: Plan) -> FittedTable:
    table = FittedTable("trial", *found.experiment.search.space, right=("trial",))
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
    return f"{value:g}" if isinstance(value, float) else in_full(value)


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


def _table(title: str, pairs: dict[str, Pair], names: tuple[str, str]) -> PairTable:
    return PairTable(title, names, {key: tuple(map(_shown, values)) for key, values in pairs.items()})


def _shown(value: Any) -> str:
    return "-" if value is None else in_full(value)


def show_result(study: Study) -> Group:
    """A study that has ended, with its best trial and what to do next."""
    best, metric, keys = study.best(), study.experiment.search.metric, list(study.experiment.search.space)
    tested = study.tested_best()
    names = [name for name in ("test/top1", "test/top1_balanced") if name in tested]
    score = "".join(f", {name} {tested[name]:.4f}" for name in names)
    remarks = _remarks(metric, best.value, best.images, tested, study.largest)
    config, model = (storage.absolute(storage.join(study.folder, name)) for name in (BEST, MODEL))
    ui = hints.command("ui", results=results_of(study.folder))
    evaluate = hints.command("evaluate", model, "--data", storage.absolute(study.experiment.data.uri))
    removed = len(study.records()) > KEPT and study.experiment.results.keep == "best"
    return Group(
        show_leaderboard(study.leaderboard(), metric, keys),
        Text(
            f"\nbest: trial {best.number}, {metric} {best.value:.4f}{score}",
            "bold yellow" if remarks else "bold green",
        ),
        *_intervals(metric, best, tested),
        *remarks,
        *(Text(f"  {key}: {short(value)}") for key, value in best.params.items()),
        Text("\nlook at every run in MLflow"),
        Text(f"  {ui}"),
        Text("train the best configuration again, or use its weights"),
        Text(f"  {hints.command('train', config)}"),
        Text(f"  {evaluate}"),
        *([Text(f"checkpoints are kept of the best {KEPT} trials (results.keep: best)", "dim")] * removed),
    )


def _intervals(metric: str, best: TrialRecord, tested: dict[str, float]) -> list[Text]:
    """The intervals of the best trial's values; no line if the numbers of images are not known."""
    shown = []
    if best.images:
        chosen = f", as the best of {best.choices} evaluations" if best.choices > 1 else ""
        shown.append(f"{metric} {show_accuracy(best.value, best.images, best.choices)}{chosen}")
    if "test/top1" in tested and "test/images" in tested:
        shown.append(f"test/top1 {show_accuracy(tested['test/top1'], tested['test/images'])}")
    return [Text(f"  95% interval of {text}") for text in shown]


def _remarks(
    metric: str, value: float, images: float | None, tested: dict[str, float], largest: dict[str, float]
) -> list[Text]:
    """Says that a model is not better than always answering the largest class, where that is so.

    The test images decide, if the model was tested; else those by which it was chosen.
    """
    split, _, name = metric.partition("/")
    remark = chance_remark(metric, value, images, largest.get(split) if name.startswith("top1") else None)
    if "test/top1" in tested:
        remark = chance_remark(
            "test/top1", tested["test/top1"], tested.get("test/images"), largest.get("test")
        )
    return [Text(f"  {remark}", "yellow")] if remark else []


def show_evaluation(found: Evaluation, files: list[str]) -> Group:
    """What a model answered: the error of its accuracy, the worst classes, and the files with everything."""
    name, images = f"{found.split}/top1", found[f"{found.split}/images"]
    parts = [Text(f"top-1 with its 95% interval: {show_accuracy(found[name], images)}")]
    if remark := chance_remark(name, found[name], images, found.largest_share):
        parts.append(Text(remark, "yellow"))
    by_class = [entry for entry in found.answers.by_class() if entry.images]
    worst = sorted(by_class, key=lambda entry: entry.top1)[:SHOWN_CLASSES]
    table = FittedTable("class", "images", "top-1", "most often taken for", right=("images",))
    for entry in worst:
        taken_for = f"{entry.taken_for[0]}, {entry.taken_for[1]} times" if entry.taken_for else "-"
        value = show_accuracy(entry.top1, entry.images, digits=3)
        table.add_row(entry.name, str(entry.images), value, taken_for)
    parts.append(table)
    if len(found.answers.classes) <= SMALL_MATRIX:
        parts += [Text(), _confusion_table(found)]
    if len(by_class) > len(worst):
        parts.append(Text(f"the worst {len(worst)} of {len(by_class)} classes; classes.csv has all", "dim"))
    return Group(*parts, *(Text(f"  {file}") for file in files))


SHOWN_CLASSES = 20
SMALL_MATRIX = 12  # classes of a confusion matrix that the terminal shows


def _confusion_table(found: Evaluation) -> FittedTable:
    """Number of images by label (rows) and answer (columns); a column is numbered as its row."""
    numbers = [str(label) for label in range(len(found.answers.classes))]
    table = FittedTable("label", "is", *numbers, right=("label", *numbers), keep=2)
    for number, name, counts in zip(
        numbers, found.answers.classes, found.answers.confusion.tolist(), strict=True
    ):
        table.add_row(number, name, *(str(count) if count else "." for count in counts))
    return table


def show_leaderboard(board: pd.DataFrame, metric: str, keys: list[str]) -> Group:
    """A leaderboard (see `leaderboard.leaderboard`); trials within the error of the best are marked."""
    searched = [short_key(key, keys) for key in keys]
    table = FittedTable(
        "trial", "state", "epochs", f"best {metric}", "last", *searched, right=("trial", "epochs")
    )
    for place, row in board.iterrows():
        table.add_row(*_board_cells(row, keys), style="bold" if place == 0 else None)
    parts = [table]
    if board["close"].any():
        parts.append(Text("= within the error of the best: too few images to say which is better"))
    if board["low"].notna().any():
        parts.append(Text("(95% interval of the best of a trial's epochs; docs/reliability.md)", "dim"))
    for _, row in board[board["state"] == str(Kind.FAILED)].iterrows():
        parts.append(Text(f"trial {row['trial']} {row['outcome']}", "red"))
    return Group(*parts)


def _board_cells(row: pd.Series, keys: list[str]) -> list[str | Text]:
    close = "=" if row["close"] else " "
    error = f" ({row['low']:.3f}-{row['high']:.3f})" if row["low"] == row["low"] else ""
    value = f"{close} {row['best']:.4f}{error}" if row["best"] == row["best"] else "  -"
    last = f"{row['last']:.4f}" if row["last"] == row["last"] else "-"
    state = Text(row["state"], STATE_COLOURS.get(row["state"], ""))
    searched = ["-" if row[key] is None else short(row[key]) for key in keys]
    return [str(row["trial"]), state, str(row["epochs"]), value, last, *searched]


def show_resume(preview: Preview) -> Group:
    """A `Preview` as the terminal shows it."""
    lines = [Text(f"{preview.name}: a resume would do this", "bold")]
    lines += [Text(f"  trial {number:>3} {text}") for number, text in preview.trials.items()]
    if preview.ends:
        lines.append(Text(f"  and end at once, cancelling open trials: {preview.ends}"))
    else:
        lines.append(Text(f"  and run {counted(preview.missing, 'new trial')}"))
    return Group(*lines)


def show_models(found: ModelBench) -> Group:
    """A `ModelBench` as the terminal shows it."""
    table = FittedTable(
        "model",
        "images/s",
        "parameters",
        "multiply-adds",
        "accuracy",
        "pixels",
        "of",
        right=("images/s", "parameters", "multiply-adds", "pixels"),
    )
    for model in found.models:
        table.add_row(
            model.model,
            f"{model.images_per_s:,.1f}",
            f"{model.parameters / 1e6:.2f} M",
            f"{model.multiply_adds / 1e9:.3g} G",
            str(model.accuracy) if model.accuracy else "-",
            str(model.image_size),
            model.name if model.name != model.model else "timm",
        )
    how = f"inference on {found.device}, {found.precision}, {found.batch_size} images at once"
    return Group(Text(how, "bold"), table)


def show_studies(found: list[StudyStatus]) -> Group:
    """All studies, one line each."""
    if not found:
        return Group(Text("no studies here yet; start one with: deit-ray tune EXPERIMENT"))
    table = FittedTable("study", "best", "state", "trials", wraps="state")
    for status in found:
        full = status.board[status.board["state"] == str(Kind.FINISHED)]
        best = f"{status.metric} {full.iloc[0]['best']:.4f}" if len(full) else "-"
        table.add_row(status.name, best, status.state, _counts(status))
    return Group(table)


def show_runs(found: list[RunStatus]) -> Group:
    """All runs of `train`, one line each."""
    if not found:
        return Group()
    table = FittedTable("run", "state", "test/top1", wraps="state")
    for run in found:
        top1 = run.metrics.get("test/top1")
        table.add_row(run.name, run.state, "-" if top1 is None else f"{top1:.4f}")
    return Group(Text(), table)


def show_study(status: StudyStatus) -> Group:
    """A `StudyStatus` as the terminal shows it."""
    lines = [Text(f"{status.name}: {status.state}", "bold")]
    if status.driver is not None and "since" in status.driver:
        elapsed = duration(time.time() - status.driver["since"])
        pid, host = status.driver["pid"], status.driver["host"]
        lines.append(Text(f"  driven by process {pid} on {host} for {elapsed}"))
    elif status.state == "interrupted":
        lines.append(Text(f"  {_resuming(status)}"))
    gpu = f", {status.gpu_s / 3600:.2f} GPU-hours" if status.gpu_s else ""
    lines.append(Text(f"  {_counts(status)}; {duration(status.spent_s)} so far{gpu}"))
    board = show_leaderboard(status.board, status.metric, status.keys)
    first = status.board.iloc[0] if len(status.board) else None
    if first is None or first["state"] != str(Kind.FINISHED):
        return Group(*lines, board)
    remarks = _remarks(status.metric, first["best"], status.images, status.tested, status.largest)
    return Group(*lines, board, *remarks)


def describe_unfinished(status: StudyStatus) -> str | None:
    """Says that a study has not ended, so that its best trial may change; None if it has."""
    if status.state not in ("running", "interrupted"):
        return None
    how = f"; {_resuming(status)}" if status.state == "interrupted" else ""
    return f"{status.name} is {status.state} ({_counts(status)}): another trial may become the best{how}"


def _resuming(status: StudyStatus) -> str:
    """How to resume an interrupted study, or why it cannot be resumed here."""
    if refusal := describe_other_numerics(status.name, status.folder):
        return refusal
    again = hints.command("tune", "--resume", status.name, results=results_of(status.folder))
    return f"resume with: {again}"


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
        if name.startswith(("train/loss", "train/lr", "perf/", "cost/", "system/", "data/"))
    ]
    if shown:
        lines.append(Text(f"  last: {'  '.join(shown)}"))
    if status.failure is not None:
        lines += _failure_lines(status.failure)
    log = status.log if status.failure is None else status.failure.log
    if log and status.state != str(Kind.FINISHED):
        lines += [Text("\nthe last lines of the worker's log", "bold"), Text("\n".join(log))]
    return Group(*lines)


def _trial_facts(status: TrialStatus) -> dict[str, str]:
    facts = {key: short(value) for key, value in status.params.items()}
    facts["epoch"] = f"{status.epoch} of {status.epochs}"
    facts["step"] = "none logged" if status.step is None else f"{status.step} is the last one logged"
    if status.value is not None:
        best = show_accuracy(status.value, status.images, status.choices)
        facts[status.metric] = f"best {best}, last {status.last:.4f}"
    balanced = f"{status.metric.partition('/')[0]}/top1_balanced"
    if balanced in status.metrics:
        facts[balanced] = f"last {status.metrics[balanced]:.4f}"
    for worker in status.workers:
        facts[f"rank {worker['rank']}"] = f"on {worker['host']}, process {worker['pid']}"
    removed = "removed when the study ended (results.keep: best)"
    facts["checkpoint"] = status.checkpoint or (removed if status.removed else "none")
    return facts


def _failure_lines(failure: Failure) -> list[Text]:
    where = "in the trial's own process, "
    if failure.rank is not None:
        where = f"on rank {failure.rank} ({failure.host}), "
    when = f"after step {failure.step}" if failure.step else "before a step was logged"
    return [Text(f"\nfailed {where}{when}", "red"), Text(failure.traceback.rstrip())]
