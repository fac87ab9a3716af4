"""The terminal: a live table where there is one, plain lines where there is none."""

import sys
import threading
import time

from rich.console import Console as RichConsole
from rich.live import Live
from rich.table import Table

from deit_ray import storage
from deit_ray.terminal.format import duration, short, standard_error

STATE_COLOURS = {
    "running": "cyan",
    "finished": "green",
    "stopped early": "yellow",
    "failed": "red",
    "cancelled": "magenta",
}
REFRESH_PER_S = 2
PIPED_WIDTH = 200  # where no terminal says how wide it is
SHOWN = 30  # rows of the live table at most


class Console:
    """Says what happens, as it happens.

    Args:
        quiet: says nothing but warnings.
    """

    def __init__(self, quiet: bool = False):
        self.out = RichConsole(highlight=False, soft_wrap=True)
        if not (self.out.is_terminal or self.out.is_jupyter):
            self.out.width = PIPED_WIDTH
        self.err = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = quiet
        self.live: Live | None = None
        self.lock = threading.Lock()
        self.trials: dict[int, dict] = {}
        self.begin = time.monotonic()

    def say(self, text: str, style: str | None = None) -> None:
        if not self.quiet:
            self.out.print(text, style=style, markup=False)

    def warn(self, text: str) -> None:
        self.err.print(f"warning: {text}", style="yellow", markup=False)

    def run_started(self, name: str, experiment, device: str) -> None:
        self.begin = time.monotonic()
        self.say(
            f"{name}: training {experiment.student.model} for {experiment.train.epochs} epochs on {device}"
        )

    def run_progress(self, metrics: dict, experiment) -> None:
        total = experiment.train.epochs
        left = (time.monotonic() - self.begin) / metrics["epoch"] * (total - metrics["epoch"])
        shown = [
            f"{name} {metrics[name]:.3f}"
            for name in ("val/loss", "val/top1", "val/top1_dist", "test/top1")
            if name in metrics
        ]
        speed = f"{metrics['perf/images_per_s']:.0f} images/s"
        self.say(f"  epoch {metrics['epoch']:>3}/{total}  {'  '.join(shown)}  {speed}  {duration(left)} left")

    def study_started(self, study, device: str, concurrent: int, trials: int, before: list) -> None:
        """`before` is what a resume does with the trials that were there, as `resume.reconcile` found."""
        self.begin = time.monotonic()
        name, experiment = study.name, study.experiment
        self.name, self.experiment, self.total = name, experiment, trials
        space = ", ".join(experiment.search.space)
        for found in before:
            if found.action != "kept":
                self.say(f"  trial {found.number:>3} {_resumed(found)}")
        self.say(
            f"{name}: {trials} trials of {experiment.train.epochs} epochs on {device}, {concurrent} at a time"
        )
        self.say(f"  searching {space} for the best {experiment.search.metric}")
        if self.out.is_terminal and not self.quiet:
            self.live = Live(
                get_renderable=self._table, console=self.out, refresh_per_second=REFRESH_PER_S, transient=True
            )
            self.live.start()

    def trial_started(self, number: int, params: dict) -> None:
        with self.lock:
            self.trials[number] = {
                "state": "running",
                "params": params,
                "began": time.monotonic(),
                "epoch": 0,
            }
        if self.live is None:
            self.say(f"  trial {number:>3} started        {_params(params)}")

    def trial_interrupted(self, number: int, step: int) -> None:
        self.warn(
            f"trial {number}: its process died; it goes on from {f'step {step}' if step else 'the beginning'}"
        )

    def trial_reported(self, number: int, result: dict, experiment) -> None:
        metric = experiment.search.metric
        with self.lock:
            trial = self.trials.setdefault(
                number, {"state": "running", "params": {}, "began": time.monotonic()}
            )
            trial |= {
                "epoch": result["epoch"],
                "step": result["step"],
                "speed": result.get("perf/images_per_s"),
            }
            if result[metric] > trial.get("best", float("-inf")):
                trial["best"] = result[metric]
                trial["error"] = standard_error(result[metric], result[f"{metric.split('/')[0]}/images"])

    def trial_ended(self, number: int, outcome: str, best: float | None) -> None:
        with self.lock:
            trial = self.trials.setdefault(number, {"params": {}, "began": time.monotonic()})
            trial |= {"state": outcome.split(":")[0].split(" at ")[0], "outcome": outcome}
        if self.live is None or outcome.startswith("failed"):
            error = f" ± {trial['error']:.3f}" if "error" in trial else ""
            value = f"{self.experiment.search.metric} {best:.3f}{error}" if best is not None else ""
            line = f"  trial {number:>3} {outcome:<14} {value}  {duration(time.monotonic() - trial['began'])}"
            self.say(line, "red" if outcome.startswith("failed") else None)

    def study_ended(self, study, best, test: dict, config: str, model: str) -> None:
        self.close()
        self.say(
            f"\n{study.name}: done in {duration(time.monotonic() - self.begin)}: {study.ended}\n", "bold"
        )
        self.show_leaderboard(
            study.leaderboard(), study.experiment.search.metric, list(study.experiment.search.space)
        )
        metric = study.experiment.search.metric
        tested = "".join(f", {name} {test[name]:.4f}" for name in ("test/top1",) if name in test)
        self.say(f"\nbest: trial {best.number}, {metric} {best.value:.4f}{tested}", "bold green")
        for key, value in best.params.items():
            self.say(f"  {key}: {short(value)}")
        command = sys.argv[0] if sys.argv[0].endswith("deit-ray") else "deit-ray"
        self.say("\nlook at every run in MLflow")
        self.say(f"  {command} ui{storage.results_option(study.experiment.results.uri)}")
        self.say("train the best configuration anew, or use its weights")
        self.say(f"  {command} train {_relative(config)}")
        self.say(f"  {command} evaluate {_relative(model)} --data {study.experiment.data.uri}")

    def show_leaderboard(self, board, metric: str, keys: list[str]) -> None:
        """Prints a leaderboard (see `leaderboard.leaderboard`); trials within the error of the best are marked."""
        if self.quiet:
            return
        table = Table(title=None, box=None, pad_edge=False, header_style="bold")
        for name in (
            "trial",
            "state",
            "epochs",
            f"best {metric}",
            "last",
            *(_short_key(k, keys) for k in keys),
        ):
            table.add_column(name, justify="right" if name in ("trial", "epochs") else "left", no_wrap=True)
        for place, row in board.iterrows():
            close = "=" if row["close"] else " "
            error = f" ± {row['error']:.4f}" if row["error"] == row["error"] else ""
            value = f"{close} {row['best']:.4f}{error}" if row["best"] == row["best"] else "  -"
            last = f"{row['last']:.4f}" if row["last"] == row["last"] else "-"
            colour = STATE_COLOURS.get(row["state"], "")
            state = f"[{colour}]{row['state']}[/]" if colour else row["state"]
            cells = [short(row[k]) if row[k] is not None else "-" for k in keys]
            table.add_row(
                str(row["trial"]),
                state,
                str(row["epochs"]),
                value,
                last,
                *cells,
                style="bold" if place == 0 else None,
            )
        self.out.print(table)
        if board["close"].any():
            self.say("= within the standard error of the best: on so few images they cannot be told apart")
        for _, row in board[board["state"] == "failed"].iterrows():
            self.say(f"trial {row['trial']} {row['outcome']}", "red")

    def show_resume(self, study, found: list, missing: int, ends: str | None) -> None:
        """What a resume would do with each trial, as `resume.reconcile` found, or why it would end at once."""
        self.say(f"{study.name}: a resume would do this", "bold")
        for trial in found:
            outcome = study.trial(trial.number).user_attrs.get("outcome", "")
            self.say(
                f"  trial {trial.number:>3} {f'keep: {outcome}' if trial.action == 'kept' else _resumed(trial)}"
            )
        if ends:
            self.say(f"  and end at once, cancelling what is open: {ends}")
        else:
            self.say(f"  and run {missing} new trial{'' if missing == 1 else 's'}")

    def show_studies(self, found: list) -> None:
        """All studies, a line each."""
        if not found:
            self.say("no studies there yet; start one with: deit-ray tune EXPERIMENT")
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("study", "trials", "best", "state"):
            table.add_column(name, no_wrap=True)
        for status in found:
            full = status.board[status.board["state"] == "finished"]
            best = f"{status.metric} {full.iloc[0]['best']:.4f}" if len(full) else "-"
            table.add_row(status.name, _counts(status), best, status.state)
        if found:
            self.out.print(table)

    def show_study(self, status) -> None:
        """A study as it stands."""
        self.say(f"{status.name}: {status.state}", "bold")
        if status.driver is not None and "since" in status.driver:
            since = duration(time.time() - status.driver["since"])
            self.say(f"  driven by process {status.driver['pid']} on {status.driver['host']} since {since}")
        elif status.state == "interrupted":
            self.say(f"  go on with: deit-ray tune --resume {status.name}")
        gpu = f", {status.gpu_s / 3600:.2f} GPU-hours" if status.gpu_s else ""
        self.say(f"  {_counts(status)}; {duration(status.spent_s)} so far{gpu}")
        self.show_leaderboard(status.board, status.metric, status.keys)

    def show_trial(self, status) -> None:
        """A trial as it stands, and why."""
        colour = STATE_COLOURS.get(status.outcome.split(":")[0].split(" at ")[0], "")
        self.say(f"{status.study}, trial {status.number}: {status.outcome}", f"bold {colour}".strip())
        facts = {key: short(value) for key, value in status.params.items()}
        facts["epoch"] = f"{status.epoch} of {status.epochs}"
        facts["step"] = "none logged" if status.step is None else f"{status.step} is the last one logged"
        if status.value is not None:
            facts[status.metric] = f"best {status.value:.4f}, last {status.last:.4f}"
        for worker in status.workers:
            facts[f"rank {worker['rank']}"] = f"on {worker['host']}, process {worker['pid']}"
        facts["checkpoint"] = _relative(status.checkpoint) if status.checkpoint else "none"
        width = max(map(len, facts))
        for name, value in facts.items():
            self.say(f"  {name:<{width}}  {value}")
        shown = {
            n: v
            for n, v in status.metrics.items()
            if n.startswith(("train/loss", "train/lr", "perf/", "cost/", "data/"))
        }
        self.say(
            "  last: " + "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        ) if shown else None
        failure = status.failure
        if failure is not None:
            where = (
                f"on rank {failure.rank} ({failure.host}), "
                if failure.rank is not None
                else "in the trial's own process, "
            )
            when = f"after step {failure.step}" if failure.step else "before a step was logged"
            self.say(f"\nfailed {where}{when}", "red")
            self.say(failure.traceback.rstrip())
        log = failure.log if failure is not None else status.log
        if log:
            self.say("\nthe last lines of the worker's log", "bold")
            self.say("\n".join(log))

    def close(self) -> None:
        """Ends the live table."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _table(self) -> Table:
        metric, epochs = self.experiment.search.metric, self.experiment.train.epochs
        with self.lock:
            trials = dict(sorted(self.trials.items())[-SHOWN:])
            ended = sum(trial["state"] != "running" for trial in self.trials.values())
        elapsed = time.monotonic() - self.begin
        left = f", about {duration(elapsed / ended * (self.total - ended))} left" if ended else ""
        title = f"{self.name}: {ended} of {self.total} trials ended, {duration(elapsed)}{left}"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for name in ("trial", "state", "epoch", "step", metric, "images/s", "left", "values"):
            table.add_column(name, no_wrap=True)
        for number, trial in trials.items():
            running = trial["state"] == "running"
            epoch, began = trial.get("epoch", 0), trial["began"]
            remaining = (time.monotonic() - began) / epoch * (epochs - epoch) if running and epoch else None
            value = f"{trial['best']:.3f} ± {trial['error']:.3f}" if "best" in trial else ""
            speed = f"{trial['speed']:.0f}" if trial.get("speed") and running else ""
            table.add_row(
                f"{number:>5}", f"[{STATE_COLOURS.get(trial['state'], '')}]{trial['state']}", f"{epoch}/{epochs}",
                str(trial.get("step", "")), value, speed, duration(remaining) if remaining else "", _params(trial["params"]),
            )  # fmt: skip
        return table


def _counts(status) -> str:
    """How many trials are in which state, in words."""
    counts = [f"{count} {state}" for state, count in status.counts.items()]
    return ", ".join(counts + ([f"{status.missing} not drawn yet"] if status.missing else [])) or "none"


def _resumed(found) -> str:
    """What a resume does with a trial, in words."""
    if found.outcome:
        return f"had {found.outcome.split(':')[0]}; noted"
    return f"{found.action} from step {found.step}" if found.step else "run again from the beginning"


def _params(params: dict) -> str:
    return " ".join(f"{_short_key(key, list(params))}={short(value)}" for key, value in params.items())


def _short_key(key: str, keys: list[str]) -> str:
    """The last part of a dotted key, or all of it where that is not unique."""
    leaf = key.rpartition(".")[2]
    return leaf if sum(k.rpartition(".")[2] == leaf for k in keys) == 1 else key


def _relative(uri: str) -> str:
    import os

    return os.path.relpath(uri) if storage.is_local(uri) else uri
