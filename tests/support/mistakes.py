"""Every command of the command line, and mistakes that a person makes with it."""

import typer

from deit_ray.cli.main import app

# arguments that a command needs before its options are looked at; nothing of them exists
NEEDED = {
    "data prepare": ["SOURCE", "--out", "OUT"],
    "data check": ["URI"],
    "data show": ["URI"],
    "stop": ["STUDY"],
    "best": ["STUDY"],
    "diff": ["A", "B"],
    "reproduce": ["TRIAL"],
    "sync": ["STUDY"],
    "evaluate": ["MODEL", "--data", "URI"],
    "predict": ["MODEL", "IMAGE"],
}
TAKE_AN_EXPERIMENT = ("train", "plan", "tune", "bench data", "data show")
IN_THE_FILE = {  # of a value: a key, a type and a bound
    "optim.lrr=1": "optim.lrr: no such key; did you mean optim.lr?",
    "optim.lr=fast": "optim.lr: 'fast' is not allowed: input should be a valid number",
    "augment.strength=3": "augment.strength: 3 is not allowed: input should be less than or equal to 2",
}
BAD_OPTIONS = {  # types and bounds of options, and options that do not go together
    "data prepare": [["--quality", "high"], ["--quality", "101"], ["--max-bad", "5"]],
    "data show": [["--samples", "many"], ["--samples", "65"]],
    "bench data": [["--seconds", "long"], ["--seconds", "0"]],
    "train": [["--epochs", "many"], ["--schedule", "rise"], ["--epochs", "3"]],
    "tune": [["--trials", "20", "--resume", "STUDY"], ["--trials", "+2"]],
    "status": [["STUDY", "first"]],
    "stop": [["first"]],
    "ui": [["--port", "http"]],
}


def all_commands(group=None, prefix: str = "") -> list[str]:
    """The names of all commands, such as `tune` and `data prepare`."""
    group = group or typer.main.get_command(app)
    names = []
    for name, command in group.commands.items():
        full = f"{prefix}{name}"
        names += all_commands(command, f"{full} ") if hasattr(command, "commands") else [full]
    return names


def mistakes_of(command: str, experiment: str) -> list[list[str]]:
    """Command lines with one mistake each, found before anything is looked up: an unknown option, a type, a
    bound, a key.

    Args:
        experiment: path of an experiment file without a mistake.
    """
    words = command.split()
    needed = NEEDED.get(command, [experiment] if command in TAKE_AN_EXPERIMENT else [])
    lines = [[*words, *needed, "--no-such-option"]]
    lines += [[*words, *_without(needed, bad), *bad] for bad in BAD_OPTIONS.get(command, [])]
    if command in TAKE_AN_EXPERIMENT:
        files = [] if command != "data show" else ["--experiment", experiment]
        lines += [[*words, *needed, *files, "--set", value] for value in IN_THE_FILE]
    return lines


def _without(needed: list[str], bad: list[str]) -> list[str]:
    """What a command needs; with --resume no experiment file."""
    return [] if "--resume" in bad else needed
