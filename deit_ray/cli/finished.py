"""The commands for finished studies, runs and models: best, report, export, diff, rm and others."""

import sys
from typing import Annotated, Literal

import typer

from deit_ray.accuracy import show_accuracy
from deit_ray.cli.options import Address, Cluster, Model, Results, Study, Verbose, check_run, read_cluster
from deit_ray.errors import UserError
from deit_ray.terminal.console import Console
from deit_ray.terminal.format import counted, size
from deit_ray.terminal.session import Session

app = typer.Typer()


@app.command()
def best(
    study: Study,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="evaluate the weights again; the exit status is 1 if the value differs"
        ),
    ] = False,
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="copy both files to FOLDER/STUDY too")
    ] = None,
    address: Address = None,
    cluster: Cluster = None,
    results: Results = "results",
    verbose: Verbose = False,
):
    """Write the best configuration of a study as an experiment file, and its weights."""
    if cluster:
        if out:
            raise UserError("best: --cluster brings the files to results/STUDY; leave out --out")
        options = ["--verify", "--address", "auto"] if verify else []
        return _bring_best(study, options, read_cluster(cluster, address), results)
    session = Session(address, results, Console(), verbose)
    _begin(session.console, study, results)
    from deit_ray.cli.views import describe_unfinished
    from deit_ray.study.status import study_status
    from deit_ray.study.study import Study

    found = Study.open(study, results)
    trial = found.best()
    config, model = found.save_best(session.console.warn)
    value = show_accuracy(trial.value, trial.images, trial.choices)
    session.console.say(
        f"{found.name}: trial {trial.number}, {found.experiment.search.metric} {value}\n  {config}\n  {model}"
    )
    if out is not None:
        from deit_ray.commands.remote import copy_files

        session.console.say("\n".join(f"  {copy}" for copy in copy_files((config, model), found.name, out)))
    if unfinished := describe_unfinished(study_status(found.name, results)):
        session.console.warn(unfinished)
    if verify:
        from deit_ray.commands.predict import verify_best

        verified = verify_best(found, session)
        session.console.say(
            f"evaluated again on {verified.device}: {verified.metric} {verified.evaluated:.6f}, "
            f"recorded {verified.recorded:.6f}, difference {verified.difference:g}",
            "bold green" if verified.holds else "bold red",
        )
        raise typer.Exit(0 if verified.holds else 1)


def _bring_best(study: str, options: list[str], description, results: str) -> None:
    console = Console()
    console.begin(f"{study}: asking the head of {description.name}")
    from deit_ray.commands.remote import best_on_cluster

    raise typer.Exit(best_on_cluster(study, options, results, description, console))


@app.command()
def report(
    study: Study,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="HTML file to write; by default STUDY.html")
    ] = None,
    results: Results = "results",
):
    """Write what a study has found as one HTML page: tables, figures and pictures, without a network."""
    console = Console()
    _begin(console, study, results)
    from deit_ray.commands.report import report

    console.say(f"{report(study, out, Session(results=results, console=console))}: open it in a browser")


@app.command()
def export(
    study: Study,
    format: Annotated[Literal["csv", "parquet"], typer.Option(help="csv or parquet")] = "csv",
    out: Annotated[str, typer.Option(metavar="FOLDER", help="where the files go")] = ".",
    results: Results = "results",
):
    """Write a study's trials and curves as two tables: STUDY-trials and STUDY-curves (docs/results.md)."""
    console = Console()
    _begin(console, study, results)
    from deit_ray.commands.export import export

    session = Session(results=results, console=console)
    for table in export(study, format, out, session):
        console.say(f"{table.uri}: {counted(table.rows, 'row')}")


@app.command()
def diff(
    a: Annotated[
        str, typer.Argument(metavar="A", help="a study, run or trial (STUDY/7), or an experiment file")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="another study, run, trial or experiment file")],
    results: Results = "results",
):
    """Show how two runs differ: in settings, code, packages, data and machine."""
    console = Console()
    console.begin(f"comparing {a} and {b}")
    from deit_ray.cli.views import show_difference
    from deit_ray.commands.diff import compare

    console.out.print(show_difference(compare(a, b, results)))


@app.command()
def reproduce(
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="a trial (STUDY/7) or run")],
    address: Address = None,
    results: Results = "results",
    verbose: Verbose = False,
):
    """Train a trial again and compare every metric; the exit status is 0 if all are equal."""
    session = Session(address, results, Console(), verbose)
    _begin(session.console, trial, results)
    from deit_ray.cli.views import show_reproduction
    from deit_ray.commands.reproduce import reproduce

    reproduced = reproduce(trial, session)
    session.console.out.print(show_reproduction(reproduced))
    raise typer.Exit(0 if reproduced.same else 1)


@app.command()
def sync(study: Study, results: Results = "results"):
    """Deliver to MLflow what is missing there of a study, or of a run made by train."""
    console = Console()
    _begin(console, study, results)
    from deit_ray.study.sync import sync

    sync(study, results, console)


@app.command()
def rm(
    name: Annotated[str, typer.Argument(metavar="STUDY|RUN", help="whole name of a study or run")],
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    keep_runs: Annotated[bool, typer.Option("--keep-runs", help="leave its runs in MLflow")] = False,
    results: Results = "results",
):
    """Delete a study or run, with its runs in MLflow; files that deit-ray did not write stay."""
    console = Console()
    if not (yes or sys.stdin.isatty()):
        raise UserError("rm: standard input is no terminal, so nobody can be asked; to delete at once: --yes")
    console.begin(f"{name}: reading its results")
    from deit_ray.commands.remove import find_removal, remove

    found = find_removal(name, results, keep_runs)
    for sentence in found.sentences():
        console.say(sentence)
    if not yes and not console.confirms("delete this?"):
        console.say("nothing was deleted")
        raise typer.Exit(1)
    remove(found)
    console.say(f"{found.name}: deleted, {size(found.bytes)}")
    if found.tracked and found.tracked.ids:
        console.say(f"  MLflow keeps its runs and their artifacts in the trash until: {found.tracked.purge}")


@app.command()
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="a prepared data set")],
    split: Annotated[str, typer.Option(help="test or val")] = "test",
    address: Address = None,
    results: Results = "results",
    verbose: Verbose = False,
):
    """Evaluate a model on every image of a data set: metrics, accuracy by class, and its worst mistakes."""
    session = Session(address, results, Console(), verbose)
    session.console.begin(f"{model}: reading its weights")
    from deit_ray.cli.views import show_evaluation
    from deit_ray.commands.mistakes import save_answers
    from deit_ray.commands.predict import evaluate

    found = evaluate(model, data, split, session)
    session.console.say(metrics_line(found))
    try:
        files, reason = save_answers(found), None
    except UserError as error:  # looking at a model needs no place to write
        files, reason = [], str(error)
    session.console.out.print(show_evaluation(found, files))
    if reason:
        session.console.warn(reason)


@app.command()
def predict(
    model: Model,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="image files, or folders of them")],
    results: Results = "results",
):
    """Print the most likely classes of images; the exit status is 1 if one cannot be read."""
    session = Session(results=results, console=Console())
    session.console.begin(f"{model}: reading its weights")
    from deit_ray.commands.predict import predict

    predictions = predict(model, images, session=session)
    for prediction in predictions:
        if prediction.problem:
            session.console.err.print(f"{prediction.image}: {prediction.problem}", style="red", markup=False)
            continue
        classes = ", ".join(f"{name} {p:.1%}" for name, p in prediction.classes)
        session.console.say(f"{prediction.image}: {classes}")
    raise typer.Exit(1 if any(prediction.problem for prediction in predictions) else 0)


def _begin(console: Console, name: str, results: str) -> None:
    """Answers a wrong name of a run or study before anything large is imported; then says that work
    begins."""
    check_run(name, results)
    console.begin(f"{name}: reading its results")


def metrics_line(metrics: dict[str, float]) -> str:
    """The metrics of the splits val and test in one line."""
    return "  ".join(
        f"{name} {value:.0f}" if name.endswith("/images") else f"{name} {value:.4f}"
        for name, value in metrics.items()
        if name.partition("/")[0] in ("val", "test")
    )
