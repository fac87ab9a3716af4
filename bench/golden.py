"""Proves that a change altered no result: runs a small fixed set with a revision and with the working tree.

The set: prepare the digits; train a teacher, a hard-distilled and a soft-distilled student; kill the
soft-distilled one at its first checkpoint, and continue it; run a study of six trials (random sampler, ASHA,
one trial at a time), kill it at a trial's first checkpoint, and resume it; evaluate a model; predict images.
Each revision prepares the data for itself, so that a change of the data is found too. Both revisions work in
the same folder, one after the other, with one thread, and a new Ray for each command. MLflow is the SQLite
file beside the results.

Every journal, Optuna study, MLflow run and printed prediction is compared, except for LEFT_OUT. Numbers are
compared to the last bit. `differing` must be 0, and `compared` at least 2,000.

--self-test also changes one digit of a journal, an Optuna study, an MLflow run and a prediction in turn, and
must find each. The whole took 19 minutes on two slow CPU cores that were busy with other work (idle ones were
not tried); nearly all of it is the start of Ray and of its processes, once for each command and trial.

    python bench/golden.py REVISION [--expect NAME] [--self-test]
"""

import argparse
import collections
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.record import record  # noqa: E402
from bench.revisions import CommandLine, checked_out, clean_up_when_terminated  # noqa: E402
from deit_ray.tracking.curves import LEFT_OUT as CURVES_LEFT_OUT  # noqa: E402

# Values that are not compared: patterns of a value's whole name. A name begins with the value's kind.
LEFT_OUT = {
    "times": r"(journal|mlflow) .* time_ms|mlflow .* (start|end)_time"
    r"|optuna .* (datetime_(start|complete)|attr (times |time/)\d+|attr spent (wall|gpu)_s)",
    "ids": r"mlflow .* (run_id|experiment_id|tag deit_ray\.id)",
    "host names": r"mlflow .* tag \S*(host|driver)\S*",
    "jobs": r"mlflow .* tag deit_ray\.job",
    "absolute paths": r"mlflow .* artifact_uri",
    "descriptions, which say times": r"mlflow .* tag (mlflow\.note\.content|deit_ray\.description)",
    "code version": r"mlflow .* tag \S*(version|commit)\S*",
    "metrics of the clock": r"(journal|mlflow) .* (perf|cost|system)/.*",
}
KINDS = ("journal", "optuna", "mlflow", "prediction")
LEAST_COMPARED = 2000
MOST_SHOWN = 30

Values = dict[str, str]  # the text of every value, by the value's name

DIGITS = {
    "data": {
        "uri": "data/digits",
        "image_size": 16,
        "crop_scale": [0.8, 1.0],
        "flip": 0.0,
        "views": 1,
        "eval_crop": 1.0,
        "cpus_per_worker": 0.25,
    },
    "optim": {"lr": 0.01, "scale_lr": False, "warmup_epochs": 1},
    "train": {
        "epochs": 6,
        "batch_size": 16,
        "threads": 1,
        "cpus_per_worker": 0.75,
        "device": "cpu",
        "log_every": 4,
    },
}
TEACHER = {
    "student": {"model": "test_resnet", "drop_path": 0.0},
    "distillation": {"kind": "none"},
    "augment": {"policy": "none", "random_erasing": 0.1, "mixup": 0.1, "cutmix": 0.0},
    "optim": {"lr": 0.004},
    "train": {"epochs": 3, "batch_size": 32},
}
STUDENT = {
    "student": {
        "model": "deit_tiny_distilled_patch16_224",
        "patch_size": 4,
        "width": 16,
        "depth": 2,
        "heads": 2,
        "drop_path": 0.0,
    },
    "augment": {"strength": 0.2, "mixup": 0.2, "cutmix": 0.0},
    "optim": {"ema_decay": 0.9},
}
HARD = {
    "distillation": {"kind": "hard", "weight": 0.5, "teacher": {"weights": "run:teacher"}},
    "augment": {"policy": "randaugment"},
}
SOFT = {
    "distillation": {
        "kind": "soft",
        "weight": 0.7,
        "temperature": 2.0,
        "teacher_view": "crop",
        "teacher": {"weights": "run:teacher"},
    },
    "student": {"drop_path": 0.05},
    "augment": {"policy": "three_augment", "cutmix": 0.2},
    "data": {"flip": 0.5, "views": 2},
}
SEARCH = {
    "optim": {"lr": 0.002},
    "train": {"epochs": 5},
    "search": {
        "trials": 6,
        "sampler": "random",
        "scheduler": "asha",
        "grace_epochs": 2,
        "max_concurrent": 1,
        "space": {
            "augment.strength": {"float": [0, 0.4]},
            "optim.lr": {"log": [2e-3, 2e-2]},
            "distillation.weight": {"float": [0.1, 0.9]},
        },
    },
}
EXPERIMENTS = {
    "teacher": (DIGITS, TEACHER),
    "hard": (DIGITS, STUDENT, HARD),
    "soft": (DIGITS, STUDENT, SOFT),
    "study": (DIGITS, STUDENT, HARD, SEARCH),
}
KILLED_TRIAL = 3  # ASHA does not stop it at epoch 2, so it still runs when it is killed
IMAGES = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", help="the git revision whose results must be the same")
    parser.add_argument(
        "--expect", action="append", default=[], choices=EXPECTATIONS, help="a difference to accept"
    )
    parser.add_argument("--self-test", action="store_true", help="also change digits, and find them")
    arguments = parser.parse_args()
    clean_up_when_terminated()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="golden-") as name:
        folder = Path(name).resolve()
        with checked_out(arguments.revision, folder / "revision") as revision:
            then = results_of(revision, folder)
        now = results_of(ROOT, folder)
    check_read_apart(then, now)
    then, now = kept(then), kept(now)
    figures = figures_of(then, now, arguments.expect)
    figures["seconds"] = round(time.monotonic() - began)
    if arguments.self_test:
        figures["digits_found"] = sum(is_digit_found(kind, then, now) for kind in KINDS)
    record("golden", figures)
    passed = figures["differing"] == 0 and figures["compared"] >= LEAST_COMPARED
    sys.exit(not (passed and figures.get("digits_found", len(KINDS)) == len(KINDS)))


def results_of(tree: Path, folder: Path) -> Values:
    """Runs the fixed set with the code of a tree in FOLDER/work, and returns all values."""
    work = folder / "work"
    work.mkdir()
    began = time.monotonic()
    values = run_set(CommandLine(tree, work, folder), work)
    # Each database is read below a folder of its own. MLflow keeps a connection for each path, even when the
    # file has moved: at the same path it would read the first revision's runs again.
    results = work.rename(folder / f"work of {tree.name}") / "results"
    values |= named(journal_values(results))
    values |= named(optuna_values(results))
    values |= named(mlflow_values(results))
    counts = collections.Counter(name.partition(" ")[0] for name in kept(values))
    shown = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)
    seconds = time.monotonic() - began
    print(f"{tree.name}: {sum(counts.values())} values ({shown}) in {seconds:.0f} s", flush=True)
    if missing := [kind for kind in KINDS if not counts[kind]]:
        raise RuntimeError(f"{tree.name}: no values of {', '.join(missing)}")
    return values


def kept(values: Values) -> Values:
    """The values that are compared."""
    return {name: text for name, text in values.items() if not is_left_out(name)}


def is_left_out(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in LEFT_OUT.values())


def check_read_apart(then: Values, now: Values) -> None:
    """Checks that two sets of values come from two MLflow databases: no run may be in both.

    Raises:
        RuntimeError: the runs of one revision were read twice.
    """
    ids = [{text for name, text in values.items() if name.endswith(" run_id")} for values in (then, now)]
    if not all(ids) or ids[0] & ids[1]:
        raise RuntimeError("MLflow's runs of one revision were read for both")


def run_set(command_line: CommandLine, work: Path) -> Values:
    """Runs the fixed set, and returns the numbers that its evaluation and prediction print."""
    run = command_line.run
    for name, parts in EXPERIMENTS.items():
        (work / f"{name}.yaml").write_text(json.dumps({"name": name} | merged(*parts)))
    images = write_images(work / "images")
    run("data", "prepare", "digits", "--out", "data/digits")
    run("train", "teacher.yaml")
    run("train", "hard.yaml")
    command_line.kill_at_checkpoint("soft-1", "train", "soft.yaml")
    run("train", "--continue", "soft-1")
    command_line.kill_at_checkpoint(f"study-1/trial-{KILLED_TRIAL:04d}", "tune", "study.yaml")
    run("tune", "--resume", "study-1")
    evaluation = run("evaluate", "soft-1", "--data", "data/digits")
    prediction = run("predict", "study-1", *images)
    printed = [*printed_values("evaluate soft-1", evaluation), *printed_values("predict study-1", prediction)]
    return named(printed)


def merged(*trees: dict) -> dict:
    """Nested mappings put together; a later one replaces the earlier ones key by key."""
    found: dict = {}
    for tree in trees:
        for key, value in tree.items():
            is_section = isinstance(value, dict) and key != "space"
            found[key] = merged(found.get(key, {}), value) if is_section else value
    return found


def write_images(folder: Path) -> list[str]:
    """Writes some of scikit-learn's digits as PNG files; returns their paths below the working folder."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder.mkdir()
    paths = []
    for number, pixels in enumerate(load_digits().images[:IMAGES]):
        path = folder / f"{number:02d}.png"
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(path)
        paths.append(f"{folder.name}/{path.name}")
    return paths


def printed_values(command: str, output: str) -> Iterator[tuple[str, object]]:
    """The numbers that a command prints.

    An evaluation prints `test/top1 0.9500  test/top5 0.9900`, a prediction `PATH: 3 97.1%, 8 1.2%`.
    """
    for line in output.splitlines():
        image, colon, classes = line.partition(": ")
        if colon:
            pairs = [(f"{image} {name}", number) for name, number in re.findall(r"(\S+) ([\d.]+)%", classes)]
        else:
            pairs = re.findall(r"(\S+/\S+) ([\d.]+)", line)
        for name, number in pairs:
            yield f"prediction {command} {name}", number


def journal_values(results: Path) -> Iterator[tuple[str, object]]:
    """Every point of every journal: numbered files of lines [name, value, step, time in ms]."""
    for journal in sorted(results.rglob("journal")):
        for segment in sorted(journal.glob("*.jsonl")):
            for line in segment.read_text().splitlines():
                name, value, step, time_ms = json.loads(line)
                point = f"journal {journal.parent.relative_to(results)} {name} {step}"
                yield point, value
                yield f"{point} time_ms", time_ms


def optuna_values(results: Path) -> Iterator[tuple[str, object]]:
    """Every value, state and attribute of every Optuna study and of its trials."""
    import optuna

    for database in sorted(results.rglob("study.db")):
        storage = f"sqlite:///{database}"
        for study_name in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=study_name, storage=storage)
            whole = {"direction": study.direction.name, "attr": study.user_attrs}
            yield from flattened(f"optuna {study_name}", whole)
            for trial in study.trials:
                parts = {
                    "state": trial.state.name,
                    "value": trial.value,
                    "param": trial.params,
                    "distribution": {name: str(found) for name, found in trial.distributions.items()},
                    "intermediate": trial.intermediate_values,
                    "attr": trial.user_attrs,
                    "system": trial.system_attrs,
                    "datetime_start": str(trial.datetime_start),
                    "datetime_complete": str(trial.datetime_complete),
                }
                yield from flattened(f"optuna {study_name} trial {trial.number}", parts)


def mlflow_values(results: Path) -> Iterator[tuple[str, object]]:
    """Every run of MLflow: name, status, params, tags, and each metric at each step.

    Runs and their parents are named by run name, since each execution creates new ids.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    client = mlflow.MlflowClient(f"sqlite:///{results}/mlflow.db")
    experiments = client.search_experiments()
    runs = client.search_runs([experiment.experiment_id for experiment in experiments], max_results=1000)
    names = {run.info.run_id: run.info.run_name for run in runs}
    for run in sorted(runs, key=lambda run: (run.info.run_name, run.info.start_time)):
        tags = dict(run.data.tags)
        parent = tags.get("mlflow.parentRunId")
        if parent:
            tags["mlflow.parentRunId"] = names.get(parent, "not there")
        prefix = f"mlflow {run.info.run_name}"
        yield from flattened(prefix, dict(run.info) | {"param": run.data.params, "tag": tags})
        for metric in sorted(run.data.metrics):
            for point in client.get_metric_history(run.info.run_id, metric):
                yield f"{prefix} metric {metric} {point.step}", point.value
                yield f"{prefix} metric {metric} {point.step} time_ms", point.timestamp


def flattened(prefix: str, value: object) -> Iterator[tuple[str, object]]:
    """The leaves of nested mappings and lists; a leaf's name is its path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from flattened(f"{prefix} {key}", inner)
    else:
        yield prefix, value


def named(pairs: Iterable[tuple[str, object]]) -> Values:
    """The `repr` of each value by name: equal texts are equal values. A repeated name gets a number."""
    found: Values = {}
    seen: collections.Counter = collections.Counter()
    for name, value in pairs:
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name} #{seen[name]}"] = repr(value)
    return found


def figures_of(then: Values, now: Values, expect: list[str]) -> dict[str, int]:
    """Compares two sets of values, prints what differs, and counts."""
    differing = differences(then, now)
    expected = {name for key in expect for name in EXPECTATIONS[key](then, now)} & differing
    unexpected = sorted(differing - expected)
    for name in unexpected[:MOST_SHOWN]:
        print(f"  {name}: {then.get(name, 'missing')} then, {now.get(name, 'missing')} now")
    if len(unexpected) > MOST_SHOWN:
        print(f"  and {len(unexpected) - MOST_SHOWN} more")
    compared = len(then.keys() | now.keys())
    return {"differing": len(unexpected), "compared": compared, "expected": len(expected)}


def differences(then: Values, now: Values) -> set[str]:
    """The names of the values that differ, or that only one side has."""
    return {name for name in then.keys() | now.keys() if then.get(name) != now.get(name)}


def early_stopped_status(then: Values, now: Values) -> set[str]:
    """Accepts that MLflow shows a trial that was stopped early as FINISHED, with the tag state PRUNED.

    Before, its status was KILLED, and it had no such tag.
    """
    accepted = set()
    for name in then.keys() & now.keys():
        run = name.removesuffix(" tag outcome")
        status, state = f"{run} status", f"{run} tag state"
        if run == name or not all(values[name].startswith("'stopped early at") for values in (then, now)):
            continue
        changed = (then.get(status), then.get(state), now.get(status), now.get(state))
        if changed == ("'KILLED'", None, "'FINISHED'", "'PRUNED'"):
            accepted |= {status, state}
    return accepted


def described_runs(then: Values, now: Values) -> set[str]:
    """Accepts that MLflow has more params, tags and final values of each run, and fewer curves.

    The best value has another name and the same value. All values of the curves that are left out must be in
    the journals.
    """
    accepted = {name for name in now.keys() - then.keys() if re.match(r"mlflow .* (param|tag) ", name)}
    for name in then.keys() - now.keys():
        metric = name.partition(" metric ")[2].rpartition(" ")[0]
        if metric in CURVES_LEFT_OUT or name.endswith(" param search.trials"):  # a resume may change it
            accepted.add(name)
    for name in now.keys() - then.keys():
        run, is_final, metric = name.removesuffix(" 0").partition(" metric best/")
        before = f"{run} metric best/{metric.replace('_', '/', 1)} 0"
        if is_final and metric in ("epoch", "test_top1"):
            accepted.add(name)
        elif is_final and then.get(before) in (None, now[name]):
            accepted |= {name, before}
    return accepted


def best_value(then: Values, now: Values) -> set[str]:
    """Accepts that MLflow has the best value of each finished run, as best/METRIC, and a study its chance.

    Before, only a study had best/METRIC, and Optuna did not have the accuracy of answering the largest class.
    The value must be one that the run has measured.
    """
    accepted = set()
    for name in now.keys() - then.keys():
        run, is_best, metric = name.removesuffix(" 0").partition(" metric best/")
        if is_best:
            curve = {now[other] for other in now if other.startswith(f"{run} metric {metric} ")}
            accepted |= {name} if now[name] in curve else set()
        elif re.match(r"optuna .* attr largest_class", name):
            accepted.add(name)
    return accepted


# Differences that a change may intend, as --expect names them. Each returns the names of values to accept.
EXPECTATIONS: dict[str, Callable[[Values, Values], set[str]]] = {
    "early-stopped-status": early_stopped_status,
    "best-value": best_value,
    "described-runs": described_runs,
}


def is_digit_found(kind: str, then: Values, now: Values) -> bool:
    """Changes one digit of one value of a kind; returns whether that value, and no other, is found."""
    names = sorted(name for name in now if name.startswith(kind) and re.search(r"\d", now[name]))
    name = names[len(names) // 2]
    text = now[name]
    place = [i for i, character in enumerate(text) if character.isdigit()][-1]
    digit = str((int(text[place]) + 1) % 10)
    changed = now | {name: text[:place] + digit + text[place + 1 :]}
    found = differences(then, changed) ^ differences(then, now) == {name}
    print(f"self-test: {name}: {text} becomes {changed[name]}: {'found' if found else 'NOT FOUND'}")
    return found


if __name__ == "__main__":
    main()
