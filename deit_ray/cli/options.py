"""Arguments and options that several commands share, and how their values are read."""

from typing import Annotated

import typer

from deit_ray.errors import UserError
from deit_ray.terminal.console import Console

Experiment = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="an experiment file")]
Set = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="replace a value of the experiment file")
]
Study = Annotated[str, typer.Argument(metavar="STUDY", help="name of a study")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="a model.safetensors, the name of a run or study, or models:/STUDY@best of MLflow",
    ),
]
Uri = Annotated[str, typer.Argument(metavar="URI", help="a prepared data set")]
Address = Annotated[
    str | None,
    typer.Option(help="address of a Ray cluster; by default RAY_ADDRESS, else a local Ray is started"),
]
OnHead = Annotated[
    str | None,
    typer.Option(
        help="address of the Ray cluster whose head has the results; by default this machine has them"
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="do it on the cluster of this cluster.yaml, from here; see docs/cluster.md"
    ),
]
Results = Annotated[str, typer.Option(help="folder of the results")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="show Ray's output and tracebacks")]


def load(path: str, overrides: list[str]):
    """The experiment of a file, with the values of --set."""
    from deit_ray.experiment.load import load_experiment

    return load_experiment(path, overrides_of(overrides))


def overrides_of(texts: list[str]) -> dict:
    """The values of --set by dotted key."""
    from deit_ray.experiment.load import parse_overrides

    return parse_overrides(texts)


def check_overrides(texts: list[str]) -> None:
    """Refuses values of --set that the default experiment does not allow.

    Raises:
        UserError: naming key, value and what is allowed.
    """
    from deit_ray.experiment.load import default_experiment

    default_experiment(overrides_of(texts))


def read_cluster(path: str, address: str | None):
    """The description of the cluster that --cluster names.

    Raises:
        UserError: it cannot be used, or --address names a cluster too.
    """
    from deit_ray.cluster.description import read_description

    if address is not None:
        raise UserError(
            f"--cluster {path} and --address {address} exclude each other: --cluster is for a machine "
            "outside the cluster, --address for one of its own"
        )
    return read_description(path)


def run_on_cluster(path: str, address: str | None, results: str, *words: str | int | None) -> None:
    """Runs a command of deit-ray on the head of a cluster, and ends with its exit status.

    Args:
        words: the command and its arguments, without --results; None is left out.
    """
    description = read_cluster(path, address)
    Console().begin(f"asking the head of {description.name}")
    from deit_ray.commands.remote import run_on_head

    given = [str(word) for word in words if word is not None]
    raise typer.Exit(run_on_head(description, given, results))


def check_run(name: str, results: str) -> None:
    """Refuses a name of a run, study or trial that does not exist, before anything large is imported."""
    from deit_ray.results.folders import find_run

    find_run(name, results)


def trial_in(name: str) -> tuple[str, int | None]:
    """The study and the number of a trial's name such as STUDY/7; (name, None) for a study's name."""
    study, _, last = name.rstrip("/").rpartition("/")
    number = last.removeprefix("trial-")
    return (study, int(number)) if study and number.isdecimal() else (name, None)


def fraction_of(option: str, text: str) -> float:
    """The fraction that a text states: 0.001 for "0.1%" and for "0.001".

    Raises:
        UserError: the text is not a fraction from 0 to 1.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f"{option} {text}: must be a fraction of the images, such as 0.1% or 0.001")
    return value
