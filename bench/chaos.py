"""Kills processes of studies at random moments, and counts what is lost, doubled or left: all must be zero.

The studies have eight short trials on the digits, a random sampler, no scheduler, and a real MLflow server.
The victims (the driver, a worker, the raylet, the tracking server) are killed by SIGKILL in every phase of a
trial (start, step, evaluation, checkpoint, delivery). Then the bench does what a person would do: it runs
`deit-ray tune --resume`, or starts the server again. At the end, the contents of Optuna, MLflow (with its
models) and the journals are compared with those that the experiment requires, and with those of an
undisturbed study.
With --s3, all results are on an S3 API server, moto in a process of its own, which is not killed.

    python bench/chaos.py --kills 20 --seed 0 [--s3]
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mlflow  # noqa: E402
import optuna  # noqa: E402

from bench.metrics import EVALUATION, TRAIN  # noqa: E402
from bench.record import record  # noqa: E402
from deit_ray import storage  # noqa: E402
from deit_ray.results import lease, lock  # noqa: E402
from deit_ray.results.folders import JOURNAL, experiment_of, trial_name  # noqa: E402
from deit_ray.results.journal import iterate_points  # noqa: E402
from deit_ray.study.study import Study  # noqa: E402
from deit_ray.tracking.curves import is_curve  # noqa: E402
from tests.support.commands import DEIT_RAY, wait_for  # noqa: E402
from tests.support.servers import MlflowServer, s3_process  # noqa: E402
from tests.support.tracked import models_below, registered_by, versions_of  # noqa: E402

VICTIMS = ("driver", "worker", "raylet", "server")
PHASES = ("start", "step", "evaluation", "checkpoint", "delivery")
KILLS_PER_STUDY = 5
START_S = 300
ENDS_S = 120  # a driver whose Ray was killed must end by itself within this time
STUDY_S = 900
LEFT_AFTER_S = 120
STATES = {"finished": ("COMPLETE", "FINISHED", "TERMINATED")}  # outcome: Optuna, MLflow, Tune


@dataclass
class Counters:
    """Counts that must all be zero at the end, with a note for each increase."""

    trials_lost: int = 0
    trials_doubled: int = 0
    points_lost: int = 0
    points_doubled: int = 0
    models_lost: int = 0
    models_doubled: int = 0
    states_disagreeing: int = 0
    values_differing: int = 0
    processes_left: int = 0
    notes: list[str] = field(default_factory=list)

    def note(self, name: str, text: str, count: int = 1) -> None:
        """Adds to a counter, and notes why; a count of 0 changes nothing."""
        if count == 0:
            return
        setattr(self, name, getattr(self, name) + count)
        self.notes.append(f"{name} +{count}: {text}")


class Chaos:
    """A folder with prepared data, a teacher, a tracking server, and the studies that are disturbed in it.

    Args:
        folder: folder for everything.
        seed: determines the moments and the order of the kills.
        trials, epochs: numbers of trials of each study, and of epochs of each trial.
        data: folder of the prepared digits; by default they are prepared here.
        teacher: weights of a model trained on the digits; by default a teacher is trained here.
        results: URI of the results; by default a folder below `folder`.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        trials: int = 8,
        epochs: int = 3,
        data: str | None = None,
        teacher: str | None = None,
        results: str | None = None,
    ):
        self.folder, self.trials, self.epochs = folder, trials, epochs
        self.data, self.teacher = data, teacher
        self.results = results or f"{folder}/results"
        self.random = random.Random(seed)
        self.counters = Counters()
        self.kills: list[tuple[str, str]] = []
        self.mark = f"CHAOS={os.getpid()}-{time.time_ns()}"
        self.server = MlflowServer(folder / "server")
        self.say = lambda text: print(text, flush=True)

    def prepare(self) -> None:
        """Starts the server, makes data and a teacher, and runs the undisturbed study."""
        self.server.start()
        if self.data is None:
            self.data = str(self.folder / "data/digits")
            self.run("data", "prepare", "digits", "--out", self.data)
        if self.teacher is None:
            teacher = ["--set", f"data.uri={self.data}", "--set", "train.epochs=5"]
            teacher += ["--set", f"results.uri={self.results}", "--set", f"tracking.uri={self.server.uri}"]
            self.run("train", ROOT / "experiments/digits_teacher.yaml", *teacher)
            self.teacher = "run:digits_teacher"
        experiment = {
            "data": {"uri": self.data},
            "distillation": {"teacher": {"weights": self.teacher}},
            "extends": str(ROOT / "experiments/digits_student.yaml"),
            "train": {"epochs": self.epochs},
            "optim": {"warmup_epochs": 1},
            "tracking": {"uri": self.server.uri, "experiment": "chaos"},
            "results": {"uri": self.results},
            "search": {
                "trials": self.trials,
                "sampler": "random",
                "scheduler": "none",
                "space": {"augment.strength": {"float": [0, 2]}, "optim.lr": {"log": [3e-4, 1e-2]}},
            },
        }
        (self.folder / "chaos.yaml").write_text(json.dumps(experiment))
        self.say("the undisturbed study")
        self.run("tune", "chaos.yaml", "--set", "name=undisturbed")
        self.undisturbed = self.table("undisturbed-1")
        self.check("undisturbed-1")

    def run(self, *arguments) -> None:
        """Runs a command of deit-ray to its end.

        Raises:
            RuntimeError: the command failed.
        """
        with self.start(*arguments) as process:
            if process.wait(timeout=STUDY_S):
                raise RuntimeError(
                    f"{arguments} ended with {process.returncode}:\n{self.log.read_text()[-3000:]}"
                )

    def start(self, *arguments) -> subprocess.Popen:
        """Starts a command of deit-ray in a session of its own."""
        self.log = self.folder / "driver.log"
        environment = os.environ | dict([self.mark.split("=")]) | {"PYTHONPATH": str(ROOT)}
        with open(self.log, "ab") as log:
            command = [*DEIT_RAY, *map(str, arguments)]
            return subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def disturb(self, name: str, cards: list[tuple[str, str]]) -> None:
        """Runs a study to its end with at most KILLS_PER_STUDY kills; removes their cards from the list."""
        driver = self.start("tune", "chaos.yaml", "--set", f"name={name}")
        study, kills = f"{name}-1", 0
        self.await_driver(study, driver)
        deadline = time.monotonic() + STUDY_S
        while time.monotonic() < deadline:
            if driver.poll() is not None:
                if driver.returncode == 0:
                    break
                raise RuntimeError(f"{study} ended with {driver.returncode}:\n{self.log.read_text()[-3000:]}")
            card = cards[0] if cards and kills < KILLS_PER_STUDY else None
            if card is None or not self.kill(study, driver, *card):
                time.sleep(0.2)
                continue
            cards.pop(0)
            kills += 1
            self.kills.append(card)
            self.say(f"  {study}: killed the {card[0]} in {card[1]} ({len(self.kills)})")
            driver = self.recover(study, driver, card[0])
        else:
            raise RuntimeError(f"{study} has not ended after {STUDY_S} s:\n{self.log.read_text()[-3000:]}")
        self.check(study)

    def kill(self, study: str, driver: subprocess.Popen, victim: str, phase: str) -> bool:
        """Waits a random time, then for the phase, and kills. False if the study ended before."""
        until = time.monotonic() + self.random.uniform(0, 6)
        watched, looked, pid = [], 0.0, None
        while driver.poll() is None:
            now = time.monotonic()
            if now - looked > 0.5:
                watched, looked = list(self.threads(driver.pid if phase == "delivery" else None)), now
            found = next((thread for thread in watched if shows(thread, phase)), None)
            if found is None or now < until:
                time.sleep(0.001)
                continue
            if victim == "worker":
                workers = [found] if phase != "delivery" else list(self.threads(None))
                pid = int(workers[0].parts[2]) if workers else None
            else:
                pid = {"driver": driver.pid, "server": self.server.process.pid}.get(victim) or self.find(
                    "raylet/raylet"
                )
            if pid is None or self.has_ended(study):
                return False
            try:
                if victim == "server":
                    self.server.kill()
                else:
                    os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                return False
            return True
        return False

    def recover(self, study: str, driver: subprocess.Popen, victim: str) -> subprocess.Popen:
        """Does what a person would do after a kill, waits until the study runs again, returns its driver."""
        if victim == "server":
            time.sleep(self.random.uniform(1, 6))
            self.server.start()
            return driver
        if victim == "worker":
            before = {thread.parts[2] for thread in self.threads(None)}
            wait_for(
                lambda: driver.poll() is not None or {t.parts[2] for t in self.threads(None)} - before, 60
            )
            return driver
        driver.wait(timeout=ENDS_S)
        driver = self.start("tune", "--resume", study, "--results", self.results)
        self.await_driver(study, driver)
        return driver

    def await_driver(self, study: str, driver: subprocess.Popen) -> None:
        """Waits until a driver has ended, or drives its study."""
        folder = storage.join(self.results, study)
        driver_of = (lock if storage.is_local(folder) else lease).driver_of
        wait_for(
            lambda: driver.poll() is not None or (driver_of(folder) or {}).get("pid") == driver.pid,
            START_S,
        )

    def threads(self, pid: int | None):
        """The `comm` files of threads that show a phase: a driver's that track, or those of all workers.

        Args:
            pid: the driver's; None for all workers.
        """
        wanted = ("tracking", "delivery") if pid else PHASES
        for process in [pid] if pid else self.processes("ray::"):
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{process}/task").iterdir():
                    if (task / "comm").read_text().strip() in wanted:
                        yield task / "comm"

    def processes(self, part: str = ""):
        """The pids of this bench's processes whose command line contains `part`."""
        mark = self.mark.encode() + b"\0"
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if mark in (entry / "environ").read_bytes() and part in (
                        entry / "cmdline"
                    ).read_bytes().decode(errors="replace"):
                        yield int(entry.name)

    def find(self, part: str) -> int | None:
        return next(iter(self.processes(part)), None)

    def has_ended(self, study: str) -> bool:
        return bool(self.optuna(study).user_attrs.get("ended"))

    def optuna(self, study: str) -> optuna.Study:
        return Study.open(study, self.results).optuna

    def table(self, study: str) -> dict:
        """Parameters, intermediate values and value of each trial, to the last digit."""
        return {
            trial.number: (trial.params, trial.intermediate_values, trial.value)
            for trial in self.optuna(study).trials
        }

    def check(self, study: str) -> None:
        """Compares the contents of Optuna, MLflow and the journals with the required ones."""
        note, trials = self.counters.note, self.optuna(study).trials
        client = mlflow.MlflowClient(self.server.uri)
        experiment_id = client.get_experiment_by_name("chaos").experiment_id
        runs = client.search_runs([experiment_id], f"tags.`deit_ray.study` = '{study}'", max_results=1000)
        by_number = collections.defaultdict(list)
        for run in runs:
            by_number[run.data.tags.get("deit_ray.trial", run.data.tags["deit_ray.kind"])].append(run)
        lost = set(range(self.trials)) - {trial.number for trial in trials}
        note("trials_lost", f"{study}: {lost}", len(lost))
        doubled = max(0, len(trials) - self.trials)
        note("trials_doubled", f"{study}: {len(trials)} trials", doubled)
        for number in [*map(str, range(self.trials)), "study"]:
            count = len(by_number[number])
            if count != 1:
                note(
                    "trials_doubled" if count else "trials_lost",
                    f"{study}: {count} MLflow runs of {number}",
                    max(1, count - 1),
                )
        for trial in trials:
            for run in by_number[str(trial.number)][:1]:
                self.check_trial(study, trial, run, client)
        self.check_models(study, trials, client)
        parent = by_number["study"][0]
        if (parent.info.status, parent.data.tags.get("outcome")) != ("FINISHED", "finished"):
            note(
                "states_disagreeing",
                f"{study}: its own run is {parent.info.status}, {parent.data.tags.get('outcome')}",
            )
        for number, expected in self.undisturbed.items():
            if self.table(study).get(number) != expected:
                note(
                    "values_differing",
                    f"{study} trial {number}: {self.table(study).get(number)} instead of {expected}",
                )

    def check_trial(self, study: str, trial, run, client) -> None:
        note, where = self.counters.note, f"{study} trial {trial.number}"
        folder = storage.join(self.results, study)
        experiment = experiment_of(folder)
        steps_per_epoch = (
            1294 // experiment.train.batch_size
        )  # 1,438 training images, of which 10% are held out
        last = experiment.train.epochs * steps_per_epoch
        evaluations = range(steps_per_epoch, last + 1, steps_per_epoch)
        logged = sorted(
            {*range(experiment.train.log_every, last + 1, experiment.train.log_every), *evaluations}
        )
        expected = {*itertools.product(TRAIN, logged), *itertools.product(EVALUATION, evaluations)}

        points = list(iterate_points(storage.join(folder, trial_name(trial.number), JOURNAL)))
        journal = collections.Counter((point.name, point.step) for point in points)
        names = {name for name, _ in expected | journal.keys()}
        history = [
            (name, point) for name in names for point in client.get_metric_history(run.info.run_id, name)
        ]
        stored = collections.Counter((name, point.step) for name, point in history)
        curves = {(name, step) for name, step in expected if is_curve(name)}
        for place, found, wanted in (("the journal", journal, expected), ("MLflow", stored, curves)):
            missing, more = wanted - found.keys(), found.keys() - wanted
            twice = sum(count - 1 for count in found.values())
            note("points_lost", f"{where}: {place}: {sorted(missing)[:3]}", len(missing))
            note("points_doubled", f"{where}: {place}: unexpected {sorted(more)[:3]}", len(more))
            note("points_doubled", f"{where}: {place}", twice)
        values = {(point.name, point.step): point.value for point in points}
        delivered = {place: value for place, value in values.items() if is_curve(place[0])}
        if {(name, point.step): point.value for name, point in history} != delivered:
            note("states_disagreeing", f"{where}: a value in MLflow is not the journal's")
        curve = {
            step // steps_per_epoch: value for (name, step), value in values.items() if name == "val/top1"
        }
        if trial.intermediate_values != curve or trial.value != max(curve.values()):
            note(
                "states_disagreeing", f"{where}: Optuna has {trial.intermediate_values}, the journal {curve}"
            )
        outcome = trial.user_attrs.get("outcome")
        in_tune = self.optuna(study).user_attrs.get("tune", {})  # only trials that the last driver ran
        states = (trial.state.name, run.info.status, in_tune.get(str(trial.number), STATES["finished"][2]))
        if run.data.tags.get("outcome") != outcome or states != STATES.get(outcome):
            note(
                "states_disagreeing",
                f"{where}: outcome {outcome}, {run.data.tags.get('outcome')}, states {states}",
            )

    def check_models(self, study: str, trials, client) -> None:
        """Every finished trial has one model in MLflow, and the best one is a study's only version `best`."""
        folder = storage.join(self.results, study)
        finished = {t.number: t.value for t in trials if t.user_attrs.get("outcome") == "finished"}
        found = {number: models_below(self.server.uri, storage.join(folder, trial_name(number)), "chaos")
                 for number in finished}  # fmt: skip
        for number, models in found.items():
            where = f"{study} trial {number}"
            self.count_models(f"{where}: models", len(models))
            for model in models[:1]:
                outputs = client.get_run(model.source_run_id).outputs.model_outputs
                self.count_models(f"{where}: outputs", [o.model_id for o in outputs].count(model.model_id))
                files = {file.path for file in client.list_logged_model_artifacts(model.model_id)}
                is_whole = str(model.status) == "READY" and {"MLmodel", "model.safetensors"} <= files
                self.count_models(f"{where}: whole models", int(is_whole))
        registered = registered_by(self.server.uri, folder)
        versions = versions_of(self.server.uri, registered.name) if registered else []
        best = found[max(finished, key=lambda number: (finished[number], -number))]
        own = [v for v in versions if v.tags.get("deit_ray.model") in {model.model_id for model in best}]
        self.count_models(f"{study}: versions of the best model", len(own))
        self.count_models(f"{study}: versions", len(versions))
        aliases = registered.aliases if registered else {}
        self.count_models(f"{study}: aliases", int(bool(own) and aliases == {"best": own[0].version}))

    def count_models(self, what: str, count: int) -> None:
        """Notes what there must be once, and is not."""
        name = "models_doubled" if count > 1 else "models_lost"
        self.counters.note(name, f"{what}: {count}", abs(count - 1))

    def finish(self) -> None:
        """Kills the server, and counts the processes that are left two minutes later."""
        self.server.kill()
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not list(self.processes()), LEFT_AFTER_S)
        left = list(self.processes())
        self.counters.note("processes_left", str(left), len(left))


def shows(comm: Path, phase: str) -> bool:
    """Whether the thread of a `comm` file is in a phase now."""
    try:
        return comm.read_text().strip() == phase
    except OSError:
        return False


def deal(generator: random.Random, kills: int) -> list[tuple[str, str]]:
    """`kills` pairs (victim, phase) in random order, each pair about equally often."""
    cards: list[tuple[str, str]] = []
    while len(cards) < kills:
        deck = list(itertools.product(VICTIMS, PHASES))
        generator.shuffle(deck)
        cards += deck
    return cards[:kills]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="determines their moments and order")
    parser.add_argument("--s3", action="store_true", help="keep all results on an S3 API server")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-"))
        results = f"{stack.enter_context(s3_process())}/results" if arguments.s3 else None
        chaos = Chaos(Path(folder), arguments.seed, results=results)
        cards = deal(chaos.random, arguments.kills)
        try:
            chaos.prepare()
            for number in itertools.count():
                if not cards:
                    break
                chaos.disturb(f"chaos{number}", cards)
        finally:
            chaos.finish()
    for text in chaos.counters.notes:
        print(text)
    figures = {name: value for name, value in vars(chaos.counters).items() if name != "notes"}
    by_victim, by_phase = (collections.Counter(kill[place] for kill in chaos.kills) for place in (0, 1))
    record("chaos", figures | {
        "kills": len(chaos.kills),
        "seed": arguments.seed,
        "kills_by_victim": {victim: by_victim[victim] for victim in VICTIMS},
        "kills_by_phase": {phase: by_phase[phase] for phase in PHASES},
    })  # fmt: skip
    sys.exit(any(figures.values()))


if __name__ == "__main__":
    main()
