"""The command `doctor`, and its table."""

from collections.abc import Iterable
from typing import Annotated

import typer
from rich.text import Text

from deit_ray.cli.options import Address, Set, Verbose, load, overrides_of
from deit_ray.cluster.machine import Check
from deit_ray.errors import UserError
from deit_ray.terminal.console import Console
from deit_ray.terminal.format import counted
from deit_ray.terminal.session import Session
from deit_ray.terminal.table import FittedTable

app = typer.Typer()


@app.command()
def doctor(
    cluster: Annotated[
        str | None,
        typer.Argument(metavar="CLUSTER.YAML", help="check this file for ray up, instead of this machine"),
    ] = None,
    experiment: Annotated[
        str | None,
        typer.Option(metavar="EXPERIMENT", help="check the data, results and MLflow that this file names"),
    ] = None,
    set: Set = [],  # noqa: B006
    address: Address = None,
    verbose: Verbose = False,
):
    """Check this machine, its Ray, data and MLflow, or a cluster.yaml; exit status 1 if anything is wrong."""
    console = Console()
    if cluster is not None:
        if experiment or set or address:
            raise UserError(f"doctor: {cluster} is checked alone; leave out the options, or the file")
        console.begin(f"checking {cluster}")
        from deit_ray.cluster.cluster_file import check_file

        found = check_file(cluster)
    else:
        from deit_ray.experiment.load import default_experiment

        wanted = load(experiment, set) if experiment else default_experiment(overrides_of(set))
        console.begin("checking this machine; Ray takes some seconds")
        from deit_ray.commands.doctor import doctor

        found = list(doctor(wanted, Session(address, console=console, verbose=verbose)))
    console.out.print(show_checks(found))
    wrong = sum(check.remedy is not None for check in found)
    if wrong:
        console.say(f"{counted(wrong, 'thing')} to fix", "bold red")
        raise typer.Exit(1)
    console.say("nothing is wrong", "bold green")


def show_checks(found: Iterable[Check]) -> FittedTable:
    """Checks as a table; what is wrong has its remedy beside it."""
    table = FittedTable("check", "", "found", wraps="found", keep=3)
    for check in found:
        if check.remedy is None:
            table.add_row(check.subject, Text("ok", "green"), check.found)
        else:
            table.add_row(check.subject, Text("wrong", "bold red"), f"{check.found}; {check.remedy}")
    return table
