"""A key can be searched if two of its values make two different trials; training shows which do."""

import hashlib

import pytest

from deit_ray.errors import UserError
from deit_ray.experiment.config import field_keys
from deit_ray.experiment.load import load_experiment
from deit_ray.experiment.searched import SEARCHABLE, effective, is_searchable
from deit_ray.training.evaluate import evaluate
from deit_ray.training.step import Batch
from tests.conftest import EXPERIMENTS
from tests.support.data import write_tints
from tests.support.training import CPU, local_batches, make_step

DISTILLED, PLAIN = "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"
# two epochs of three steps; the settings with which every searchable key matters
BASE = {
    "data.image_size": 8,
    "data.views": 1,
    "data.eval_crop": 0.875,
    "augment": {"policy": "randaugment", "random_erasing": 0.5, "mixup": 0.8, "cutmix": 1.0},
    "student": {"model": DISTILLED, "patch_size": 4, "width": 12, "depth": 2, "heads": 2, "drop_path": 0.4},
    "distillation.kind": "soft",
    "optim": {"lr": 5e-3, "warmup_epochs": 1, "ema_decay": 0.5, "schedule_epochs": 2},
    "train.batch_size": 8,
    "train.epochs": 2,
    "train.eval_every": 2,
    "search.metric": "val/top1_ema",
    "search.grace_epochs": 1,
}
JITTER = {"augment.policy": "three_augment"}
VALUES = {  # two values of each key, and what else must be set
    "data.image_size": (8, 12),
    "data.flip": (0.0, 1.0),
    "data.views": (1, 2),
    "data.eval_crop": (0.875, 0.5),
    "augment.strength": (0.0, 1.0),
    "augment.policy": ("none", "randaugment"),
    "augment.randaugment.magnitude": (1.0, 9.0),
    "augment.randaugment.num_ops": (1, 3),
    "augment.randaugment.p": (0.1, 1.0),
    "augment.color_jitter": (0.1, 0.5, JITTER),
    "augment.force_color_jitter": (False, True),
    "augment.random_erasing": (0.0, 1.0),
    "augment.mixup": (0.0, 0.8),
    "augment.cutmix": (0.0, 1.0),
    "augment.mixup_switch": (0.0, 1.0),
    "student.model": (DISTILLED, PLAIN, {"search.metric": "val/top1"}),
    "student.patch_size": (2, 4),
    "student.width": (12, 16),
    "student.depth": (2, 3),
    "student.heads": (1, 2),
    "student.drop_path": (0.0, 0.9),
    "student.drop_path_rule": ("linear", "uniform"),
    "student.layer_scale": (0.1, 0.5),
    "distillation.kind": ("soft", "hard"),
    "distillation.weight": (0.2, 0.8),
    "distillation.temperature": (1.0, 4.0),
    "distillation.soft_mean": ("elements", "batch"),
    "distillation.teacher_view": ("student", "crop"),
    "optim.kind": ("adamw", "lamb"),
    "optim.label_loss": ("cross_entropy", "bce", {"optim.label_smoothing": 0.0}),
    "optim.lr": (1e-3, 5e-3),
    "optim.scale_lr": (True, False),
    "optim.weight_decay": (0.0, 0.5),
    "optim.warmup_epochs": (0, 1),
    "optim.warmup_lr": (1e-6, 1e-5),
    "optim.min_lr": (1e-6, 1e-5),
    "optim.clip_grad": (None, 0.1),
    "optim.schedule_epochs": (2, 4),
    "optim.schedule_per": ("step", "epoch"),
    "optim.label_smoothing": (0.0, 0.3),
    "optim.ema_decay": (0.1, 0.9),
    "optim.ema_warmup": ("none", "ramp"),
    "train.batch_size": (8, 6),
    "train.precision": ("float32", "bfloat16"),
}
IDLE = {  # keys with which nothing changes, where these are set
    "augment.mixup_switch": {"augment.cutmix": 0.0},
    "augment.randaugment.p": {"augment.policy": "none"},
    "augment.color_jitter": {"augment.policy": "randaugment"},
    "augment.force_color_jitter": {"augment.color_jitter": 0.0},
    "augment.random_erasing": {"augment.strength": 0.0},
    "augment.strength": {
        "augment.policy": "none", "augment.color_jitter": 0.0, "augment.random_erasing": 0.0,
        "augment.mixup": 0.0, "augment.cutmix": 0.0,
    },
    "student.drop_path": {"student.depth": 1},
    "student.drop_path_rule": {"student.drop_path": 0.0},
    "distillation.weight": {"distillation.kind": "none"},
    "distillation.temperature": {"distillation.kind": "hard"},
    "distillation.soft_mean": {"distillation.weight": 0.0},
    "distillation.teacher_view": {"augment.strength": 0.0},
    "optim.warmup_lr": {"optim.warmup_epochs": 0},
    "optim.label_smoothing": {"distillation.weight": 1.0},
    "optim.label_loss": {"distillation.weight": 1.0, "optim.label_smoothing": 0.0},
    "optim.ema_decay": {"search.metric": "val/top1"},
    "optim.ema_warmup": {"search.metric": "val/top1"},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory, tints_teacher):
    """Makes an experiment of six steps on 27 images."""
    folder = tmp_path_factory.mktemp("few")
    write_tints(str(folder / "data"), {"train": 30, "test": 3})
    fixed = {"data.uri": str(folder / "data"), "distillation.teacher": {"weights": tints_teacher}}

    def make(**keys):
        return load_experiment(EXPERIMENTS / "digits_student.yaml", BASE | fixed | keys)

    return make


def learnt(experiment) -> str:
    """A hash of what a trial learns and measures by the metric that it is ranked by."""
    step, batches = make_step(experiment), local_batches(experiment, splits=("val",))
    count = step.steps_per_epoch * experiment.train.epochs
    for number in range(count):
        step(Batch.of(next(batches), CPU), number)
    parts = [tensor.float() for tensor in step.model.state_dict().values()]
    if experiment.search.metric.endswith("_ema"):
        parts += [tensor.float() for tensor in step.ema.module.state_dict().values()]
    metrics = evaluate("val", step.model, None, batches, 1, step.normalise, step.autocast)
    return hashlib.sha256(
        b"".join(part.numpy().tobytes() for part in parts) + str(metrics["val/loss"]).encode()
    ).hexdigest()


def test_every_setting_is_searched_with_two_values_or_shared():
    leaves = [key for key in field_keys() if not any(other.startswith(key + ".") for other in field_keys())]
    assert {key for key in leaves if is_searchable(key)} == VALUES.keys()
    assert set(SEARCHABLE) <= set(field_keys())


@pytest.mark.parametrize("key", VALUES)
def test_a_searchable_key_changes_what_a_trial_learns(base, key):
    a, b, *others = VALUES[key]
    keys = others[0] if others else {}
    first, second = base(**keys | {key: a}), base(**keys | {key: b})
    assert effective(first) != effective(second)
    assert learnt(first) != learnt(second)


@pytest.mark.parametrize("key", IDLE)
def test_a_key_without_effect_is_refused_and_has_none(base, key):
    a, b, *_ = VALUES[key]
    first, second = base(**IDLE[key] | {key: a}), base(**IDLE[key] | {key: b})
    assert effective(first) == effective(second)
    assert learnt(first) == learnt(second)
    with pytest.raises(UserError, match=rf"search\.space\.{key}: is searched, but .*would change nothing"):
        base(**IDLE[key], **{"search.space": {key: {"choice": [a, b]}}})


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("distillation.teacher.weights", ["a", "b"]),
        ("distillation.teacher.model", ["resnet18", "resnet34"]),
        ("student.init", ["scratch", "pretrained"]),
        ("train.device", ["cpu", "cuda"]),
        ("train.compile", ["auto", "never"]),
        ("train.threads", [1, 2]),
        ("train.eval_every", [1, 2]),
        ("train.max_failures", [1, 2]),
        ("train.gpus_per_worker", [0.5, 1.0]),
        ("augment.place", ["stream", "device"]),
        ("data.max_bad", [0.1, 0.2]),
        ("data.cpus_per_worker", [0.5, 1.0]),
    ],
)
def test_a_key_that_all_trials_share_is_refused(base, key, values):
    with pytest.raises(UserError, match=rf"digits_student\.yaml: search\.space\.{key}: cannot be searched"):
        base(**{"search.space": {key: {"choice": values}}})


def test_the_students_shape_cannot_be_searched_beside_its_first_weights(base):
    with pytest.raises(UserError, match=r"search\.space\.student\.width: .* student\.init is here\.pth"):
        base(**{"student.init": "here.pth", "search.space": {"student.width": {"choice": [12, 24]}}})


def test_a_key_that_matters_in_a_part_of_the_space_is_searched(base):
    space = {
        "augment.policy": {"choice": ["none", "randaugment"]},
        "augment.randaugment.p": {"float": [0.1, 1.0]},
    }
    assert set(base(**{"search.space": space}).search.space) == set(space)
