"""The published recipes: each number has a source, each file says what to expect, and each trains."""

import shutil

import pytest
import torch
from timm.optim import Lamb

from bench.recipes import (
    EXPERIMENTS,
    Reference,
    Row,
    differences,
    numbers_of,
    problems_of,
    read_table,
    recipes,
)
from deit_ray.commands.plan import sample_trials
from deit_ray.experiment.load import load_experiment
from deit_ray.models.student import create_student, has_two_heads, save_model
from deit_ray.training.step import Batch
from deit_ray.training.worker import describe
from tests.support.training import CPU, local_batches, make_step

SHARED = ("imagenet", "imagenet_deit3", "imagenet_deit3_last")  # settings that recipes extend
RECIPES = [path for path in recipes() if path.stem not in SHARED]
TINY = {"patch_size": 4, "width": 24, "depth": 2, "heads": 2}
SIZES = {192: 12, 224: 16, 384: 24}
STEPS = 3


def test_every_number_of_a_recipe_is_in_the_table_with_its_source():
    assert problems_of(read_table(), recipes()) == []


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("imagenet_deit3_base.yaml", "lr: 3e-3", "lr: 4e-3", "optim.lr 0.004: has no row"),
        ("imagenet_deit3_base.yaml", "lr: 3e-3", "lr: 4e-3", "optim.lr 0.003: the table has it"),
        ("imagenet_deit_tiny.yaml", "top-1: 72.2", "top-1: 72.9", "top-1 72.9: has no row"),
        (
            "imagenet_deit_tiny.yaml",
            "workers: 4}",
            "workers: 4, epochs: 30}",
            "train.epochs 30.0: has no row",
        ),
        ("imagenet_deit_small_search.yaml", "[1e-4, 2e-3]", "[1e-4, 3e-3]", "[0.0001, 0.003]: has no row"),
        ("recipes.csv", "53 * 8", "43 * 8", "GPU-hours 424: 43 * 8 is 344"),
        (
            "recipes.csv",
            ",optim.min_lr,1e-5",
            ",optim.min_lr,1e-4",
            "default: optim.min_lr 0.0001: the default",
        ),
        ("recipes.csv", "0.01,ours", "0.01,mine", "data.holdout 0.01: names no source"),
    ],
)
def test_a_number_without_a_row_or_with_another_value_is_a_problem(tmp_path, file, before, after, said):
    for path in (*recipes(), EXPERIMENTS.parent / "bench" / "recipes.csv"):
        shutil.copy(path, tmp_path)
    text = (tmp_path / file).read_text()
    assert before in text
    (tmp_path / file).write_text(text.replace(before, after, 1))
    problems = problems_of(read_table(tmp_path / "recipes.csv"), recipes(tmp_path))
    assert any(said in problem for problem in problems), problems


def test_the_reference_is_read_again(tmp_path):
    (tmp_path / "main.py").write_text(
        "parser.add_argument('--lr', default=5e-4)\nparser.add_argument('--batch-size', default=64)\n"
        "parser.add_argument('--no-views', action='store_false')\n"
    )
    (tmp_path / "run_with_submitit.py").write_text("parser.add_argument('--ngpus', default=8)\n")
    (tmp_path / "models.py").write_text("def block(size, scale=1e-4):\n    pass\n")
    (tmp_path / "README.md").write_text("| S | 79.84 |\n\npython x.py --model s --batch 32 --no-views\n")
    rows = {
        ("main.py", "--lr"): 5e-4,
        ("README.md: --model s", "--batch-size x --ngpus"): 256,
        ("README.md: --model s", "--lr"): 5e-4,
        ("README.md: --model s", "--no-views"): 1,
        ("README.md", '"| S | 79.84"'): 79.8,
        ("models.py", "scale"): 1e-4,
    }
    reference = Reference(tmp_path)
    right = [Row("x.yaml", "k", value, "deit", *place) for place, value in rows.items()]
    assert differences(right, reference) == []
    wrong = [Row("x.yaml", "k", 2 * row.value, "deit", row.place, row.argument) for row in right]
    assert len(differences(wrong, reference)) == len(rows)
    unknown = [Row("x.yaml", "k", 1, "deit", "README.md: --model b", "--lr")]
    assert differences(unknown, reference) == ["README.md: 0 commands have the words --model b"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_begins_with_what_it_is_its_source_its_cost_and_its_command(path):
    header = path.read_text().partition("extends:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    parts = ["# Source: ", "# Cost: ", f"experiments/{path.name}"]
    searches = bool(load_experiment(path).search.space)
    parts += [f"#   deit-ray {'tune' if searches else 'train'} experiments/{path.name}"]
    if path.stem != "compare_architectures":  # nobody has published its figures
        parts += ["# Expected top-1: "]
    assert [part for part in parts if part not in header] == []
    assert {"GPU-hours"} <= {key for key, _ in numbers_of(path)}


def test_the_first_trial_of_the_search_is_the_papers_recipe():
    search = load_experiment(EXPERIMENTS / "imagenet_deit_small_search.yaml")
    paper = load_experiment(EXPERIMENTS / "imagenet_deit_small_distilled.yaml")
    first, second = sample_trials(search, lambda params: None)[:2]
    assert first == {key: paper.get(key) for key in search.search.space}
    assert second != first
    same = ("augment", "student", "distillation", "optim", "train")
    assert [getattr(search, section) for section in same] == [getattr(paper, section) for section in same]


def of_tiny_models(path, tints: str, teacher: str, init: str, results: str, **keys):
    """A recipe as it is, but for its data, its teacher, and the sizes of its images, model and run."""
    own = load_experiment(path)
    sizes = {f"student.{key}": value for key, value in TINY.items()}
    keys = {
        "data.uri": tints,
        "data.image_size": SIZES[own.data.image_size],
        "results.uri": results,
        "train.batch_size": 12,
        "train.workers": 1,
        "train.epochs": 6,
        "search.space": {},
        **({} if own.student.init == "scratch" else {"student.init": init}),
        **({"distillation.teacher": {"weights": teacher}} if own.distils else {}),
        **sizes,
        **keys,
    }
    return load_experiment(path, keys)


@pytest.fixture(scope="module")
def other_weights(tints, tmp_path_factory):
    """Weights of a plain transformer with LayerScale or without, for images of 8 pixels and five classes."""
    folder, found = tmp_path_factory.mktemp("weights"), {}
    for model, scale in (("deit_tiny_patch16_224", None), ("deit3_small_patch16_224", 1e-4)):
        path = EXPERIMENTS / "imagenet_deit_tiny.yaml"
        own = load_experiment(
            path, {"student": {"model": model, "layer_scale": scale, **TINY}, "data.image_size": 8}
        )
        weights = create_student(own.student, 8, 5)
        found[scale] = str(folder / f"{model}.safetensors")
        save_model(found[scale], weights.state_dict(), describe(own, list("abcde"), False))
    return found


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if path.stem != "compare_architectures"], ids=lambda p: p.stem
)
def test_a_recipe_trains_on_small_images(path, tints, tints_teacher, other_weights, tmp_path):
    init = other_weights[load_experiment(path).student.layer_scale]
    experiment = of_tiny_models(path, tints, tints_teacher, init, str(tmp_path))
    step = make_step(experiment)
    losses = few_steps(step, experiment)
    assert torch.isfinite(torch.tensor(losses)).all()
    assert (
        has_two_heads(step.model) is experiment.distils is ("distilled" in path.stem or "search" in path.stem)
    )
    is_pretraining = path.stem in ("imagenet_deit3_small", "imagenet_deit3_base")
    assert isinstance(step.optimizer, Lamb) is is_pretraining
    assert step.peak_lr == pytest.approx(experiment.optim.lr * (1 if "deit3" in path.stem else 12 / 512))
    if is_pretraining:  # each of three classes is a target or not: ln 2 where nothing is known
        assert losses[0] == pytest.approx(0.693, abs=0.05)


MODELS = load_experiment(EXPERIMENTS / "compare_architectures.yaml").search.space["student.model"].values


@pytest.mark.parametrize("model", MODELS)
def test_every_compared_architecture_trains_with_the_teacher(model, tints, tints_teacher, tmp_path):
    is_transformer = "patch16" in model
    shape = TINY if is_transformer else dict.fromkeys(TINY)
    experiment = of_tiny_models(
        EXPERIMENTS / "compare_architectures.yaml",
        tints,
        tints_teacher,
        "",
        str(tmp_path),
        **{"student": {"model": model, **shape}, "train.batch_size": 6},
    )
    step = make_step(experiment)
    assert has_two_heads(step.model) is ("distilled" in model)
    assert torch.isfinite(torch.tensor(few_steps(step, experiment))).all()


def few_steps(step, experiment) -> list[float]:
    """The losses of the first steps; each step changes the weights."""
    losses, batches = [], local_batches(experiment)
    before = [parameter.clone() for parameter in step.model.parameters()]
    for number in range(STEPS):
        losses.append(step(Batch.of(next(batches), CPU), number)["loss"].item())
    assert any((a != b).any() for a, b in zip(before, step.model.parameters(), strict=True))
    return losses
