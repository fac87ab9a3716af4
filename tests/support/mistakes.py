"""Mistakes that a person makes on the command line, for every command."""

# arguments that a command needs before its options are checked; none of these files and runs exists
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
    "bench model": ["NAME"],
}
TAKE_AN_EXPERIMENT = ("train", "plan", "tune", "bench data", "data show")
IN_THE_FILE = {  # values with a wrong key, a wrong type and an exceeded bound, and their messages
    "optim.lrr=1": "optim.lrr: no such key; did you mean optim.lr?",
    "optim.lr=fast": "optim.lr: 'fast' is not allowed: input should be a valid number",
    "augment.strength=3": "augment.strength: 3 is not allowed: input should be less than or equal to 2",
}
BAD_OPTIONS = {  # wrong types, exceeded bounds, and options that exclude each other
    "data prepare": [["--quality", "high"], ["--quality", "101"], ["--max-bad", "5"]],
    "data show": [["--samples", "many"], ["--samples", "65"]],
    "bench data": [["--seconds", "long"], ["--seconds", "0"]],
    "bench model": [["--image-size", "4"], ["--batch-size", "0"], ["--seconds", "0"]],
    "train": [["--epochs", "many"], ["--schedule", "rise"], ["--epochs", "3"]],
    "tune": [["--trials", "20", "--resume", "STUDY"], ["--trials", "+2"]],
    "status": [["STUDY", "first"]],
    "stop": [["first"]],
    "ui": [["--port", "http"]],
}


def mistakes_of(command: str, experiment: str) -> list[list[str]]:
    """Command lines with one mistake each: an unknown option or key, a wrong type, an exceeded bound.

    Each mistake must be found before any data, run or model is looked up.

    Args:
        command: name of the command, such as `data prepare`.
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
    """The arguments that a command needs; with --resume it needs none."""
    return [] if "--resume" in bad else needed
