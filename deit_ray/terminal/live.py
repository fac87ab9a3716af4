"""Shows a study or run in progress: a live table on a terminal, else plain lines."""

import threading
import time
from dataclasses import dataclass, field

from rich.live import Live
from rich.table import Table

from deit_ray.experiment.config import Experiment
from deit_ray.outcome import Kind, Outcome
from deit_ray.terminal.console import Console
from deit_ray.terminal.format import STATE_COLOURS, assignments, duration, standard_error

REFRESH_PER_S = 2
SHOWN = 30  # rows of the live table at most
RUNNING = "running"


class RunView:
    """A training run on its own: a line for each evaluation."""

    def __init__(self, console: Console, name: str, experiment: Experiment):
        self.console, self.name, self.experiment = console, name, experiment
        self.began = time.monotonic()

    def started(self, device: str) -> None:
        self.began = time.monotonic()
        model, epochs = self.experiment.student.model, self.experiment.train.epochs
        self.console.say(f"{self.name}: training {model} for {epochs} epochs on {device}")

    def reported(self, metrics: dict[str, float]) -> None:
        epoch, total = metrics["epoch"], self.experiment.train.epochs
        left_s = (time.monotonic() - self.began) / epoch * (total - epoch)
        names = [name for name in ("val/loss", "val/top1", "val/top1_dist", "test/top1") if name in metrics]
        shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in names)
        speed = f"{metrics['perf/images_per_s']:.0f} images/s"
        self.console.say(f"  epoch {epoch:>3}/{total}  {shown}  {speed}  {duration(left_s)} left")


@dataclass
class Row:
    """A trial as the live table shows it.

    Attributes:
        state: running, or the kind of its outcome.
        began: by time.monotonic().
        best, error: the best value of the metric, and its standard error.
        images_per_s: training speed at the last evaluation.
    """

    state: str = RUNNING
    params: dict = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    epoch: int = 0
    step: int | None = None
    best: float | None = None
    error: float | None = None
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

    def start(self, device: str, concurrent: int, total: int, resumed: dict[int, str]) -> None:
        """Says which trials will run.

        Args:
            concurrent: number of trials at a time.
            total: number of trials to run.
            resumed: by number, what a resume does with each trial that it found open, in words.
        """
        self.total, self.began = total, time.monotonic()
        say, search, epochs = self.console.say, self.experiment.search, self.experiment.train.epochs
        for number, text in resumed.items():
            say(f"  trial {number:>3} {text}")
        say(f"{self.name}: {total} trials of {epochs} epochs on {device}, {concurrent} at a time")
        say(f"  searching {', '.join(search.space)} for the best {self.metric}")
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
        value = result[self.metric]
        with self.lock:
            row = self.rows.setdefault(number, Row())
            row.epoch, row.step = result["epoch"], result["step"]
            row.images_per_s = result.get("perf/images_per_s")
            if value > (float("-inf") if row.best is None else row.best):
                row.best = value
                row.error = standard_error(value, result[f"{self.metric.split('/')[0]}/images"])

    def trial_ended(self, number: int, outcome: Outcome, best: float | None) -> None:
        """Shows how a trial ended, with its best value if it has one."""
        with self.lock:
            row = self.rows.setdefault(number, Row())
            row.state = str(outcome.kind)
        failed = outcome.kind == Kind.FAILED
        if self.live is None or failed:
            error = "" if row.error is None else f" ± {row.error:.3f}"
            value = "" if best is None else f"{self.metric} {best:.3f}{error}"
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

    def _table(self) -> Table:
        with self.lock:
            rows = dict(sorted(self.rows.items())[-SHOWN:])
            ended = sum(row.state != RUNNING for row in self.rows.values())
        elapsed_s = time.monotonic() - self.began
        left = f", about {duration(elapsed_s / ended * (self.total - ended))} left" if ended else ""
        title = f"{self.name}: {ended} of {self.total} trials ended, {duration(elapsed_s)}{left}"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for name in ("trial", "state", "epoch", "step", self.metric, "images/s", "left", "values"):
            table.add_column(name, no_wrap=True)
        for number, row in rows.items():
            table.add_row(*self._cells(number, row))
        return table

    def _cells(self, number: int, row: Row) -> list[str]:
        epochs, running = self.experiment.train.epochs, row.state == RUNNING
        step = "" if row.step is None else str(row.step)
        value = "" if row.best is None else f"{row.best:.3f} ± {row.error:.3f}"
        speed = f"{row.images_per_s:.0f}" if row.images_per_s and running else ""
        left = ""
        if running and 0 < row.epoch < epochs:
            left = duration((time.monotonic() - row.began) / row.epoch * (epochs - row.epoch))
        state = f"[{STATE_COLOURS.get(row.state, '')}]{row.state}"
        return [
            f"{number:>5}",
            state,
            f"{row.epoch}/{epochs}",
            step,
            value,
            speed,
            left,
            assignments(row.params),
        ]
