"""The command line: it parses, calls the package, and prints."""

import os
import shlex
import sys
from typing import Annotated, Literal

import typer

from deit_ray.console import Console
from deit_ray.errors import Interrupted, UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="Search for the best way to train a distilled vision transformer, on a laptop or a Ray cluster.")  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Images in, shards out.")
app.add_typer(data_app, name="data")
bench_app = typer.Typer(no_args_is_help=True, help="What limits a run.")
app.add_typer(bench_app, name="bench")

Experiment = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="an experiment file")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="replace a value of the file")]
Address = Annotated[str | None, typer.Option(help="of a Ray cluster; by default RAY_ADDRESS, or a Ray of its own")]
OnHead = Annotated[str | None, typer.Option(help="of a Ray cluster, on whose head it looks for the study; by default here")]
Results = Annotated[str, typer.Option(help="folder of the results")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="show Ray's output and tracebacks")]


@data_app.command("prepare")
def data_prepare(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="a folder, a file or a URI with images (docs/data.md), or: digits")],
    out: Annotated[str, typer.Option(help="folder to write: a path, or file://, s3://, gs://")],
    short_side: Annotated[int, typer.Option(min=0, help="longer short sides are scaled down to this; 0 keeps the original bytes")] = 256,
    quality: Annotated[int, typer.Option(min=1, max=100, help="of the JPEGs")] = 92,
    format: Annotated[str | None, typer.Option(help="of SOURCE, where looking does not tell: ilsvrc2012, folders, parquet, "
                                               "webdataset or arrays")] = None,
    labels: Annotated[str | None, typer.Option(help="labels of ILSVRC2012's validation images: lines of: name synset")] = None,
    exif: Annotated[bool, typer.Option("--exif", help="apply the rotation that EXIF asks for; by default not, as in timm")] = False,
    max_bad: Annotated[str, typer.Option(metavar="PART", help="stop when more of the images are unreadable, such as 0.1%")] = "0.1%",
    address: Address = None,
    verbose: Verbose = False,
):  # fmt: skip
    """Prepare a data set: images become shards that training streams. Run again, it does what is missing or damaged."""
    from deit_ray.data.prepare import prepare
    from deit_ray.data.progress import shown_on

    console = Console()
    command = "deit-ray " + shlex.join(sys.argv[1:])
    prepared = prepare(
        source, out, short_side, quality, command, format=format, labels=labels, exif=exif, max_bad=_part("--max-bad", max_bad),
        address=address, progress=shown_on(console), warn=console.warn, verbose=verbose,
    )  # fmt: skip
    manifest = prepared.manifest
    images = ", ".join(f"{manifest.rows(split)} {split}" for split in manifest.splits)
    console.say(f"{out}: {images} images of {len(manifest.classes)} classes")
    for label, name in list(enumerate(manifest.classes))[:20]:
        console.say(f"  {name}: " + ", ".join(f"{c[label]} {split}" for split, c in manifest.class_counts.items()))
    if len(manifest.classes) > 20:
        console.say(f"  and {len(manifest.classes) - 20} classes more")
    shards = sum(map(len, manifest.splits.values()))
    console.say(f"  {prepared.written} of {shards} shards written" + ("" if prepared.written else ": all were there, and whole"))
    for note in prepared.notes:
        console.warn(note)
    for split, names in prepared.unreadable.items():
        if names:
            console.warn(f"{len(names)} images for {split} cannot be read and were left out, such as {names[0]}; see {out}/unreadable.csv")
    if twice := manifest.duplicates.get("count"):
        console.warn(f"{twice} test images are training images too, byte for byte, such as {manifest.duplicates['such as'][0]}")


@data_app.command("check")
def data_check(
    uri: Annotated[str, typer.Argument(metavar="URI", help="a prepared data set")],
    address: Address = None,
    verbose: Verbose = False,
):
    """Check checksums, counts, labels and every image of a prepared data set; the exit status is 1 if something is wrong."""
    from deit_ray.data.check import check
    from deit_ray.data.progress import shown_on

    console = Console()
    checked = check(uri, address=address, progress=shown_on(console), warn=console.warn, verbose=verbose)
    for problem in checked.problems[:20]:
        console.say(f"  {problem}", "red")
    if len(checked.problems) > 20:
        console.say(f"  and {len(checked.problems) - 20} more", "red")
    console.say(f"{uri}: " + checked.verdict(), "bold red" if checked.problems else "bold green")
    raise typer.Exit(1 if checked.problems else 0)


@data_app.command("show")
def data_show(
    uri: Annotated[str, typer.Argument(metavar="URI", help="a prepared data set")],
    out: Annotated[str, typer.Option(help="picture to write, .png or .jpg")] = "samples.png",
    experiment: Annotated[str | None, typer.Option(help="whose student's views are shown; by default an experiment's defaults")] = None,
    set: Set = [],  # noqa: B006
    samples: Annotated[int, typer.Option(min=1, max=64, help="images to show")] = 8,
    strengths: Annotated[
        bool, typer.Option("--strengths", help="instead: what the policy does at augment.strength 0, 0.5, 1, 1.5, 2")
    ] = False,
):
    """Write a contact sheet: images as they are stored and as the student sees them in training, with labels."""
    from deit_ray.show import show

    Console().say(show(uri, out, experiment, _overrides(set), samples, strengths))


@bench_app.command("data")
def bench_data(
    experiment: Experiment,
    set: Set = [],  # noqa: B006
    seconds: Annotated[float, typer.Option(min=0.1, help="for each of its three measurements, about")] = 10.0,
    address: Address = None,
    verbose: Verbose = False,
):
    """Say whether the stream or the step limits a run, and how many CPUs would feed it; nothing is kept."""
    loaded = _load(experiment, set)
    from deit_ray.bench_data import bench_data

    console = Console()
    console.say(f"{loaded.name}: {bench_data(loaded, address, console, verbose, seconds).sentence()}")


@app.command()
def train(
    experiment: Annotated[str | None, typer.Argument(metavar="EXPERIMENT", help="an experiment file")] = None,
    set: Set = [],  # noqa: B006
    go_on: Annotated[str | None, typer.Option("--continue", metavar="RUN", help="go on with a run, or with a trial: STUDY/7")] = None,
    epochs: Annotated[int | None, typer.Option(help="with --continue: train what has finished on, to so many epochs")] = None,
    schedule: Annotated[
        Literal["stretch", "hold"] | None,
        typer.Option(help="of the learning rate with --epochs: the cosine of all N epochs (default), or it stays at its minimum"),
    ] = None,
    address: Address = None,
    results: Annotated[str, typer.Option(help="with --continue: folder of the results")] = "results",
    verbose: Verbose = False,
):
    """Train one model, or go on with one."""
    if (experiment is None) == (go_on is None):
        raise UserError("train: name either an experiment file or --continue RUN")
    if go_on and set:
        raise UserError("train: --set cannot change a run that exists; --epochs and --schedule can prolong it")
    if schedule and epochs is None:
        raise UserError(f"train: --schedule {schedule} says how to go on with --continue RUN --epochs N; name both")
    if experiment and epochs is not None:
        raise UserError("train: --epochs belongs to --continue; for a new run use --set train.epochs=N")
    console = Console()
    if go_on:
        from deit_ray.continuing import continue_run

        run = continue_run(go_on, epochs, schedule or "stretch", results, address, console, verbose)
    else:
        loaded = _load(experiment, set)
        from deit_ray.run import train

        run = train(loaded, address, console, verbose)
    console.say(
        f"{run.name}: finished; {_metrics(run.metrics)}\n  {os.path.relpath(run.folder)}/model.safetensors",
        "bold green",
    )


@app.command()
def plan(experiment: Experiment, set: Set = [], address: Address = None):  # noqa: B006
    """Say what a study or run would take; nothing is started."""
    loaded = _load(experiment, set)
    from deit_ray.plan import plan, show_plan

    Console().out.print(show_plan(plan(loaded, address)))


@app.command()
def tune(
    experiment: Annotated[str | None, typer.Argument(metavar="EXPERIMENT")] = None,
    set: Set = [],  # noqa: B006
    resume: Annotated[str | None, typer.Option(metavar="STUDY", help="go on with a study")] = None,
    trials: Annotated[str | None, typer.Option(metavar="+N", help="with --resume: so many trials more")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="with --resume: only say what would be done")] = False,
    address: Address = None,
    results: Annotated[str | None, typer.Option(help="with --resume: folder of the results")] = None,
    verbose: Verbose = False,
):
    """Run a study: search for the best configuration."""
    if (experiment is None) == (resume is None):
        raise UserError("tune: name either an experiment file or --resume STUDY")
    if (trials or dry_run) and not resume:
        raise UserError("tune: --trials and --dry-run go with --resume STUDY; for a new study: --set search.trials=N")
    if results and not resume:
        raise UserError(f"tune: --results goes with --resume STUDY; for a new study: --set results.uri={results}")
    results = results or "results"
    if trials and not (trials.startswith("+") and trials[1:].isdigit()):
        raise UserError(f"tune: --trials {trials}: must be +N, so many trials more, such as +20")
    console = Console()
    from deit_ray.resume import dry_run as show
    from deit_ray.search import tune

    amend = _overrides(set)
    if resume and trials:
        from deit_ray.study import Study

        amend["search.trials"] = Study.open(resume, results).experiment.search.trials + int(trials)
    if dry_run:
        show(resume, results, console, amend)
        return
    try:
        if resume:
            tune(None, address, resume, console, verbose, results, amend)
        else:
            tune(_load(experiment, set), address, None, console, verbose)
    finally:
        console.close()


@app.command()
def status(
    study: Annotated[str | None, typer.Argument(metavar="STUDY")] = None,
    trial: Annotated[int | None, typer.Argument(metavar="TRIAL")] = None,
    address: OnHead = None,
    results: Results = "results",
):
    """Show all studies, the leaderboard of one, or how one of its trials stands and why."""
    console = Console()
    from deit_ray.cluster import calling
    from deit_ray.status import list_status, study_status, trial_status

    with calling(address, console.warn) as call:
        if study is None:
            console.show_studies(call(list_status, results))
        elif trial is None:
            console.show_study(call(study_status, study, results))
        else:
            console.show_trial(call(trial_status, study, trial, results))


@app.command()
def stop(
    study: Annotated[str, typer.Argument(metavar="STUDY")],
    trial: Annotated[int | None, typer.Argument(metavar="TRIAL")] = None,
    address: OnHead = None,
    results: Results = "results",
):
    """Cancel a trial of a running study, or all of them and end the study."""
    console = Console()
    from deit_ray.cluster import calling
    from deit_ray.status import stop

    with calling(address, console.warn) as call:
        console.say(call(stop, study, trial, results))


@app.command()
def best(
    study: Annotated[str, typer.Argument(metavar="STUDY")],
    verify: Annotated[bool, typer.Option("--verify", help="evaluate the weights anew and compare; exit status 1 if they differ")] = False,
    address: Address = None,
    results: Results = "results",
    verbose: Verbose = False,
):
    """Write the best configuration of a study as an experiment file, and its weights."""
    from deit_ray.study import Study

    found = Study.open(study, results)
    trial = found.best()
    config, model = found.save_best()
    Console().say(f"{found.name}: trial {trial.number}, {found.experiment.search.metric} {trial.value:.4f}\n"
                  f"  {os.path.relpath(config)}\n  {os.path.relpath(model)}")  # fmt: skip
    if verify:
        from deit_ray.predict import verify_best

        console = Console()
        verified = verify_best(found, address, console, verbose)
        console.say(
            f"evaluated anew on {verified.device}: {verified.metric} {verified.evaluated:.6f}, "
            f"recorded {verified.recorded:.6f}, difference {verified.difference:g}",
            "bold green" if verified.holds else "bold red",
        )
        raise typer.Exit(0 if verified.holds else 1)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="a study, run or trial (STUDY/7), or an experiment file")],
    b: Annotated[str, typer.Argument(metavar="B")],
    results: Results = "results",
):
    """Say why two runs differ: settings, code, packages, data and machine."""
    from deit_ray.compare import compare, show_difference

    Console().out.print(show_difference(compare(a, b, results)))


@app.command()
def reproduce(
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="a trial (STUDY/7) or run")],
    address: Address = None,
    results: Results = "results",
    verbose: Verbose = False,
):
    """Train a trial again and compare every metric; the exit status is 0 if all are equal."""
    from deit_ray.compare import reproduce, show_reproduction

    console = Console()
    found = reproduce(trial, results, address, console, verbose)
    console.out.print(show_reproduction(found))
    raise typer.Exit(0 if found.same else 1)


@app.command()
def sync(study: Annotated[str, typer.Argument(metavar="STUDY")], results: Results = "results"):
    """Deliver to MLflow what it does not have of a study, or of a run made by train."""
    from deit_ray.sync import sync

    console = Console()
    runs = sync(study, results, console)
    console.say(f"{study}: MLflow has all {runs} run{'s' * (runs != 1)}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a model.safetensors, or the name of a run or study")],
    data: Annotated[str, typer.Option(help="a prepared data set")],
    split: Annotated[str, typer.Option(help="test or val")] = "test",
    address: Address = None,
    results: Results = "results",
    verbose: Verbose = False,
):
    """Evaluate a model on every image of a data set."""
    from deit_ray.predict import evaluate

    console = Console()
    metrics = evaluate(model, data, split, address, results, console, verbose)
    console.say(_metrics(metrics))


@app.command()
def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a model.safetensors, or the name of a run or study")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...")],
    results: Results = "results",
):
    """Say what a model sees in images."""
    from deit_ray.predict import predict

    console = Console()
    for prediction in predict(model, images, results):
        classes = ", ".join(f"{name} {p:.1%}" for name, p in prediction.classes)
        console.say(f"{prediction.image}: {classes}")


@app.command()
def ui(results: Results = "results", port: int = 5000):
    """Open MLflow's UI on this machine's loopback address."""
    from deit_ray import storage

    uri = f"sqlite:///{storage.absolute(results)}/mlflow.db"
    if not os.path.exists(uri.removeprefix("sqlite:///")):
        raise UserError(f"{results}: no MLflow database there yet; train or tune something first, or name --results")
    os.environ |= {"MLFLOW_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    Console().say(f"MLflow at http://127.0.0.1:{port} in a few seconds (Ctrl-C ends it)")
    options = {"--backend-store-uri": uri, "--host": "127.0.0.1", "--port": str(port), "--workers": "1"}
    options["--uvicorn-opts"] = "--log-level warning"
    command = [sys.executable, "-m", "mlflow", "server", *(word for option in options.items() for word in option)]
    os.execv(sys.executable, command)


def main() -> None:
    """The entry point: one clear message for what the user can mend, the traceback behind --verbose."""
    verbose = "--verbose" in sys.argv or "-v" in sys.argv
    console = Console()
    try:
        sys.exit(app(standalone_mode=False))  # 130 where Ctrl-C came before there was anything to keep
    except Interrupted as error:
        console.err.print(f"\n{error}", style="yellow", markup=False)
        sys.exit(130)
    except UserError as error:
        if verbose:
            raise
        console.err.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)
    except Exception as error:
        if verbose:
            raise
        message = error.format_message() if hasattr(error, "format_message") else f"{type(error).__name__}: {error}"
        console.err.print(f"error: {message}\n(--verbose shows where)", style="red", markup=False)
        sys.exit(getattr(error, "exit_code", 1))


def _load(path: str, overrides: list[str]):
    from deit_ray.load import load_experiment

    return load_experiment(path, _overrides(overrides))


def _overrides(texts: list[str]) -> dict:
    from deit_ray.load import parse_override

    return dict(parse_override(text) for text in texts)


def _part(option: str, text: str) -> float:
    """0.001 of 0.1% or 0.001."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f"{option} {text}: must be a part of the images, such as 0.1% or 0.001")
    return value


def _metrics(metrics: dict[str, float]) -> str:
    shown = {name: value for name, value in metrics.items() if name.partition("/")[0] in ("val", "test")}
    return "  ".join(f"{name} {value:.4f}" if not name.endswith("/images") else f"{name} {value:.0f}" for name, value in shown.items())


if __name__ == "__main__":
    main()
