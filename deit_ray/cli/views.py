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
from deit_ray.results.folders import results_of
from deit_ray.results.removal import KEPT
from deit_ray.study.story import INTERRUPTED, TIES, Command, board_cells, tell
from deit_ray.terminal.format import STATE_COLOURS, counted, duration, in_full, short, short_key, size
from deit_ray.terminal.table import FittedTable, PairTable

if TYPE_CHECKING:  # their imports take seconds, and `status` does not need them
    import pandas as pd

    from deit_ray.commands.bench_model import ModelBench
    from deit_ray.commands.diff import Difference, Pair
    from deit_ray.commands.plan import Plan
    from deit_ray.commands.reproduce import Reproduction
    from deit_ray.study.resume import Preview
    from deit_ray.study.status import RunStatus, TrialStatus
    from deit_ray.study.story import Story
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
    tracked = f"and {size(disk.tracked)} of models in MLflow"
    return f"{shown}; {'MLflow has links to the models' if disk.is_linked else tracked}"


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
    story = tell(study, is_running=False)
    remark, results = story.remark(), results_of(study.folder)
    data = storage.absolute(study.experiment.data.uri)
    evaluate = hints.command("evaluate", storage.absolute(story.model), "--data", data)
    removed = len(story.board) > KEPT and study.experiment.results.keep == "best"
    return Group(
        show_leaderboard(story.board, story.metric, story.keys),
        Text(f"\nbest: {story.best_line()}", "bold yellow" if remark else "bold green"),
        *(Text(f"  95% interval of {line}") for line in story.intervals()),
        *([Text(f"  {remark}", "yellow")] if remark else []),
        *(Text(f"  {key}: {short(value)}") for key, value in story.best_params.items()),
        Text("\ncompare its runs in MLflow"),
        Text(f"  {hints.command('ui', study.name, results=results)}"),
        Text("train the best configuration again, or use its weights"),
        *(Text(f"  {_typed(command, results)}") for command in story.training()),
        Text(f"  {evaluate}"),
        *([Text(f"checkpoints are kept of the best {KEPT} trials (results.keep: best)", "dim")] * removed),
    )


def _typed(command: Command, results: str) -> str:
    return hints.command(*command.words, results=results if command.takes_results else None)


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
        parts.append(Text(TIES))
    if board["low"].notna().any():
        parts.append(Text("(95% interval of the best of a trial's epochs; docs/reliability.md)", "dim"))
    for _, row in board[board["state"] == str(Kind.FAILED)].iterrows():
        parts.append(Text(f"trial {row['trial']} {row['outcome']}", "red"))
    return Group(*parts)


def _board_cells(row: pd.Series, keys: list[str]) -> list[str | Text]:
    trial, state, *others = board_cells(row, keys)
    return [trial, Text(state, STATE_COLOURS.get(state, "")), *others]


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


def show_studies(found: list[Story]) -> Group:
    """All studies, one line each."""
    if not found:
        return Group(Text("no studies here yet; start one with: deit-ray tune EXPERIMENT"))
    table = FittedTable("study", "best", "state", "trials", wraps="state")
    for story in found:
        best = "-" if story.best is None else f"{story.metric} {story.best['best']:.4f}"
        table.add_row(story.name, best, story.state, story.trial_counts())
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


def show_study(story: Story) -> Group:
    """A study's `Story` as the terminal shows it."""
    lines = [Text(f"{story.name}: {story.state}", "bold")]
    if story.driver is not None and "since" in story.driver:
        elapsed = duration(time.time() - story.driver["since"])
        pid, host = story.driver["pid"], story.driver["host"]
        lines.append(Text(f"  driven by process {pid} on {host} for {elapsed}"))
    elif story.state == INTERRUPTED:
        lines.append(Text(f"  {_resuming(story)}"))
    lines.append(Text(f"  {story.trial_counts()}; {story.cost()}"))
    if story.importances:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in story.importances.items())
        lines.append(Text(f"  importances: {shares}"))
    parts = [*lines, show_leaderboard(story.board, story.metric, story.keys)]
    if remark := story.remark():
        parts.append(Text(f"  {remark}", "yellow"))
    return Group(*parts)


def describe_unfinished(story: Story) -> str | None:
    """Says that a study has not ended, so that its best trial may change; None if it has."""
    if story.has_ended:
        return None
    how = f"; {_resuming(story)}" if story.state == INTERRUPTED else ""
    return f"{story.name} is {story.state} ({story.trial_counts()}): another trial may become the best{how}"


def _resuming(story: Story) -> str:
    """How to resume an interrupted study, or why it cannot be resumed here."""
    if story.refusal:
        return story.refusal
    (resume,) = story.continuing()
    return f"resume with: {_typed(resume, results_of(story.folder))}"


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
