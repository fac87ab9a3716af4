"""What several commands take on the command line, and how it is read."""

from typing import Annotated

import typer

Experiment = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="an experiment file")]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="replace a value of the file")]
Address = Annotated[
    str | None, typer.Option(help="of a Ray cluster; by default RAY_ADDRESS, or a Ray of its own")
]
OnHead = Annotated[
    str | None, typer.Option(help="of a Ray cluster, on whose head it looks for the study; by default here")
]
Results = Annotated[str, typer.Option(help="folder of the results")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="show Ray's output and tracebacks")]


def load(path: str, overrides: list[str]):
    """The experiment of a file, with the values of --set."""
    from deit_ray.experiment.load import load_experiment

    return load_experiment(path, overrides_of(overrides))


def overrides_of(texts: list[str]) -> dict:
    """Dotted keys and values of --set."""
    from deit_ray.experiment.load import parse_override

    return dict(parse_override(text) for text in texts)
