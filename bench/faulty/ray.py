"""Cases of bench/faults.py that need a local Ray: runs, studies, evaluations, and what breaks meanwhile."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np

from bench.faulty.expect import either, expect, printed, refused
from bench.faulty.experiments import LR, distilled, study, teacher_of, write_experiment
from bench.faulty.inputs import packed, write, write_model
from bench.faulty.people import widest
from bench.faulty.stage import Seen, Stage, case
from tests.support.servers import MlflowServer

DEAD = "http://127.0.0.1:9"
PROXIES = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "grpc_proxy"), DEAD)
GO_ON = r"--(resume|continue)"
RUN_S = 240


def train(stage: Stage, keys: dict, expected, command: str = "train", **options) -> Seen:
    """Runs `train` or `tune` on a small experiment."""
    return expect(stage, [command, write_experiment(stage, keys)], expected, **{"within_s": RUN_S} | options)


def evaluate(stage: Stage, expected, model=None, **options) -> Seen:
    """Evaluates the earlier version's teacher on the digits."""
    words = ["evaluate", model or teacher_of(stage), "--data", stage.shared / "digits"]
    return expect(stage, words, expected, **{"within_s": RUN_S} | options)


def rows(database: Path, query: str) -> list[tuple]:
    with sqlite3.connect(database) as connection:
        return connection.execute(query).fetchall()


def trials_of(stage: Stage, name: str = "small-1") -> dict[int, tuple[str, float | None]]:
    """The state and value of each trial in a study's database."""
    query = "select number, state, value from trials left join trial_values using (trial_id)"
    return {
        number: (state, value) for number, state, value in rows(stage / f"results/{name}/study.db", query)
    }


# studies


@case("study_shown", "people", ray=True, terminal_80=(80,))
def study_shown(stage: Stage, columns: int) -> None:
    """A study in a terminal of 80 columns, over a value that is none in the file: its winner everywhere."""
    space = {"optim.clip_grad": {"float": [0.5, 5.0]}, "optim.lr": {"choice": [0.02, 1e-5]}}
    keys = study(
        space,
        **{"search.trials": 3, "search.scheduler": "none", "train.epochs": 4, "search.max_concurrent": 1},
    )
    seen = train(stage, keys, printed("best"), "tune", columns=columns)
    if seen.status != 0:
        return
    if widest(seen.text) > columns:
        stage.fault(
            "silent", f"{seen.line}: a line of {widest(seen.text)} columns in a terminal of {columns}"
        )
    values = {number: value for number, (_, value) in trials_of(stage).items()}
    best = max(values, key=values.get)
    if not re.search(rf"trial {best}\b.*{values[best]:.4f}", " ".join(seen.text.split())):
        stage.fault("silent", f"{seen.line}: does not name trial {best} with {values[best]:.4f}")
    winners = mlflow_winners(stage / "results/mlflow.db", len(values))
    if winners.get("trial", {}).get(str(best)) is None or not winners["agrees"](best, values[best]):
        stage.fault(
            "silent",
            f"MLflow shows no metric by which trial {best} ({values[best]:.4f}) wins: {winners['shown']}",
        )


def mlflow_winners(database: Path, count: int) -> dict:
    """What MLflow's table of runs shows of each trial: the latest value of every metric with `top1`."""
    query = (
        "select t.value, m.key, m.value from latest_metrics m join tags t on t.run_uuid = m.run_uuid "
        "where t.key = 'deit_ray.trial' and m.key like '%val%top1%'"
    )
    shown: dict[str, dict[str, float]] = {}
    for trial, key, value in rows(database, query):
        shown.setdefault(key, {})[trial] = value
    whole = {key: values for key, values in shown.items() if len(values) == count}

    def agrees(best: int, value: float) -> bool:
        return any(
            abs(values[str(best)] - value) < 1e-9 and max(values.values()) == values[str(best)]
            for values in whole.values()
        )

    trials = {trial: True for values in whole.values() for trial in values}
    return {"trial": trials, "agrees": agrees, "shown": json.dumps(shown)[:200]}


@case("exhausted_space", "checks", ray=True, two=(2,))
def exhausted_space(stage: Stage, count: int) -> None:
    """A space of choices that is exhausted: said, and no trial is trained twice."""
    keys = study({"optim.lr": {"choice": [0.01, 0.02][:count]}}, **{"search.trials": 4, "train.epochs": 2})
    said = printed(
        r"exhaust|every combination|all (\d+|two) (combinations|values)|no other|nothing new|repeats"
    )
    train(stage, keys, either(said, refused("exhaust|combinations|space")), "tune")
    if (stage / "results/small-1/study.db").exists() and len(trials_of(stage)) > count:
        stage.fault("silent", f"{len(trials_of(stage))} trials of {count} combinations were trained")


@case("odd_batches", "checks", ray=True, workers=(2,))
def odd_batches(stage: Stage, workers: int) -> None:
    """A batch size that the workers do not divide costs one draw at most; the study ends."""
    keys = study({"train.batch_size": {"int": [32, 64]}}, **{"train.workers": workers, "train.epochs": 2})
    seen = train(stage, keys, either(printed("best"), refused("batch_size", "workers")), "tune")
    if seen.status == 0:
        states = [state for state, _ in trials_of(stage).values()]
        if len(states) < 4 or not {"COMPLETE", "PRUNED"} & set(states):
            stage.fault("silent", f"{seen.line}: of 4 trials, {len(states)} were drawn: {trials_of(stage)}")


@case("teacher_space", "checks", ray=True, two=(0.0,))
def teacher_space(stage: Stage, factor: float) -> None:
    """A space over the teacher's weights: each trial its own teacher, or refused."""

    def weaken(tensors: dict) -> dict:
        return {
            name: value[::-1].copy() if name.startswith("head") else value for name, value in tensors.items()
        }

    other = write_model(teacher_of(stage), stage / "other.safetensors", weaken)
    space = {"distillation.teacher.weights": {"choice": [str(teacher_of(stage)), str(other)]}}
    keys = distilled(teacher_of(stage), **{"distillation.weight": 0.9}) | study(
        space, **{"search.scheduler": "none"}
    )
    seen = train(stage, keys, either(printed("best"), refused("teacher")), "tune")
    if seen.status == 0:
        drawn = {
            path.parent.name: teachers_in(path)
            for path in (stage / "results/small-1").glob("trial-*/experiment.yaml")
        }
        losses = [last_loss(stage / "results/small-1" / name) for name in drawn]
        if len(set(drawn.values())) > 1 and len(set(losses)) == 1:
            stage.fault("silent", f"{seen.line}: trials of two teachers are equal to the last bit: {losses}")


def last_loss(folder: Path) -> float:
    """The last training loss in a trial's journal."""
    points = [
        json.loads(line)
        for file in (folder / "journal").glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    return max((step, value) for name, value, step, _ in points if name == "train/loss")[1]


def teachers_in(path: Path) -> str:
    return re.search(r"weights: ?(.+?)[,}\n]", path.read_text())[1]


@case("run_names", "checks", ray=True, trial=("trial-5",))
def run_names(stage: Stage, name: str) -> None:
    """A run whose name is a trial's: refused, or continued in the right folder."""
    seen = train(stage, {"name": name}, either(printed("finished"), refused("name")))
    if seen.status != 0:
        return
    expect(stage, ["train", "--continue", f"{name}-1", "--epochs", "3"], printed("finished"), within_s=RUN_S)
    stray = [
        path.name for path in stage.root.iterdir() if path.is_dir() and (path / "experiment.yaml").exists()
    ]
    if stray:
        stage.fault("silent", f"the continued run lies beside the results, not in them: {', '.join(stray)}")


@case("no_val_run", "checks", ray=True, zero=(0.0,))
def no_val_run(stage: Stage, holdout: float) -> None:
    """A run without val images is shown and saved by epoch."""
    saved = set()

    def look(process) -> None:
        saved.update(path.name for path in (stage / "results/small-1").glob("step-*"))

    seen = train(stage, {"data.holdout": holdout, "train.epochs": 12}, printed("finished"), during=look)
    if seen.status == 0 and len(saved) < 2:
        stage.fault("silent", f"{seen.line}: {len(saved)} checkpoint in 12 epochs without val images")
    if seen.status == 0 and not re.search(r"epoch +\d+", seen.text):
        stage.fault("silent", f"{seen.line}: no epoch is printed: {seen.text[-200:]!r}")


@case("own_holdout", "checks", ray=True, third=(0.3,))
def own_holdout(stage: Stage, holdout: float) -> None:
    """`evaluate RUN --split val` takes the run's own holdout."""
    train(stage, {"data.holdout": holdout}, printed("finished"))
    words = ["evaluate", "small-1", "--data", stage.shared / "digits", "--split", "val"]
    expect(stage, words, printed(rf"\b{round(1438 * holdout)}\b"), within_s=RUN_S)


@case("no_better_than_chance", "people", ray=True, noise=(3,))
def no_better_than_chance(stage: Stage, classes: int) -> None:
    """A model that is no better than the largest class is not shown as if it were; the interval is."""
    random = np.random.default_rng(0)
    for name in "abc"[:classes]:
        for i in range(60):
            write(
                stage / "mine" / name / f"{i}.png",
                packed(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)),
            )
    stage.setup("data", "prepare", "mine", "--out", "noise")
    said = printed(r"largest class|chance|no better|not better", r"interval|\(0\.\d+-[01]\.\d+\)")
    train(stage, {"data.uri": "noise", "train.batch_size": 16}, said)


# surroundings


@case("proxies", "environment", ray=True, evaluate=("evaluate",), train_and_server=("train",))
def proxies(stage: Stage, command: str) -> None:
    """A proxy that is set does not come between this machine's processes."""
    if command == "evaluate":
        evaluate(stage, printed(r"test/top1 +0\.19"), env=PROXIES)
        return
    stage.results.add("server")
    with MlflowServer(stage / "server") as server:
        train(stage, {"tracking.uri": server.uri}, printed("finished"), env=PROXIES)
        arrived = rows(stage / "server/mlflow.db", "select count(*) from metrics where key like 'val/top1%'")
        if not arrived[0][0]:
            stage.fault("silent", "with a proxy, no metric has arrived at the MLflow server on loopback")


@case("artifacts_refused", "environment", ray=True, unwritable=("/proc/artifacts",))
def artifacts_refused(stage: Stage, root: str) -> None:
    """A server whose artifact root cannot be written: metrics arrive, the artifacts are named once."""
    stage.results.add("server")
    with RefusingServer(stage / "server", root) as server:
        seen = train(stage, {"tracking.uri": server.uri}, printed("finished", "artifact"), within_s=120)
        arrived = rows(stage / "server/mlflow.db", "select count(*) from metrics where key like 'val/top1%'")
        if not arrived[0][0]:
            stage.fault("silent", f"{seen.line}: no metric has arrived at the MLflow server")
        if len(re.findall("artifact", seen.text)) > 3:
            stage.fault(
                "silent", f"{seen.line}: names the artifacts {len(re.findall('artifact', seen.text))} times"
            )
        expect(
            stage,
            ["sync", "small-1"],
            either(printed("artifact"), printed("artifact", status=1)),
            within_s=90,
        )


class RefusingServer(MlflowServer):
    """An MLflow server whose artifact root cannot be written."""

    def __init__(self, folder: Path, root: str):
        super().__init__(folder)
        self.root = root

    def start(self, wait: bool = True) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        words = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--backend-store-uri",
            self.backend,
            "--host",
            "127.0.0.1",
            "--default-artifact-root",
            self.root,
            "--no-serve-artifacts",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        with open(self.folder / "server.log", "ab") as log:
            quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
            self.process = subprocess.Popen(
                words, stdout=log, stderr=log, env=os.environ | quiet, start_new_session=True
            )
        self.wait()


@case("tracking_obeyed", "environment", ray=True, variable=("MLFLOW_TRACKING_URI",))
def tracking_obeyed(stage: Stage, variable: str) -> None:
    """MLFLOW_TRACKING_URI is obeyed, and said."""
    database = stage / "home/elsewhere.db"
    train(stage, {}, printed("finished", r"elsewhere\.db"), env={variable: f"sqlite:///{database}"})
    if not database.exists() or not rows(database, "select count(*) from metrics")[0][0]:
        stage.fault("silent", f"{variable} names a database in which no metric has arrived")


@case("homes", "environment", ray=True, unset=({"HOME": None},), unwritable=({"HOME": "/proc/1"},))
def homes(stage: Stage, env: dict) -> None:
    """A Ray starts without a HOME that can be written."""
    evaluate(stage, printed(r"test/top1 +0\.19"), env=env | {"HF_HOME": None})


@case("long_tmpdir", "environment", ray=True, slurm=(90,))
def long_tmpdir(stage: Stage, length: int) -> None:
    """A long TMPDIR, as Slurm sets: it runs, or one sentence says why not."""
    folder = stage.short / ("job_" + "4711" * 40)[:length]
    folder.mkdir()
    env = {"TMPDIR": str(folder), "RAY_TMPDIR": None}
    evaluate(stage, either(printed(r"test/top1 +0\.19"), refused("TMPDIR")), env=env)


@case("uv_run", "environment", ray=True, evaluate=("evaluate",))
def uv_run(stage: Stage, command: str) -> None:
    """`uv run deit-ray` runs: Ray looks for a parent process that is `uv run`."""
    script = "import subprocess, sys\nsys.exit(subprocess.call(sys.argv[1:]))\n"
    write(stage / "run", script)
    as_uv = ("bash", "-c", f'exec -a uv {sys.executable} run "$@"', "sh")
    evaluate(stage, printed(r"test/top1 +0\.19"), prefix=as_uv, within_s=150)


@case(
    "ended_by_signal",
    "environment",
    ray=True,
    train=("train", "SIGTERM"),
    tune=("tune", "SIGTERM"),
    hangup=("tune", "SIGHUP"),
)
def ended_by_signal(stage: Stage, command: str, name: str) -> None:
    """A signal: as Ctrl-C; the message says how to go on."""
    keys = {"train.epochs": 400} | (study(LR, **{"search.max_concurrent": 1}) if command == "tune" else {})
    sent = []

    def send(process):
        if list((stage / "results").rglob("step-*")):
            sent.append(process.send_signal(getattr(signal, name)))
            return True

    seen = stage.run(command, write_experiment(stage, keys), during=send, within_s=RUN_S)
    if not sent:
        stage.fault("silent", f"{seen.line}: no checkpoint was seen before its end: {seen.text[-200:]}")
    elif seen.status not in (129, 130, 143) or not re.search(GO_ON, seen.text):
        stage.fault(
            "silent", f"{seen.line}: {name}: exit status {seen.status}, and said: {seen.text[-200:]!r}"
        )


@case("closed_output", "environment", ray=True, tune=("tune",))
def closed_output(stage: Stage, command: str) -> None:
    """`tune | head -2` goes on, or says on stderr how to go on."""
    keys = study(LR, **{"search.trials": 2, "train.epochs": 3, "search.scheduler": "none"})
    pipe = ("bash", "-c", '"$@" | head -2; exit ${PIPESTATUS[0]}', "sh")
    seen = stage.run(command, write_experiment(stage, keys), prefix=pipe, within_s=RUN_S)
    database = stage / "results/small-1/study.db"
    finished = (
        [1 for state, _ in trials_of(stage).values() if state == "COMPLETE"] if database.exists() else []
    )
    if len(finished) != 2 and not re.search(GO_ON, seen.err):
        text = f"{len(finished)} of 2 trials finished, status {seen.status}, stderr says {seen.err[-200:]!r}"
        stage.fault("silent", f"{seen.line} | head -2: {text}")


@case("full_disk", "environment", ray=True, train=("train",))
def full_disk(stage: Stage, command: str) -> None:
    """A disk that fills up under a run: one message, and how to go on."""
    disk = stage / "results"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    stage.undo.append(lambda: subprocess.run(["umount", "-l", str(disk)], check=True))

    def fill(process):
        if list(disk.glob("small-1/step-*")):
            subprocess.run(["dd", "if=/dev/zero", f"of={disk}/big"], capture_output=True, check=False)
            return True

    keys = {"train.epochs": 400, "train.max_failures": 0}
    train(stage, keys, refused(r"no space|full", GO_ON), command, during=fill)


@case("memory_taken", "environment", ray=True, by_another_process=(5,))
def memory_taken(stage: Stage, gigabytes: int) -> None:
    """Memory is taken: Ray kills the trial's processes; the trial goes on, or it is said how."""
    fields = dict(re.findall(r"(\w+): +(\d+) kB", Path("/proc/meminfo").read_text()))
    total, available = int(fields["MemTotal"]), int(fields["MemAvailable"])
    used = (total - available) / total
    threshold = min(0.9, used + 1.2 * gigabytes * (1 << 20) / total)
    env = {"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    hog = []

    def take(process):
        if list((stage / "results").rglob("step-*")):
            size = int((threshold - used) * total * 1024 * 1.1)
            code = f"import time; x = bytearray({size}); x[::4096] = b'1' * len(x[::4096]); time.sleep(6)"
            hog.append(subprocess.Popen([sys.executable, "-c", code]))
            return True

    keys = study(LR, **{"search.trials": 1, "train.epochs": 150, "search.scheduler": "none"})
    try:
        train(
            stage,
            keys,
            either(printed("best"), refused(GO_ON + "|memory ran out")),
            "tune",
            during=take,
            env=env,
        )
    finally:
        for process in hog:
            process.kill()
            process.wait()
