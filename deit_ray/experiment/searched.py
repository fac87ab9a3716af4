"""Which settings a study can search: those that each trial reads for itself and that change what it learns.

Everything else is refused by rule: a setting outside `SEARCHABLE` is read once for the whole study or changes
no result, and a setting of `CONDITIONS` changes nothing while its condition does not hold.
"""

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment, field_keys, flatten
from deit_ray.experiment.space import Distribution, combinations_of

# Settings, and sections of them, that each trial reads for itself. tests/experiment/test_searched.py trains
# with two values of each and compares the weights.
SEARCHABLE = (
    "data.image_size",
    "data.flip",
    "data.views",
    "data.eval_crop",
    "augment.strength",
    "augment.policy",
    "augment.randaugment",
    "augment.color_jitter",
    "augment.force_color_jitter",
    "augment.random_erasing",
    "augment.mixup",
    "augment.cutmix",
    "augment.mixup_switch",
    "student.model",
    "student.patch_size",
    "student.width",
    "student.depth",
    "student.heads",
    "student.drop_path",
    "student.drop_path_rule",
    "student.layer_scale",
    "distillation.kind",
    "distillation.weight",
    "distillation.temperature",
    "distillation.soft_mean",
    "distillation.teacher_view",
    "optim",
    "train.batch_size",
    "train.precision",
)
# What the whole study reads once, and the searchable settings on which its shape depends.
SHAPES = (
    "student.model",
    "student.patch_size",
    "student.width",
    "student.depth",
    "student.heads",
    "student.layer_scale",
    "data.image_size",
)
# values that switch something off; it is then as if the setting were not there
OFF = {
    "augment.policy": "none",
    "augment.color_jitter": 0.0,
    "augment.random_erasing": 0.0,
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
}
COMBINATIONS = 32  # in which a setting is compared with its other values

Condition = tuple[
    str, Callable[[Experiment], bool], str
]  # key or section, when it matters, and why it does not


def _alters_pixels(experiment: Experiment) -> bool:
    """Whether the student's image differs from its crop."""
    augment = experiment.augment
    drawn = augment.randaugment
    by_policy = augment.policy not in ("none", "randaugment") or (
        augment.policy == "randaugment" and drawn.num_ops > 0 and drawn.p > 0
    )
    return augment.strength > 0 and (by_policy or _jitters(experiment) or augment.random_erasing > 0)


def _takes_jitter(experiment: Experiment) -> bool:
    return experiment.augment.force_color_jitter or experiment.augment.policy in ("none", "three_augment")


def _jitters(experiment: Experiment) -> bool:
    return experiment.augment.color_jitter > 0 and _takes_jitter(experiment)


def _mixes(experiment: Experiment) -> bool:
    return experiment.augment.mixup > 0 or experiment.augment.cutmix > 0


def _teaches(experiment: Experiment) -> bool:
    return experiment.distillation.kind != "none" and experiment.distillation.weight > 0


def _drops_in_first_block(experiment: Experiment) -> bool:
    return experiment.student.drop_path_rule == "uniform"


CONDITIONS: tuple[Condition, ...] = (
    (
        "augment.strength",
        lambda e: (
            _mixes(e) or _alters_pixels(e.with_overrides({"augment.strength": 1.0, "search.space": {}}))
        ),
        "no augmentation is on that it could scale",
    ),
    *(
        (key, lambda e: e.augment.strength > 0, "augment.strength is 0")
        for key in field_keys()
        if key.startswith("augment.") and key != "augment.strength"
    ),
    (
        "augment.randaugment",
        lambda e: e.augment.policy not in ("none", "three_augment"),
        "augment.policy is {augment.policy}",
    ),
    ("augment.randaugment.magnitude", lambda e: e.augment.randaugment.num_ops > 0, "num_ops is 0"),
    ("augment.randaugment.magnitude", lambda e: e.augment.randaugment.p > 0, "augment.randaugment.p is 0"),
    ("augment.randaugment.num_ops", lambda e: e.augment.randaugment.p > 0, "augment.randaugment.p is 0"),
    ("augment.randaugment.p", lambda e: e.augment.randaugment.num_ops > 0, "num_ops is 0"),
    (
        "augment.color_jitter",
        _takes_jitter,
        "augment.policy is {augment.policy}, which takes no colour jitter; set augment.force_color_jitter",
    ),
    ("augment.force_color_jitter", lambda e: e.augment.color_jitter > 0, "augment.color_jitter is 0"),
    (
        "augment.force_color_jitter",
        lambda e: e.augment.policy not in ("none", "three_augment"),
        "augment.policy is {augment.policy}, which takes colour jitter in any case",
    ),
    (
        "augment.mixup_switch",
        lambda e: e.augment.mixup > 0 and e.augment.cutmix > 0,
        "it chooses between mixup and cutmix, and one of them is 0",
    ),
    (
        "student.drop_path",
        lambda e: _drops_in_first_block(e) or e.student.depth != 1,
        "student.depth is 1, and the first block drops nothing",
    ),
    ("student.drop_path_rule", lambda e: e.student.drop_path > 0, "student.drop_path is 0"),
    (
        "student.drop_path_rule",
        lambda e: _drops_in_first_block(e) or e.student.depth != 1,
        "student.depth is 1, and the first block drops nothing",
    ),
    ("distillation.weight", lambda e: e.distillation.kind != "none", "distillation.kind is none"),
    ("distillation.temperature", lambda e: e.distillation.kind != "none", "distillation.kind is none"),
    ("distillation.soft_mean", lambda e: e.distillation.kind != "none", "distillation.kind is none"),
    ("distillation.teacher_view", lambda e: e.distillation.kind != "none", "distillation.kind is none"),
    ("distillation.temperature", lambda e: e.distillation.weight > 0, "distillation.weight is 0"),
    ("distillation.soft_mean", lambda e: e.distillation.weight > 0, "distillation.weight is 0"),
    ("distillation.teacher_view", lambda e: e.distillation.weight > 0, "distillation.weight is 0"),
    (
        "distillation.temperature",
        lambda e: e.distillation.kind == "soft",
        "distillation.kind is {distillation.kind}, which has no temperature",
    ),
    (
        "distillation.soft_mean",
        lambda e: e.distillation.kind == "soft",
        "distillation.kind is {distillation.kind}, and only soft takes a mean",
    ),
    (
        "distillation.teacher_view",
        _alters_pixels,
        "the student's image is its crop: nothing augments or erases it",
    ),
    ("optim.warmup_lr", lambda e: e.optim.warmup_epochs > 0, "optim.warmup_epochs is 0"),
    ("optim.scale_lr", lambda e: e.train.batch_size != 512, "train.batch_size is 512, where both are equal"),
    (
        "optim.label_smoothing",
        lambda e: not (_teaches(e) and e.distillation.weight == 1),
        "distillation.weight is 1: the labels do not count",
    ),
    (
        "optim.label_loss",
        lambda e: not (_teaches(e) and e.distillation.weight == 1),
        "distillation.weight is 1: the labels do not count",
    ),
    (
        "optim.ema_decay",
        lambda e: e.search.metric.endswith("_ema"),
        "search.metric is {search.metric}, which is not measured on the moving average; rank on val/top1_ema",
    ),
    (
        "optim.ema_warmup",
        lambda e: e.search.metric.endswith("_ema"),
        "search.metric is {search.metric}, which is not measured on the moving average; rank on val/top1_ema",
    ),
)


def effective(experiment: Experiment) -> dict[str, Any]:
    """The settings that decide what a trial learns and how it is ranked, by dotted key."""
    settings = {key: value for key, value in flatten(experiment.as_dict()).items() if is_searchable(key)}
    for key in [key for key in settings if _why_idle(key, experiment) or settings[key] == OFF.get(key, key)]:
        del settings[key]
    if settings.get("optim.schedule_epochs", 0) is None:
        settings["optim.schedule_epochs"] = experiment.train.epochs
    return settings


def is_searchable(key: str) -> bool:
    """Whether each trial of a study reads this setting for itself."""
    return any(_lies_in(key, section) for section in SEARCHABLE)


def idle_keys(experiment: Experiment) -> dict[str, str]:
    """The searched keys that would change nothing, each with the reason, as one sentence."""
    space = experiment.search.space
    combinations = [own for own in _experiments(experiment) if own is not None]
    found = {}
    for key, distribution in space.items():
        if not is_searchable(key):
            found[key] = _why_shared(key)
        elif _is_shape_of_shared(key, experiment):
            found[key] = (
                f"cannot be searched: student.init is {experiment.student.init}; its weights have one shape, "
                "and all trials of a study share them"
            )
        elif combinations and not any(_matters(key, distribution, own) for own in combinations):
            reason = next(
                filter(None, (_why_idle(key, own) for own in combinations)), "all its values are equal"
            )
            found[key] = f"is searched, but {reason}: it would change nothing"
    return found


def check_searched(experiment: Experiment, source: str) -> None:
    """Refuses a search space with a key that would change nothing.

    Args:
        source: the file of the experiment, or its name, for the message.

    Raises:
        UserError: naming the key and the reason.
    """
    for key, why in idle_keys(experiment).items():
        raise UserError(f"{source}: search.space.{key}: {why}")


def _why_shared(key: str) -> str:
    if key.startswith("distillation.teacher."):
        return "cannot be searched; all trials of a study share one teacher: run one study for each teacher"
    if key == "student.init":
        return "cannot be searched; all trials of a study share it: run one study for each"
    return "cannot be searched; all trials of a study share it, and it would change no result"


def _is_shape_of_shared(key: str, experiment: Experiment) -> bool:
    return key in SHAPES and experiment.student.init != "scratch"


def _why_idle(key: str, experiment: Experiment) -> str | None:
    """Why a setting changes nothing in this experiment; None if it changes something."""
    for section, matters, why in CONDITIONS:
        if _lies_in(key, section) and not matters(experiment):
            return _filled(why, experiment)
    return None


def _filled(why: str, experiment: Experiment) -> str:
    for key in field_keys():
        why = why.replace(f"{{{key}}}", str(experiment.get(key))) if f"{{{key}}}" in why else why
    return why


def _matters(key: str, distribution: Distribution, experiment: Experiment) -> bool:
    """Whether two values that the file names would make two different trials of this one."""
    if len({repr(value) for value in distribution.named}) == 1:
        return True  # one value fixes the key, which is no mistake
    seen = [
        effective(own) for value in distribution.named if (own := _with(experiment, {key: value})) is not None
    ]
    return len(seen) < 2 or any(settings != seen[0] for settings in seen[1:])


def _experiments(experiment: Experiment) -> list[Experiment | None]:
    combinations = combinations_of(experiment.search.space, COMBINATIONS)
    return [_with(experiment, {**values, "search.space": {}}) for values in combinations]


def _with(experiment: Experiment, overrides: dict) -> Experiment | None:
    try:
        return experiment.with_overrides(overrides)
    except ValidationError:
        return None


def _lies_in(key: str, section: str) -> bool:
    return key == section or key.startswith(section + ".")
