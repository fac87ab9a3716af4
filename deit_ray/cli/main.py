"""The command line: it parses, calls the package, and prints.

Each command imports its own modules, so that `--help` and mistakes are answered before torch and Ray are
imported.
"""

import os
import shlex
from typing import Annotated, Literal

import typer
from rich.console import Group

import deit_ray
from deit_ray.cli import data, doctor, finished
from deit_ray.cli.answers import run
from deit_ray.cli.options import (
    Address,
    Cluster,
    Experiment,
    OnHead,
    Results,
    Set,
    Study,
    Verbose,
    check_run,
    load,
    overrides_of,
    read_cluster,
    run_on_cluster,
    trial_in,
)
from deit_ray.errors import UserError
from deit_ray.terminal.console import Console
from deit_ray.terminal.session import Session

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=deit_ray.__doc__,
)
app.add_typer(data.app, name="data")
bench_app = typer.Typer(no_args_is_help=True, help="Measure what limits a run.")
app.add_typer(bench_app, name="bench")
TrialNumber = Annotated[int | None, typer.Argument(metavar="TRIAL", help="number of a trial of the study")]


def _print_version(wanted: bool) -> None:
    if wanted:
        Console().say(f"deit-ray {deit_ray.__version__}")
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
    seconds: Annotated[float, typer.Option(min=0.1, help="approximate seconds of each measurement")] = 10.0,
    address: Address = None,
    verbose: Verbose = False,
):
    """Measure whether the stream or the step limits a run, and how many CPUs the stream needs."""
    loaded = load(experiment, set)
    session = Session(address, console=Console(), verbose=verbose)
    session.console.begin(f"{loaded.name}: reading {loaded.data.uri}")
    from deit_ray.commands.bench_data import bench_data

    session.console.say(f"{loaded.name}: {bench_data(loaded, seconds, session).sentence()}")


@bench_app.command("model")
def bench_model(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME...", help="timm models, model.safetensors files, runs, or studies"),
    ],
    image_size: Annotated[
        int | None,
        typer.Option(min=8, max=1024, help="pixels of a side; by default those of a model's training"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="images at once; by default 256 on a GPU, 16 on a CPU")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="approximate seconds of each model")] = 5.0,
    plot: Annotated[
        str | None,
        typer.Option(help="picture to write, .png: accuracy over images/s, or images/s over the sizes"),
    ] = None,
    results: Results = "results",
):
    """Measure images/s of inference on this machine against parameters, multiply-adds and accuracy."""
    console = Console()
    console.begin(f"measuring {', '.join(names)}")
    from deit_ray.cli.views import show_models
    from deit_ray.commands.bench_model import bench_model

    console.out.print(show_models(bench_model(names, image_size, batch_size, seconds, results, plot)))
    if plot:
        console.say(f"{plot}: the same as a picture")


@app.command()
def train(
    experiment: Annotated[str | None, typer.Argument(metavar="EXPERIMENT", help="an experiment file")] = None,
    set: Set = [],  # noqa: B006
    continued: Annotated[
        str | None,
        typer.Option("--continue", metavar="RUN", help="continue a run, or a trial: STUDY/7"),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="with --continue: total number of epochs to extend a finished run to"),
    ] = None,
    schedule: Annotated[
        Literal["stretch", "hold"] | None,
        typer.Option(
            help="with --epochs: the learning rate follows the cosine over all epochs "
            "(stretch, the default), or stays at its minimum (hold)"
        ),
    ] = None,
    address: Address = None,
    results: Annotated[str, typer.Option(help="with --continue: folder of the results")] = "results",
    verbose: Verbose = False,
):
    """Train one model, or continue a run."""
    if (experiment is None) == (continued is None):
        raise UserError("train: name either an experiment file or --continue RUN")
    if continued and set:
        raise UserError("train: --set cannot change an existing run; --epochs and --schedule can extend it")
    if schedule and epochs is None:
        raise UserError(
            f"train: --schedule {schedule} belongs to --continue RUN --epochs N, which extend a run; "
            "name both"
        )
    if experiment and epochs is not None:
        raise UserError("train: --epochs belongs to --continue; for a new run use --set train.epochs=N")
    session = Session(address, results, Console(), verbose)
    if experiment:
        loaded = load(experiment, set)
        session.console.begin(f"{loaded.name}: checking the experiment and its data")
        from deit_ray.trial.run import train

        run = train(loaded, session)
    else:
        check_run(continued, results)  # a wrong name is answered before torch is imported
        session.console.begin(f"{continued}: reading its results")
        from deit_ray.commands.continuing import continue_run

        run = continue_run(continued, epochs, schedule or "stretch", session)
    session.console.say(
        f"{run.name}: finished; {finished.metrics_line(run.metrics)}\n  {run.folder}/model.safetensors",
        "bold yellow" if run.remark else "bold green",
    )
    if run.remark:
        session.console.warn(run.remark)


@app.command()
def plan(experiment: Experiment, set: Set = [], address: Address = None):  # noqa: B006
    """Estimate the trials, time, bytes and money of a study or run; nothing is started."""
    loaded = load(experiment, set)
    session = Session(address, console=Console())
    session.console.begin(f"{loaded.name}: checking the experiment and its data")
    from deit_ray.cli.views import show_plan
    from deit_ray.commands.plan import plan

    session.console.out.print(show_plan(plan(loaded, session)))


@app.command()
def tune(
    experiment: Annotated[str | None, typer.Argument(metavar="EXPERIMENT", help="an experiment file")] = None,
    set: Set = [],  # noqa: B006
    resume: Annotated[str | None, typer.Option(metavar="STUDY", help="resume a study")] = None,
    trials: Annotated[str | None, typer.Option(metavar="+N", help="with --resume: add N trials")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="with --resume: show what would be done, and do nothing")
    ] = False,
    address: Address = None,
    cluster: Cluster = None,
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
        raise UserError(f"tune: --trials {trials}: must be +N, a number of trials to add, such as +20")
    session = Session(address, results or "results", Console(), verbose)
    more, overrides = int(trials or 0), overrides_of(set)
    loaded = load(experiment, set) if experiment else None
    if cluster:
        if loaded:
            return _tune_on_cluster(loaded, read_cluster(cluster, address), session)
        options = [*(["--trials", trials] if trials else []), *(w for text in set for w in ("--set", text))]
        if dry_run:
            words = ["tune", "--resume", resume, *options, "--dry-run"]
            run_on_cluster(cluster, address, session.results, *words)
        return _resume_on_cluster(resume, options, read_cluster(cluster, address), session)
    if loaded:
        session.console.begin(f"{loaded.name}: checking the experiment and its data")
    else:
        check_run(resume, session.results)  # a wrong name is answered before torch is imported
        session.console.begin(f"{resume}: reading its results")
    from deit_ray.cli.views import show_result, show_resume

    if loaded:
        from deit_ray.study.search import tune

        view = show_result(tune(loaded, session))
    elif dry_run:
        from deit_ray.study.search import plan_resume

        view = show_resume(plan_resume(resume, overrides, more, session))
    else:
        from deit_ray.study.search import resume_study

        view = show_result(resume_study(resume, overrides, more, session))
    session.console.out.print(view)


def _tune_on_cluster(experiment, description, session: Session) -> None:
    session.console.begin(f"{experiment.name}: asking for the head of {description.name}")
    from deit_ray.commands.remote import tune_on_cluster

    tune_on_cluster(experiment, description, session.console, session.verbose)


def _resume_on_cluster(study: str, options: list[str], description, session: Session) -> None:
    session.console.begin(f"{study}: asking for the head of {description.name}")
    from deit_ray.commands.remote import resume_on_cluster

    options += ["--verbose"] if session.verbose else []
    resume_on_cluster(study, options, session.results, description, session.console)


@app.command()
def status(
    study: Annotated[
        str | None, typer.Argument(metavar="STUDY", help="a study, a run, or a trial: STUDY/7")
    ] = None,
    trial: TrialNumber = None,
    address: OnHead = None,
    cluster: Cluster = None,
    results: Results = "results",
):
    """Show all studies and runs, a study's leaderboard, or the state of a run or trial and its reason."""
    if cluster:
        run_on_cluster(cluster, address, results, "status", study, trial)
    console = Console()
    if address is None and study is not None:
        check_run(study, results)
    if study is not None and trial is None:
        study, trial = trial_in(study)
    console.begin(f"reading {results if address is None else address}")
    from deit_ray.cli.views import show_runs, show_studies, show_study, show_trial
    from deit_ray.cluster.connect import calling
    from deit_ray.study.status import list_runs, list_status, run_status, study_status, trial_status

    with calling(address, console.warn) as call:
        if study is None:
            studies, runs = call(list_status, results), call(list_runs, results)
            view = Group(show_studies(studies), show_runs(runs))
        elif trial is None:
            run = call(run_status, study, results)
            view = show_study(call(study_status, study, results)) if run is None else show_runs([run])
        else:
            view = show_trial(call(trial_status, study, trial, results))
    console.out.print(view)


@app.command()
def stop(
    study: Study,
    trial: TrialNumber = None,
    address: OnHead = None,
    cluster: Cluster = None,
    results: Results = "results",
):
    """Cancel a trial of a running study, or cancel all its trials and end it."""
    if cluster:
        run_on_cluster(cluster, address, results, "stop", study, trial)
    console = Console()
    if address is None:
        check_run(study, results)
    console.begin(f"{study}: asking its driver")
    from deit_ray.cluster.connect import calling
    from deit_ray.study.status import stop

    with calling(address, console.warn) as call:
        console.say(call(stop, study, trial, results))


app.add_typer(finished.app)
app.add_typer(doctor.app)


@app.command()
def ui(
    study: Annotated[
        str | None,
        typer.Argument(metavar="[STUDY]", help="name of a study, run or trial; by default all runs"),
    ] = None,
    results: Results = "results",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="port to listen on; by default 5000, or the next free one"),
    ] = None,
    browse: Annotated[bool, typer.Option("--open/--no-open", help="open the page in a browser")] = True,
    optuna: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="copy the studies into a new SQLite file for Optuna's own tools instead; no UI is opened",
        ),
    ] = None,
    cluster: Cluster = None,
):
    """Open the runs of a study in MLflow, best first; a server is started if none has them."""
    console = Console()
    if cluster:
        return _open_pages(cluster, study, port, browse, optuna, results, console)
    from deit_ray.commands.ui import copy_studies, find_place, open_ui

    if optuna is None:
        return open_ui(find_place(study, results), port, browse, console)
    if study is not None:
        raise UserError("ui: --optuna copies all studies; leave out the name of a study")
    console.begin(f"copying the studies of {results}")
    names = copy_studies(results, optuna)
    file = shlex.quote(f"sqlite:///{os.path.abspath(optuna)}")
    console.say(f"{', '.join(names)}: copied; look at them with: optuna-dashboard {file}")


def _open_pages(
    cluster: str,
    study: str | None,
    port: int | None,
    browse: bool,
    optuna: str | None,
    results: str,
    console: Console,
) -> None:
    if optuna or results != "results":
        raise UserError(
            "ui: --cluster shows the pages of the cluster's head; leave out --optuna and --results"
        )
    description = read_cluster(cluster, None)
    console.begin(f"asking for the head of {description.name}")
    from deit_ray.commands.remote import open_pages

    open_pages(description, study, port, browse, console)


def main() -> None:
    """The entry point of the command line; see `answers.run`."""
    run(typer.main.get_command(app))


if __name__ == "__main__":
    main()
