"""How soon a command answers --help, a mistake in a key, type or bound, and a wrong model name.

    python bench/answers.py

Every command is started --repeats times, each time as a process of its own; a command's time is the median.
Prints the slowest command of each kind, and its time:

- help_s: `--help`, at most 1.5;
- mistake_s: a mistake in a key, type or bound, at most 1.5;
- model_name_s: a model that timm does not know, or a run that does not exist, at most 6.

It takes about three minutes on two CPU cores. Nothing else may use them meanwhile.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import deit_ray  # noqa: E402
from bench.record import record  # noqa: E402
from tests.support.commands import all_commands  # noqa: E402
from tests.support.mistakes import mistakes_of  # noqa: E402

STUDENT, SEARCH = (str(ROOT / "experiments" / f"digits_{name}.yaml") for name in ("student", "search"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="how often each command is started")
    arguments = parser.parse_args()
    commands = all_commands()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        deit_ray.prepare("digits", f"{folder}/digits")
        kinds = {
            "help_s": [[*name.split(), "--help"] for name in commands],
            "mistake_s": [line for name in commands for line in mistakes_of(name, SEARCH)],
            "model_name_s": wrong_models(folder),
        }
        slowest = {kind: slowest_of(lines, arguments.repeats, folder) for kind, lines in kinds.items()}
    for kind, (seconds, line) in slowest.items():
        print(f"{kind}: {seconds:.2f} by: deit-ray {' '.join(line)}")
    record("answers", {kind: round(seconds, 2) for kind, (seconds, _) in slowest.items()})


def wrong_models(folder: str) -> list[list[str]]:
    """Command lines with a model name that neither timm nor the results folder has."""
    keys = {"data.uri": f"{folder}/digits", "student.model": "deit_tny", "distillation.kind": "none"}
    space = "search.space={optim.lr: {log: [0.001, 0.01]}}"
    settings = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    return [
        ["train", STUDENT, *settings],
        ["plan", STUDENT, *settings],
        ["tune", SEARCH, *settings, "--set", space],
        ["bench", "data", STUDENT, *settings],
        ["evaluate", "deit_tny", "--data", f"{folder}/digits"],
        ["predict", "deit_tny", "image.png"],
    ]


def slowest_of(lines: list[list[str]], repeats: int, folder: str) -> tuple[float, list[str]]:
    """The longest median time in seconds, and the command line that took it."""
    return max((statistics.median(seconds_of(line, folder) for _ in range(repeats)), line) for line in lines)


def seconds_of(line: list[str], folder: str) -> float:
    """Wall time of a command in seconds. The command must answer with its help or with one error."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "deit_ray", *line], capture_output=True, text=True, cwd=folder, check=False
    )
    seconds = time.perf_counter() - begin
    if done.returncode != 0 and not done.stderr.startswith("error: "):
        raise SystemExit(f"deit-ray {' '.join(line)}: {done.stderr}")
    if (done.returncode == 0) != (line[-1] == "--help"):
        raise SystemExit(f"deit-ray {' '.join(line)} ended with exit status {done.returncode}")
    return seconds


if __name__ == "__main__":
    main()
