"""Modules that a command loads before it answers: --help and a mistake need no large library."""

import json
import subprocess
import sys

from tests.conftest import EXPERIMENTS
from tests.support.commands import all_commands
from tests.support.mistakes import IN_THE_FILE, mistakes_of

LARGE = ["ray", "torch", "torchvision", "timm", "mlflow", "optuna", "pandas", "pyarrow", "cv2"]
# runs command lines in turn; for each: [exit status, output, large modules that are loaded by then]
IN_ONE_PROCESS = """
import contextlib, io, json, sys
from deit_ray.cli.main import main

lines, large = json.load(sys.stdin)
found = []
for line in lines:
    sys.argv = ["deit-ray", *line]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main()
        except SystemExit as end:
            status = end.code
    found.append([status, printed.getvalue(), sorted(sys.modules.keys() & set(large))])
print(json.dumps(found))
"""


def answers(lines: list[list[str]]) -> list[tuple[int, str, list[str]]]:
    done = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS],
        input=json.dumps([lines, LARGE]),
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


def test_the_help_of_every_command_loads_no_large_library():
    commands = all_commands()
    assert len(commands) >= 16
    for name, (status, printed, loaded) in zip(
        commands, answers([[*name.split(), "--help"] for name in commands]), strict=True
    ):
        assert (name, status or 0, loaded) == (name, 0, [])
        assert "Usage:" in printed


def test_a_mistake_in_a_key_a_type_or_a_bound_is_answered_before_a_large_library_is_loaded():
    experiment = str(EXPERIMENTS / "digits_search.yaml")
    lines = [line for name in all_commands() for line in mistakes_of(name, experiment)]
    for line, (status, printed, loaded) in zip(lines, answers(lines), strict=True):
        assert status in (1, 2), (line, printed)
        assert printed.startswith("error: "), (line, printed)
        assert (line, loaded) == (line, [])
        if line[-2] == "--set":
            assert IN_THE_FILE[line[-1]] in printed


def test_the_version_is_printed():
    import deit_ray

    assert answers([["--version"]]) == [[0, f"deit-ray {deit_ray.__version__}\n", []]]
