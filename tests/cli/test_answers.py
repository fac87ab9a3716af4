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


# runs command lines in turn, each up to its first import of a large module; for each: [what it had said by
# then, its exit status if it ended before]
UP_TO_A_LARGE_IMPORT = """
import importlib.abc, io, json, sys
from deit_ray.cli.main import main

class LargeImport(BaseException):
    pass

class Watcher(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in large:
            raise LargeImport

lines, large = json.load(sys.stdin)
sys.meta_path.insert(0, Watcher())
out, found = sys.stdout, []
for line in lines:
    sys.argv, sys.stdout = ["deit-ray", *line], io.StringIO()
    sys.stderr, status = sys.stdout, None
    try:
        main()
    except LargeImport:
        pass
    except SystemExit as end:
        status = end.code
    found.append([sys.stdout.getvalue(), status])
print(json.dumps(found), file=out)
"""


def test_every_command_says_something_before_a_large_library_is_loaded(tmp_path):
    (tmp_path / "x.yaml").write_text("name: x\ndata: {uri: none}\ndistillation: {kind: none}\n")
    (tmp_path / "results" / "x-1").mkdir(parents=True)
    (tmp_path / "results" / "x-1" / "experiment.yaml").write_text((tmp_path / "x.yaml").read_text())
    lines = {
        "train": ["x.yaml"], "plan": ["x.yaml"],
        "tune": ["x.yaml", "--set", "search.space.optim.lr.log=[1,2]"],
        "status": [], "stop": ["x"], "best": ["x"], "diff": ["x", "x-1"], "reproduce": ["x"], "sync": ["x"],
        "evaluate": ["no.safetensors", "--data", "none"], "predict": ["no.safetensors", "no.png"],
        "bench data": ["x.yaml"], "bench model": ["x"], "data prepare": ["none", "--out", "out"],
        "data check": ["none"], "data show": ["none"], "doctor": [], "rm": ["x"],
        "report": ["x"], "export": ["x"],
    }  # fmt: skip
    assert {*lines, "ui"} >= set(all_commands())
    done = subprocess.run(
        [sys.executable, "-c", UP_TO_A_LARGE_IMPORT],
        input=json.dumps([[[*name.split(), *arguments] for name, arguments in lines.items()], LARGE]),
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    for name, (said, status) in zip(lines, json.loads(done.stdout), strict=True):
        assert said.strip(), (name, status)
        assert status in (None, 0) or said.splitlines()[-1].startswith("error: "), (name, said)


def test_the_version_is_printed():
    import deit_ray

    assert answers([["--version"]]) == [[0, f"deit-ray {deit_ray.__version__}\n", []]]
