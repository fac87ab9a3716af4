"""The command line: it parses, calls the package, and prints."""

import os
import sys
from typing import Annotated, Literal

import typer

from deit_ray import __version__
from deit_ray.cli import data
from deit_ray.cli.options import Address, Experiment, OnHead, Results, Set, Verbose, load, overrides_of
from deit_ray.errors import Interrupted, UserError
from deit_ray.terminal.console import Console
from deit_ray.terminal.session import Session

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="Search for the best way to train a distilled vision transformer, on a laptop or a Ray cluster.")  # fmt: skip
app.add_typer(data.app, name="data")
bench_app = typer.Typer(no_args_is_help=True, help="What limits a run.")
app.add_typer(bench_app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        Console().say(f"deit-ray {__version__}")
        raise typer.Exit()


@app.callback()
def options_of_all(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="show the version and exit"),
    ] = False,
):
    pass


@bench_app.command("data")
def bench_data(
    experiment: Experiment,
    set: Set = [],  # noqa: B006
    seconds: Annotated[float, typer.Option(min=0.1, help="for each of its three measurements, about")] = 10.0,
    address: Address = None,
    verbose: Verbose = False,
):
    """Say whether the stream or the step limits a run, and how many CPUs would feed it; nothing is kept."""
    loaded = load(experiment, set)
    from deit_ray.commands.bench_data import bench_data

    session = Session(address, console=Console(), verbose=verbose)
    session.console.say(f"{loaded.name}: {bench_data(loaded, seconds, session).sentence()}")


@app.command()
def train(
    experiment: Annotated[str | None, typer.Argument(metavar="EXPERIMENT", help="an experiment file")] = None,
    set: Set = [],  # noqa: B006
    go_on: Annotated[
        str | None,
        typer.Option("--continue", metavar="RUN", help="go on with a run, or with a trial: STUDY/7"),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="with --continue: train what has finished on, to so many epochs")
    ] = None,
    schedule: Annotated[
        Literal["stretch", "hold"] | None,
        typer.Option(
            help="of the learning rate with --epochs: the cosine of all N epochs (default), or it stays at its minimum"
        ),
    ] = None,
    address: Address = None,
    results: Annotated[str, typer.Option(help="with --continue: folder of the results")] = "results",
    verbose: Verbose = False,
):
    """Train one model, or go on with one."""
    if (experiment is None) == (go_on is None):
        raise UserError("train: name either an experiment file or --continue RUN")
    if go_on and set:
        raise UserError(
            "train: --set cannot change a run that exists; --epochs and --schedule can prolong it"
        )
    if schedule and epochs is None:
        raise UserError(
            f"train: --schedule {schedule} says how to go on with --continue RUN --epochs N; name both"
        )
    if experiment and epochs is not None:
        raise UserError("train: --epochs belongs to --continue; for a new run use --set train.epochs=N")
    session = Session(address, results, Console(), verbose)
    if go_on:
        from deit_ray.commands.continuing import continue_run

        run = continue_run(go_on, epochs, schedule or "stretch", session)
    else:
        loaded = load(experiment, set)
        from deit_ray.trial.run import train

        run = train(loaded, session)
    session.console.say(
        f"{run.name}: finished; {_metrics(run.metrics)}\n  {os.path.relpath(run.folder)}/model.safetensors",
        "bold green",
    )


@app.command()
def plan(experiment: Experiment, set: Set = [], address: Address = None):  # noqa: B006
    """Say what a study or run would take; nothing is started."""
    loaded = load(experiment, set)
    from deit_ray.cli.views import show_plan
    from deit_ray.commands.plan import plan

    session = Session(address, console=Console())
    session.console.out.print(show_plan(plan(loaded, session)))


@app.command()
def tune(
    experiment: Annotated[str | None, typer.Argument(metavar="EXPERIMENT")] = None,
    set: Set = [],  # noqa: B006
    resume: Annotated[str | None, typer.Option(metavar="STUDY", help="go on with a study")] = None,
    trials: Annotated[
        str | None, typer.Option(metavar="+N", help="with --resume: so many trials more")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="with --resume: only say what would be done")
    ] = False,
    address: Address = None,
    results: Annotated[str | None, typer.Option(help="with --resume: folder of the results")] = None,
    verbose: Verbose = False,
):
    """Run a study: search for the best configuration."""
    if (experiment is None) == (resume is None):
        raise UserError("tune: name either an experiment file or --resume STUDY")
    if (trials or dry_run) and not resume:
        raise UserError(
            "tune: --trials and --dry-run go with --resume STUDY; for a new study: --set search.trials=N"
        )
    if results and not resume:
        raise UserError(
            f"tune: --results goes with --resume STUDY; for a new study: --set results.uri={results}"
        )
    if trials and not (trials.startswith("+") and trials[1:].isdigit()):
        raise UserError(f"tune: --trials {trials}: must be +N, so many trials more, such as +20")
    session = Session(address, results or "results", Console(), verbose)
    more, overrides = int(trials or 0), overrides_of(set)
    from deit_ray.cli.views import show_result, show_resume

    if experiment:
        loaded = load(experiment, set)
        from deit_ray.study.search import tune

        view = show_result(tune(loaded, session))
    elif dry_run:
        from deit_ray.study.search import plan_resume

        view = show_resume(plan_resume(resume, overrides, more, session))
    else:
        from deit_ray.study.search import resume_study

        view = show_result(resume_study(resume, overrides, more, session))
    session.console.out.print(view)


@app.command()
def status(
    study: Annotated[str | None, typer.Argument(metavar="STUDY")] = None,
    trial: Annotated[int | None, typer.Argument(metavar="TRIAL")] = None,
    address: OnHead = None,
    results: Results = "results",
):
    """Show all studies, the leaderboard of one, or how one of its trials stands and why."""
    console = Console()
    from deit_ray.cli.views import show_studies, show_study, show_trial
    from deit_ray.cluster.connect import calling
    from deit_ray.study.status import list_status, study_status, trial_status

    with calling(address, console.warn) as call:
        if study is None:
            view = show_studies(call(list_status, results))
        elif trial is None:
            view = show_study(call(study_status, study, results))
        else:
            view = show_trial(call(trial_status, study, trial, results))
    console.out.print(view)


@app.command()
def stop(
    study: Annotated[str, typer.Argument(metavar="STUDY")],
    trial: Annotated[int | None, typer.Argument(metavar="TRIAL")] = None,
    address: OnHead = None,
    results: Results = "results",
):
    """Cancel a trial of a running study, or all of them and end the study."""
    console = Console()
    from deit_ray.cluster.connect import calling
    from deit_ray.study.status import stop

    with calling(address, console.warn) as call:
        console.say(call(stop, study, trial, results))


@app.command()
def best(
    study: Annotated[str, typer.Argument(metavar="STUDY")],
    verify: Annotated[
        bool,
        typer.Option("--verify", help="evaluate the weights anew and compare; exit status 1 if they differ"),
    ] = False,
    address: Address = None,
    results: Results = "results",
    verbose: Verbose = False,
):
    """Write the best configuration of a study as an experiment file, and its weights."""
    from deit_ray.study.study import Study

    found = Study.open(study, results)
    trial = found.best()
    config, model = found.save_best()
    Console().say(f"{found.name}: trial {trial.number}, {found.experiment.search.metric} {trial.value:.4f}\n"
                  f"  {os.path.relpath(config)}\n  {os.path.relpath(model)}")  # fmt: skip
    if verify:
        from deit_ray.commands.predict import verify_best

        session = Session(address, results, Console(), verbose)
        verified = verify_best(found, session)
        session.console.say(
            f"evaluated anew on {verified.device}: {verified.metric} {verified.evaluated:.6f}, "
            f"recorded {verified.recorded:.6f}, difference {verified.difference:g}",
            "bold green" if verified.holds else "bold red",
        )
        raise typer.Exit(0 if verified.holds else 1)


@app.command()
def diff(
    a: Annotated[
        str, typer.Argument(metavar="A", help="a study, run or trial (STUDY/7), or an experiment file")
    ],
    b: Annotated[str, typer.Argument(metavar="B")],
    results: Results = "results",
):
    """Say why two runs differ: settings, code, packages, data and machine."""
    from deit_ray.cli.views import show_difference
    from deit_ray.commands.diff import compare

    Console().out.print(show_difference(compare(a, b, results)))


@app.command()
def reproduce(
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="a trial (STUDY/7) or run")],
    address: Address = None,
    results: Results = "results",
    verbose: Verbose = False,
):
    """Train a trial again and compare every metric; the exit status is 0 if all are equal."""
    from deit_ray.cli.views import show_reproduction
    from deit_ray.commands.reproduce import reproduce

    session = Session(address, results, Console(), verbose)
    found = reproduce(trial, session)
    session.console.out.print(show_reproduction(found))
    raise typer.Exit(0 if found.same else 1)


@app.command()
def sync(study: Annotated[str, typer.Argument(metavar="STUDY")], results: Results = "results"):
    """Deliver to MLflow what it does not have of a study, or of a run made by train."""
    from deit_ray.study.sync import sync

    console = Console()
    runs = sync(study, results, console)
    console.say(f"{study}: MLflow has all {runs} run{'s' * (runs != 1)}")


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="a model.safetensors, or the name of a run or study")
    ],
    data: Annotated[str, typer.Option(help="a prepared data set")],
    split: Annotated[str, typer.Option(help="test or val")] = "test",
    address: Address = None,
    results: Results = "results",
    verbose: Verbose = False,
):
    """Evaluate a model on every image of a data set."""
    from deit_ray.commands.predict import evaluate

    session = Session(address, results, Console(), verbose)
    session.console.say(_metrics(evaluate(model, data, split, session)))


@app.command()
def predict(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="a model.safetensors, or the name of a run or study")
    ],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...")],
    results: Results = "results",
):
    """Say what a model sees in images."""
    from deit_ray.commands.predict import predict

    session = Session(results=results, console=Console())
    for prediction in predict(model, images, session=session):
        classes = ", ".join(f"{name} {p:.1%}" for name, p in prediction.classes)
        session.console.say(f"{prediction.image}: {classes}")


@app.command()
def ui(results: Results = "results", port: int = 5000):
    """Open MLflow's UI on this machine's loopback address."""
    from deit_ray import storage

    uri = f"sqlite:///{storage.absolute(results)}/mlflow.db"
    if not os.path.exists(uri.removeprefix("sqlite:///")):
        raise UserError(
            f"{results}: no MLflow database there yet; train or tune something first, or name --results"
        )
    os.environ |= {"MLFLOW_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    Console().say(f"MLflow at http://127.0.0.1:{port} in a few seconds (Ctrl-C ends it)")
    options = {"--backend-store-uri": uri, "--host": "127.0.0.1", "--port": str(port), "--workers": "1"}
    options["--uvicorn-opts"] = "--log-level warning"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        *(word for option in options.items() for word in option),
    ]
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
        message = (
            error.format_message() if hasattr(error, "format_message") else f"{type(error).__name__}: {error}"
        )
        console.err.print(f"error: {message}\n(--verbose shows where)", style="red", markup=False)
        sys.exit(getattr(error, "exit_code", 1))


def _metrics(metrics: dict[str, float]) -> str:
    shown = {name: value for name, value in metrics.items() if name.partition("/")[0] in ("val", "test")}
    return "  ".join(
        f"{name} {value:.4f}" if not name.endswith("/images") else f"{name} {value:.0f}"
        for name, value in shown.items()
    )


if __name__ == "__main__":
    main()
