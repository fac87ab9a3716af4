"""Shows a study or run in progress: a live table on a terminal, else plain lines."""

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Group
from rich.live import Live
from rich.text import Text

from deit_ray import hints
from deit_ray.accuracy import FEW_IMAGES, show_accuracy
from deit_ray.cluster.surroundings import on_head
from deit_ray.experiment.config import Experiment
from deit_ray.outcome import Kind, Outcome
from deit_ray.terminal.console import Console
from deit_ray.terminal.format import STATE_COLOURS, assignments, counted, duration, short, short_key
from deit_ray.terminal.table import FittedTable, wrapped

REFRESH_PER_S = 2
SHOWN = 30  # rows of the live table at most
LONG = 120  # characters that the title, or the list of columns that are not shown, has at most
SHOWN_METRICS = ("val/loss", "val/top1", "val/top1_balanced", "val/top1_dist", "test/top1")
RUNNING = "running"
NOT_COMPILED = (
    "PyTorch could not compile the models, so training continues without compiling, and slower; the worker's "
    "log has the reason; train.compile never avoids the attempt"
)


class RunView:
    """A training run on its own: a line for each evaluation."""

    def __init__(self, console: Console, name: str, experiment: Experiment):
        self.console, self.name, self.experiment = console, name, experiment
        self.began = time.monotonic()

    def started(self, device: str, remarks: Sequence[str] = ()) -> None:
        """Says what is trained, and the remarks as warnings."""
        self.began = time.monotonic()
        model, epochs = self.experiment.student.model, self.experiment.train.epochs
        self.console.say(f"{self.name}: training {model} for {counted(epochs, 'epoch')} on {device}")
        for remark in remarks:
            self.console.warn(remark)

    def reported(self, metrics: dict[str, float]) -> None:
        _warn_of_compiling(self.console, metrics)
        epoch, total = metrics["epoch"], self.experiment.train.epochs
        left_s = (time.monotonic() - self.began) / epoch * (total - epoch)
        shown = "  ".join(f"{name} {_measured(name, metrics)}" for name in SHOWN_METRICS if name in metrics)
        speed = f"{metrics['perf/images_per_s']:.0f} images/s"
        self.console.say(f"  epoch {epoch:>3}/{total}  {shown}  {speed}  {duration(left_s)} left")

    def kept(self, metric: str, values: dict[int, float], metrics: dict[str, float]) -> None:
        """Says which evaluation's model is kept.

        Args:
            metric: by which it is chosen.
            values: the metric by step.
            metrics: of the last evaluation.
        """
        finite = {step: value for step, value in values.items() if math.isfinite(value)}
        if not finite:
            return
        step = max(finite, key=lambda step: (finite[step], step))  # of equal ones, the last
        images = metrics.get(f"{metric.partition('/')[0]}/images")
        value = show_accuracy(finite[step], images, len(finite))
        self.console.say(f"  kept: the model of step {step}, {metric} {value}, the best of {len(finite)}")


def _warn_of_compiling(console: Console, metrics: dict[str, float]) -> None:
    """Warns once if the models were to be compiled and could not be."""
    if metrics.get("perf/compiled") == 0:
        console.warn_once(NOT_COMPILED)


def _measured(name: str, metrics: dict[str, float]) -> str:
    """A metric of an evaluation; the accuracy on few images with its interval."""
    images = metrics.get(f"{name.partition('/')[0]}/images")
    if name.endswith("/top1") and images and images < FEW_IMAGES:
        return show_accuracy(metrics[name], images, digits=3)
    return f"{metrics[name]:.3f}"


@dataclass
class Row:
    """A trial as the live table shows it.

    Attributes:
        state: running, or the kind of its outcome.
        began: by time.monotonic().
        best: the best value of the metric so far, and `choices` the number of values.
        images: the number of images on which the metric is measured.
        images_per_s: training speed at the last evaluation.
    """

    state: str = RUNNING
    params: dict = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    epoch: int = 0
    step: int | None = None
    best: float | None = None
    choices: int = 0
    images: float | None = None
    images_per_s: float | None = None


class StudyView:
    """A study: a live table of its trials, or a line for each start and end of a trial."""

    def __init__(self, console: Console, name: str, experiment: Experiment):
        self.console, self.name, self.experiment = console, name, experiment
        self.metric = experiment.search.metric
        self.rows: dict[int, Row] = {}
        self.lock = threading.Lock()  # of the rows, which the live table's thread reads
        self.live: Live | None = None
        self.total, self.began = 0, time.monotonic()

    def start(
        self,
        device: str,
        concurrent: int,
        total: int,
        resumed: dict[int, str],
        remarks: Sequence[str] = (),
    ) -> None:
        """Says which trials will run, and the remarks as warnings.

        Args:
            concurrent: number of trials at a time.
            total: number of trials to run.
            resumed: by number, what a resume does with each trial that it found open, in words.
            remarks: see `trial.remarks`.
        """
        self.total, self.began = total, time.monotonic()
        say, search, epochs = self.console.say, self.experiment.search, self.experiment.train.epochs
        for number, text in resumed.items():
            say(f"  trial {number:>3} {text}")
        trials = f"{counted(total, 'trial')} of {counted(epochs, 'epoch')}"
        say(f"{self.name}: {trials} on {device}, {concurrent} at a time")
        say(f"  searching {', '.join(search.space)} for the best {self.metric}")
        if on_head() is None:  # a head's pages are opened from the laptop
            say(f"  in MLflow: {hints.command('ui', self.name, results=self.experiment.results.uri)}")
        for remark in remarks:
            self.console.warn(remark)
        if self.console.out.is_terminal and not self.console.quiet:
            self.live = Live(
                get_renderable=self._table,
                console=self.console.out,
                refresh_per_second=REFRESH_PER_S,
                transient=True,
            )
            self.live.start()

    def trial_started(self, number: int, params: dict) -> None:
        with self.lock:
            self.rows[number] = Row(params=params)
        if self.live is None:
            self.console.say(f"  trial {number:>3} started        {assignments(params)}")

    def trial_reported(self, number: int, result: dict) -> None:
        """Shows an evaluation; `result` has its metrics by name."""
        _warn_of_compiling(self.console, result)
        value = result[self.metric]
        with self.lock:
            row = self.rows.setdefault(number, Row())
            is_new = result["epoch"] > row.epoch  # Tune repeats the last result at the end
            row.epoch, row.step = result["epoch"], result["step"]
            row.images_per_s = result.get("perf/images_per_s")
            row.images = result[f"{self.metric.split('/')[0]}/images"]
            if math.isfinite(value):
                row.choices += is_new
                row.best = value if row.best is None else max(value, row.best)

    def trial_ended(self, number: int, outcome: Outcome, best: float | None) -> None:
        """Shows how a trial ended, with its best value if it has one."""
        with self.lock:
            row = self.rows.setdefault(number, Row())
            row.state = str(outcome.kind)
        failed = outcome.kind == Kind.FAILED
        if self.live is None or failed:
            value = "" if best is None else f"{self.metric} {_interval_of(best, row)}"
            took = duration(time.monotonic() - row.began)
            self.console.say(
                f"  trial {number:>3} {outcome.text:<14} {value}  {took}", "red" if failed else None
            )

    def end(self, reason: str) -> None:
        """Says why the study has ended."""
        self.close()
        took = duration(time.monotonic() - self.began)
        self.console.say(f"\n{self.name}: done in {took}: {reason}\n", "bold")

    def close(self) -> None:
        """Removes the live table from the terminal."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _table(self) -> Group:
        with self.lock:
            around = 2 + 2 * -(-LONG // self.console.out.width)  # lines that are no trial
            rows = self._shown_rows(max(1, min(SHOWN, self.console.out.height - around)))
            ended = sum(row.state != RUNNING for row in self.rows.values())
        elapsed_s = time.monotonic() - self.began
        left = f", about {duration(elapsed_s / ended * (self.total - ended))} left" if ended else ""
        title = f"{self.name}: {ended} of {self.total} trials ended, {duration(elapsed_s)}{left}"
        keys = list(self.experiment.search.space)
        columns = ("trial", "state", "epoch", self.metric, "left", "images/s", "step")
        table = FittedTable(*columns, *(short_key(key, keys) for key in keys), right=("trial",))
        for number, row in rows.items():
            table.add_row(*self._cells(number, row), *_values(row, keys))
        return Group(wrapped(title, "bold"), table)

    def _shown_rows(self, most: int) -> dict[int, Row]:
        """The running trials, and as many of the latest others as fit, by number."""
        running = [number for number, row in self.rows.items() if row.state == RUNNING]
        others = [number for number, row in self.rows.items() if row.state != RUNNING]
        left = max(0, most - len(running))
        chosen = sorted(running)[:most] + (sorted(others)[-left:] if left else [])
        return {number: self.rows[number] for number in sorted(chosen)}

    def _cells(self, number: int, row: Row) -> list[str | Text]:
        epochs, running = self.experiment.train.epochs, row.state == RUNNING
        step = "" if row.step is None else str(row.step)
        value = "" if row.best is None else _interval_of(row.best, row)
        speed = f"{row.images_per_s:.0f}" if row.images_per_s and running else ""
        left = ""
        if running and 0 < row.epoch < epochs:
            left = duration((time.monotonic() - row.began) / row.epoch * (epochs - row.epoch))
        state = Text(row.state, STATE_COLOURS.get(row.state, ""))
        return [str(number), state, f"{row.epoch}/{epochs}", value, left, speed, step]


def _values(row: Row, keys: list[str]) -> list[str]:
    """The searched values of a trial; "-" if it is not known yet."""
    return [short(row.params[key]) if key in row.params else "-" for key in keys]


def _interval_of(best: float, row: Row) -> str:
    """The best value of a trial with its interval, if the number of images is known."""
    return show_accuracy(best, row.images, row.choices, digits=3)
