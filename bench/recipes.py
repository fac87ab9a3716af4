"""Compares the numbers of the recipes in experiments/ with their sources, which bench/recipes.csv names.

    python bench/recipes.py [--reference FOLDER]

Every number of imagenet*.yaml and compare_architectures.yaml has a row in the table, and so have the expected
top-1 and the GPU-hours of their headers; the rows without a file are defaults of deit_ray. A row's source is

- deit: facebookresearch/deit at commit 7e160fe. The place is a file of it, for a command in a README with
  words that single it out. The argument is one of main.py's arguments (its default counts where a command
  does not name it), a product of some (`--batch-size x --nodes x --ngpus`), the name of a parameter with a
  default, or a quoted text that the file has, whose last number is the value;
- arithmetic: the argument is the calculation;
- a paper, an issue of the reference's repository, or ours: the place says where, or why.

With --reference FOLDER, a checkout or a bare clone of facebookresearch/deit, the rows of deit are read there
again. For each recipe that has a command in a README, all arguments of the command are compared with the
recipe's settings, whichever file or default they come from. The exit status is 1 if a number has no row, a
row has no number, or two numbers differ.
"""

import argparse
import ast
import csv
import math
import operator
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from deit_ray.experiment.load import default_experiment, load_experiment  # noqa: E402
from deit_ray.experiment.yaml_text import read_yaml  # noqa: E402

EXPERIMENTS = ROOT / "experiments"
TABLE = ROOT / "bench" / "recipes.csv"
COMMIT = "7e160fe"
SOURCES = ("deit", "arithmetic", "ours", "arXiv:", "https://github.com/facebookresearch/")
ROUNDED = 0.03  # largest relative difference of a calculation, since estimates are rounded
ARGUMENTS = {  # of a command, and the settings that they set
    "--input-size": "data.image_size",
    "--eval-crop-ratio": "data.eval_crop",
    "--color-jitter": "augment.color_jitter",
    "--reprob": "augment.random_erasing",
    "--mixup": "augment.mixup",
    "--cutmix": "augment.cutmix",
    "--drop-path": "student.drop_path",
    "--lr": "optim.lr",
    "--weight-decay": "optim.weight_decay",
    "--warmup-epochs": "optim.warmup_epochs",
    "--warmup-lr": "optim.warmup_lr",
    "--min-lr": "optim.min_lr",
    "--smoothing": "optim.label_smoothing",
    "--model-ema-decay": "optim.ema_decay",
    "--epochs": "train.epochs",
}
COMMANDS = {  # the commands of the recipes, by words that single them out, and the arguments that differ
    "imagenet_deit_tiny": ("README_deit.md", "deit_tiny_patch16_224; nproc_per_node", ()),
    "imagenet_deit_small": ("README_deit.md", "deit_small_patch16_224; nproc_per_node", ()),
    "imagenet_deit_base": ("README_deit.md", "deit_base_patch16_224 --data-path", ()),
    "imagenet_deit_base_distilled": ("README_deit.md", "--distillation-type hard", ()),
    # fine-tuning in evaluation mode drops nothing
    "imagenet_deit_base_384": ("README_deit.md", "deit_base_patch16_384; --finetune", ("--drop-path",)),
    "imagenet_deit3_small": ("README_revenge.md", "deit_small_patch16_LS; --bce-loss", ()),
    "imagenet_deit3_base": ("README_revenge.md", "deit_base_patch16_LS; --bce-loss", ()),
    "imagenet_deit3_base_224": ("README_revenge.md", "deit_base_patch16_LS; --input-size 224; --aa", ()),
    "imagenet_deit3_small_384": ("README_revenge.md", "deit_small_patch16_LS; --input-size 384", ()),
    "imagenet_deit3_base_384": ("README_revenge.md", "deit_base_patch16_LS; --input-size 384", ()),
}
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


@dataclass(frozen=True)
class Row:
    """A number of a recipe, and where it comes from.

    Attributes:
        file: a recipe; empty for a default of deit_ray.
        key: a dotted key, `top-1` or `GPU-hours`.
        value: a number, or a list of numbers.
        source, place, argument: see the module's docstring.
    """

    file: str
    key: str
    value: float | list[float]
    source: str
    place: str
    argument: str

    def __str__(self) -> str:
        return f"{self.file or 'default'}: {self.key} {self.value}"


def read_table(path: Path = TABLE) -> list[Row]:
    with path.open() as file:
        return [Row(**row | {"value": ast.literal_eval(row["value"])}) for row in csv.DictReader(file)]


def recipes(folder: Path = EXPERIMENTS) -> list[Path]:
    """The files whose numbers the table has."""
    return [*sorted(folder.glob("imagenet*.yaml")), folder / "compare_architectures.yaml"]


def numbers_of(path: Path) -> list[tuple[str, float | list[float]]]:
    """(key, value) of every number that a recipe sets itself or says in its header."""
    expected = re.search(r"^# Expected top-1: (.*)$", path.read_text(), re.MULTILINE)
    cost = re.search(r"^# Cost: \D*?(\d+) GPU-hours", path.read_text(), re.MULTILINE)
    header = [("top-1", float(x)) for x in re.findall(r"\d+\.\d", expected[1])] if expected else []
    header += [("GPU-hours", int(cost[1]))] if cost else []
    return header + list(_leaves(read_yaml(path)))


def _leaves(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif all(_is_number(item) for item in (value if isinstance(value, list) else [value])):
            yield f"{prefix}{key}", value


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def problems_of(table: list[Row], files: list[Path]) -> list[str]:
    """What does not fit between the table and the recipes, one sentence each."""
    known, found = Counter(), Counter()
    for row in table:
        if row.file:
            known[row.file, row.key, repr(_plain(row.value))] += 1
    for path in files:
        for key, value in numbers_of(path):
            found[path.name, key, repr(_plain(value))] += 1
    problems = [f"{file}: {key} {value}: has no row in the table" for file, key, value in found - known]
    problems += [
        f"{file}: {key} {value}: the table has it, the file does not" for file, key, value in known - found
    ]
    defaults = default_experiment()
    for row in table:
        if not row.file and _plain(defaults.get(row.key)) != _plain(row.value):
            problems.append(f"{row}: the default is {defaults.get(row.key)}")
        if not row.source.startswith(SOURCES) or not row.place:
            problems.append(f"{row}: names no source")
        if row.source == "arithmetic" and not _is_near(row.value, calculate(row.argument)):
            problems.append(f"{row}: {row.argument} is {calculate(row.argument):.4g}")
    return problems


def _plain(value):
    return [float(item) for item in value] if isinstance(value, list) else float(value)


def _is_near(value: float, calculated: float) -> bool:
    return math.isclose(value, calculated, rel_tol=ROUNDED)


def calculate(text: str) -> float:
    """The value of a calculation with numbers, + - * / ** and parentheses.

    Raises:
        ValueError: it has anything else.
    """

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and _is_number(node.value):
            return node.value
        raise ValueError(f"{text}: not a calculation")

    return value(ast.parse(text, mode="eval").body)


class Reference:
    """The files of facebookresearch/deit.

    Args:
        folder: a checkout, or a bare clone.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.defaults = self._arguments("main.py") | self._arguments("run_with_submitit.py")

    def published(self, row: Row) -> float:
        """The number that the reference has for a row.

        Raises:
            ValueError: it has none.
        """
        name, _, words = row.place.partition(": ")
        if row.argument.startswith('"'):
            text = row.argument.strip('"')
            if text not in self.read(name):
                raise ValueError(f"{row}: {name} does not say {text}")
            numbers = re.findall(r"\d+\.\d+", text)
            decimals = len(str(row.value).partition(".")[2])
            return round(float(numbers[-1]), decimals) if numbers else row.value
        if not row.argument.startswith("-"):
            return self._parameter(name, row.argument)
        given = self.command(name, words) if words else self.defaults
        product = 1.0
        for argument in row.argument.split(" x "):
            product *= float(given[argument])
        return product

    def read(self, name: str) -> str:
        if (self.folder / name).is_file():
            return (self.folder / name).read_text()
        command = ["git", "--git-dir", str(self.folder), "show", f"HEAD:{name}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def _arguments(self, name: str) -> dict[str, object]:
        """The defaults of a file's parser; 0 for a flag."""
        found = {}
        for node in ast.walk(ast.parse(self.read(name))):
            if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") != "add_argument":
                continue
            settings = {keyword.arg: keyword.value for keyword in node.keywords}
            if "default" in settings:
                found[ast.literal_eval(node.args[0])] = ast.literal_eval(settings["default"])
            elif "action" in settings:
                found[ast.literal_eval(node.args[0])] = 0
        return found

    def command(self, name: str, words: str) -> dict[str, object]:
        """All arguments of the one command of a README that has all these words; a flag has 1.

        Raises:
            ValueError: no command has them, or several have.
        """
        commands = [line for line in self.read(name).splitlines() if line.startswith("python ")]
        chosen = [line for line in commands if all(word in line for word in words.split("; "))]
        if len(chosen) != 1:
            raise ValueError(f"{name}: {len(chosen)} commands have the words {words}")
        tokens, found = shlex.split(chosen[0].replace("=", " ")), dict(self.defaults)
        for place, token in enumerate(tokens):
            if token.startswith("--"):
                following = tokens[place + 1] if place + 1 < len(tokens) else "--"
                found[self._in_full(token)] = 1 if following.startswith("--") else following
        return found

    def _in_full(self, token: str) -> str:
        """An argument that may be shortened, as argparse allows."""
        longer = [known for known in self.defaults if known.startswith(token)]
        return longer[0] if len(longer) == 1 else token

    def _parameter(self, name: str, parameter: str) -> float:
        """The default of a parameter, which must be the same wherever the file has one."""
        values = set()
        for node in ast.walk(ast.parse(self.read(name))):
            if isinstance(node, ast.FunctionDef):
                names = [argument.arg for argument in node.args.args]
                for argument, default in zip(reversed(names), reversed(node.args.defaults), strict=False):
                    if argument == parameter:
                        values.add(ast.literal_eval(default))
        if len(values) != 1:
            raise ValueError(f"{name}: {parameter} has the defaults {sorted(values)}")
        return values.pop()


def differences(table: list[Row], reference: Reference) -> list[str]:
    """The rows of deit whose number the reference does not have, one sentence each."""
    problems = []
    for row in table:
        if row.source == "deit":
            try:
                published = reference.published(row)
            except ValueError as error:
                problems.append(str(error))
                continue
            if not math.isclose(published, row.value):
                problems.append(f"{row}: {row.place} has {published:g} ({row.argument})")
    return problems


def command_differences(reference: Reference) -> list[str]:
    """The settings of recipes that differ from the arguments of their commands, one sentence each."""
    problems = []
    for stem, (name, words, apart) in COMMANDS.items():
        own, given = load_experiment(EXPERIMENTS / f"{stem}.yaml"), reference.command(name, words)
        for argument, key in ARGUMENTS.items():
            if argument not in apart and not math.isclose(float(given[argument]), own.get(key)):
                problems.append(f"{stem}: {key} {own.get(key)}: the command has {argument} {given[argument]}")
        switches = {
            "--bce-loss": own.optim.label_loss == "bce",
            "--unscale-lr": not own.optim.scale_lr,
            "--ThreeAugment": own.augment.policy == "three_augment",
            "--no-repeated-aug": own.data.views == 1,
        }
        for argument, is_on in switches.items():
            # a README glues two of them: --repeated-aug--bce-loss
            is_given = any(argument in known and value == 1 for known, value in given.items())
            if is_given != is_on:
                problems.append(f"{stem}: {argument} is {'' if is_given else 'not '}in the command")
        if given["--opt"].removeprefix("fused") != own.optim.kind:
            problems.append(f"{stem}: optim.kind {own.optim.kind}: the command has --opt {given['--opt']}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, help="a checkout or a bare clone of facebookresearch/deit")
    arguments = parser.parse_args()
    table = read_table()
    problems = problems_of(table, recipes())
    if arguments.reference:
        reference = Reference(arguments.reference)
        problems += differences(table, reference) + command_differences(reference)
    for problem in problems:
        print(problem)
    compared = sum(row.source == "deit" for row in table) if arguments.reference else 0
    print(f"{len(table)} numbers, {compared} of them read in the reference, {len(problems)} problems")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
