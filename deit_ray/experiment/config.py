"""An experiment: one YAML file, validated into one `Experiment` object before anything starts.

Defaults that come from a paper or its reference code say so:
[DeiT] is Touvron et al. 2021, arXiv:2012.12877, table 9; [ref] is facebookresearch/deit, main.py.
"""

import copy
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from deit_ray.experiment.space import Distribution, check_space


def _rising(pair: list[float]) -> list[float]:
    if pair[0] > pair[1]:
        raise ValueError("the first number must not be above the second")
    return pair


def _policy(name: str) -> str:
    if name not in POLICIES and not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise ValueError(f"must be one of {', '.join(POLICIES)}, or package.module:function")
    return name


POLICIES = ("randaugment", "three_augment", "none")
Unit = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Area = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Areas = Annotated[list[Area], Field(min_length=2, max_length=2), AfterValidator(_rising)]
Ratios = Annotated[list[Positive], Field(min_length=2, max_length=2), AfterValidator(_rising)]
Means = Annotated[list[float], Field(min_length=3, max_length=3)]
Deviations = Annotated[list[Positive], Field(min_length=3, max_length=3)]
# a run's folder is its name and a number, and a file system allows 255 bytes
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=240)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Data(Section):
    """Which images, how they are cropped, and the CPUs that the stream may use."""

    uri: str  # a folder that `deit-ray data prepare` wrote: a path, or file://, s3://, gs://
    image_size: Annotated[int, Field(ge=8, le=1024)] = 224  # pixels of the student's images [DeiT]
    holdout: Annotated[float, Field(ge=0, le=0.5)] = 0.1  # fraction of the training images kept as `val`
    crop_scale: Areas = [0.08, 1.0]  # area of a crop, as a fraction of the image's [ref]
    crop_ratio: Ratios = [0.75, 4 / 3]  # width of a crop over its height
    flip: Unit = 0.5  # probability of a horizontal flip [ref]
    # repeated augmentation: crops of an image in one epoch, which takes 1/views of the images [DeiT]
    views: Count = 3
    # evaluation resizes the short side to image_size / eval_crop, then crops the centre [ref]
    eval_crop: Area = 0.875
    mean: Means = [0.485, 0.456, 0.406]  # the student's normalisation [ref]
    std: Deviations = [0.229, 0.224, 0.225]
    max_bad: Unit = 0.001  # a trial fails when a larger fraction of its images cannot be decoded
    cpus_per_worker: Positive = 1.0  # CPUs of the stream (decode, crop) for each training worker


class RandAugment(Section):
    """Operations drawn for each image; see docs/augmentation.md."""

    # mean of a normal distribution with standard deviation 0.5 [DeiT]
    magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    num_ops: Annotated[int, Field(ge=0, le=8)] = 2  # [ref]
    p: Unit = 0.5  # probability that a drawn operation is applied [ref]


class Augment(Section):
    """Photometric augmentation and mixing, scaled together by `strength`; crops and flips are not scaled."""

    strength: Annotated[float, Field(ge=0, le=2)] = 1.0  # 0 none, 1 the values below, 2 the strongest
    # auto: on the device if it is a GPU, else in Ray Data's tasks
    place: Literal["auto", "stream", "device"] = "auto"
    # randaugment [DeiT], three_augment, none, or package.module:function
    policy: Annotated[str, AfterValidator(_policy)] = "randaugment"
    randaugment: RandAugment = RandAugment()
    # brightness, contrast and saturation change by a factor in 1 +- this; for three_augment and none [ref]
    color_jitter: Unit = 0.3
    force_color_jitter: bool = False  # applies color_jitter with any policy
    random_erasing: Unit = 0.25  # probability [DeiT]
    mixup: NotNegative = 0.8  # alpha of the Beta distribution, 0 is off [DeiT]
    cutmix: NotNegative = 1.0  # [DeiT]
    mixup_switch: Unit = 0.5  # probability of cutmix where both are on [ref]


class Student(Section):
    """The model that learns: any timm classifier; `deit_*_distilled_*` has the distillation token."""

    model: str = "deit_small_distilled_patch16_224"
    init: str = "scratch"  # scratch, pretrained, or the path of a model.safetensors
    patch_size: Count | None = None  # these four replace the architecture's own, for small images
    width: Count | None = None
    depth: Count | None = None
    heads: Count | None = None
    drop_path: BelowOne = 0.1  # stochastic depth [DeiT]
    # the rate rises from 0 in the first block to drop_path in the last [DeiT], or is drop_path in all [III]
    drop_path_rule: Literal["linear", "uniform"] = "linear"
    # first factors of LayerScale, such as 1e-4 (arXiv:2103.17239); by default the architecture's own, if any
    layer_scale: Positive | None = None


class Teacher(Section):
    """The frozen model from which the student learns."""

    weights: str  # run:NAME (the newest finished run of that name), pretrained, or the path of a file
    model: str | None = None  # timm's name; not needed for run: and for files that deit-ray wrote
    mean: Means | None = None  # normalisation of its images; by default the file's, or timm's
    std: Means | None = None


class Distillation(Section):
    kind: Literal["hard", "soft", "none"] = "hard"  # [DeiT] equations 2 and 3
    weight: Unit = 0.5  # weight of the teacher's loss against the labels' [DeiT], which has 0.1 for soft
    temperature: Positive = 3.0  # tau, soft only [DeiT]
    # KL over batch x classes [ref], or over the batch (timm)
    soft_mean: Literal["elements", "batch"] = "elements"
    # the teacher's image: the student's [DeiT], or its crop before augment.policy and erasing
    teacher_view: Literal["student", "crop"] = "student"
    teacher: Teacher | None = None

    @property
    def teacher_sees_crops(self) -> bool:
        return self.kind != "none" and self.teacher_view == "crop"


class Optim(Section):
    """AdamW with linear warm-up and a cosine [DeiT]; [III] is DeiT III, arXiv:2204.07118."""

    lr: Positive = 5e-4  # [DeiT]
    scale_lr: bool = True  # lr x batch_size / 512 [DeiT]
    kind: Literal["adamw", "lamb"] = "adamw"  # [DeiT], and [III]
    weight_decay: NotNegative = 0.05  # [DeiT]
    warmup_epochs: CountOrZero = 5  # [DeiT]
    warmup_lr: NotNegative = 1e-6  # [ref]
    min_lr: NotNegative = 1e-5  # [ref]
    clip_grad: Positive | None = None  # largest gradient norm; null does not clip [ref]
    # epochs of the cosine, by default train.epochs; after it the rate stays at min_lr
    schedule_epochs: Count | None = None
    schedule_per: Literal["step", "epoch"] = "step"  # how often the rate changes; epoch as in timm
    # the labels' loss: cross entropy [DeiT], or binary cross entropy with every mixed class a target [III]
    label_loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    label_smoothing: BelowOne = 0.1  # [DeiT]
    ema_decay: BelowOne = 0.99996  # 0 is off [ref]
    # none: the decay is constant [ref]. ramp: at step t at most (1 + t) / (10 + t), for runs of few steps
    ema_warmup: Literal["none", "ramp"] = "none"

    def peak_lr(self, batch_size: int) -> float:
        """The peak learning rate: lr x batch / 512 with `scale_lr` (DeiT, section 6), otherwise lr."""
        return self.lr * batch_size / 512 if self.scale_lr else self.lr


class Train(Section):
    epochs: Count = 300  # [DeiT]
    batch_size: Count = 1024  # global, over all workers [DeiT]
    workers: Count = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where the cluster has GPUs
    # auto: bfloat16 autocast where the device has it
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # whether PyTorch compiles student and teacher: seconds to minutes at the start, then faster steps whose
    # last bits differ. auto: on a GPU, unless compiling fails there
    compile: Literal["auto", "always", "never"] = "auto"
    threads: Count = 1  # of torch on the CPU; one thread and two differ in the last bits
    cpus_per_worker: Positive = 1.0
    # part of a GPU that a worker takes, on cuda: with 0.5, two trials share one. Below 1 only with one worker
    gpus_per_worker: Area = 1.0
    eval_every: Count = 1  # epochs between evaluations, each with a checkpoint
    log_every: Count = 10  # steps between points of the training curves
    max_failures: CountOrZero = 3  # times that a killed worker resumes from its checkpoint


class Budget(Section):
    """Limits that end a study before `search.trials`; open trials are cancelled. A resume keeps counting."""

    hours: Positive | None = None  # wall time in which the study's driver ran
    gpu_hours: Positive | None = None  # of all trials together
    target: float | None = None  # a value of search.metric that is good enough
    patience: Count | None = None  # trials in a row that ended without a new best value
    failures: Count | None = None  # failed trials
    # trials that failed with the same traceback; losses that are not finite do not count
    same_failure: Count | None = 5


class Cost(Section):
    """Prices and speeds for the estimate of `deit-ray plan`."""

    per_gpu_hour: NotNegative | None = None  # money
    # speed of one worker; by default the speed of the newest run of such a student
    images_per_s: Positive | None = None


class Search(Section):
    """How a study searches. A single run uses only `metric`, which chooses its best model."""

    trials: Count = 20
    metric: Literal["val/top1", "val/top1_cls", "val/top1_dist", "val/top1_ema", "val/top5", "test/top1"] = (
        "val/top1"
    )
    sampler: Literal["tpe", "random"] = "tpe"
    scheduler: Literal["asha", "median", "none"] = "asha"
    grace_epochs: Count = 5  # no trial is stopped before this epoch
    reduction_factor: Annotated[int, Field(ge=2)] = 2  # asha: one trial in this many survives a rung
    budget: Budget = Budget()
    max_concurrent: Count | None = None  # by default as many as fit
    rank_on_test: bool = False  # must be true to rank on the test images, which are then no independent test
    space: dict[str, Distribution] = {}


class Tracking(Section):
    uri: str | None = None  # URI of MLflow; by default a SQLite file next to the results
    experiment: str = "deit_ray"


class Results(Section):
    uri: str = "results"  # a folder, or s3://, gs://; every node must reach it
    # checkpoints that a study keeps when it has ended: those of its best five trials, or all. Every trial
    # keeps its model and its journal
    keep: Literal["best", "all"] = "best"


class Experiment(Section):
    """All settings of one training run or study. See `deit_ray.load_experiment`."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: Data
    augment: Augment = Augment()
    student: Student = Student()
    distillation: Distillation = Distillation()
    optim: Optim = Optim()
    train: Train = Train()
    search: Search = Search()
    cost: Cost = Cost()
    tracking: Tracking = Tracking()
    results: Results = Results()

    @model_validator(mode="after")
    def _check_together(self):
        """Refuses settings that do not fit together."""
        self._check_training()
        if self.search.space:
            self._check_ranking()
        check_space(self, field_keys())
        return self

    def _check_training(self) -> None:
        _require(
            self.train.batch_size % self.train.workers == 0,
            "train.batch_size",
            f"{self.train.batch_size} is global, and must be divisible by train.workers "
            f"({self.train.workers})",
        )
        _require(
            self.train.gpus_per_worker == 1 or self.train.workers == 1,
            "train.gpus_per_worker",
            f"{self.train.gpus_per_worker:g} needs train.workers 1, not {self.train.workers}: NCCL refuses "
            "two workers of a run on one GPU; set it to 1, or train.workers to 1",
        )
        length = "optim.schedule_epochs" if self.optim.schedule_epochs else "train.epochs"
        _require(
            self.optim.warmup_epochs < self.get(length),
            "optim.warmup_epochs",
            f"{self.optim.warmup_epochs} must be below {length} ({self.get(length)}), "
            "the length of the schedule that it begins",
        )
        _require(
            self.optim.label_loss != "bce" or self.optim.label_smoothing == 0,
            "optim.label_smoothing",
            f"{self.optim.label_smoothing} makes every class a target of optim.label_loss bce; set it to 0",
        )
        _require(
            self.search.metric != "val/top1_ema" or self.optim.ema_decay > 0,
            "search.metric",
            "'val/top1_ema' is not measured with optim.ema_decay 0, which keeps no moving average",
        )
        _require(
            not self.distils or self.distillation.teacher is not None,
            "distillation.teacher",
            f"missing, but distillation.kind is {self.distillation.kind}; name one (weights: run:NAME, "
            "pretrained or a path) or set distillation.kind to none",
        )

    def _check_ranking(self) -> None:
        """Refuses a ranking metric that is not measured, or not early enough."""
        search, split = self.search, self.search.metric.partition("/")[0]
        _require(
            split != "test" or search.rank_on_test,
            "search.metric",
            f"{search.metric!r} would rank trials on the test images, which are then no independent test; "
            "use val/top1, or set search.rank_on_test: true",
        )
        _require(
            split != "val" or self.data.holdout > 0,
            "data.holdout",
            "0 leaves no val images to rank a search on; allowed: above 0, at most 0.5",
        )
        _require(
            search.scheduler == "none" or search.grace_epochs <= self.train.epochs,
            "search.grace_epochs",
            f"{search.grace_epochs} is above train.epochs ({self.train.epochs})",
        )

    @property
    def distillation_kinds(self) -> list[str]:
        """Every kind of distillation that a run or a trial of this experiment may use."""
        searched = self.search.space.get("distillation.kind")
        return searched.values if searched else [self.distillation.kind]

    @property
    def policies(self) -> list[str]:
        """All values that augment.policy may take in a study."""
        searched = self.search.space.get("augment.policy")
        return searched.values if searched else [self.augment.policy]

    @property
    def distils(self) -> bool:
        """Whether a teacher is needed."""
        return any(kind != "none" for kind in self.distillation_kinds)

    def with_overrides(self, overrides: dict[str, Any]) -> "Experiment":
        """This experiment with dotted keys replaced, validated again.

        Raises:
            pydantic.ValidationError: a key does not exist or a value is not allowed.
        """
        tree = self.as_dict()
        for key, value in overrides.items():
            set_key(tree, key, value)
        return Experiment.model_validate(tree)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in an experiment file."""
        return self.model_dump(mode="json")

    def get(self, key: str) -> Any:
        """The value of a dotted key; None for a key of a section that is none, as a missing teacher is."""
        value = self
        for part in key.split("."):
            value = None if value is None else getattr(value, part)
        return value


def _require(holds: bool, key: str, message: str) -> None:
    if not holds:
        raise ValueError(f"{key}: {message}")


def set_key(tree: dict, key: str, value: Any) -> None:
    """Sets a dotted key in nested mappings, and creates missing mappings."""
    if key.startswith("search.space."):
        path, leaf = ["search", "space"], key.removeprefix("search.space.")  # its keys are dotted themselves
    else:
        *path, leaf = key.split(".")
    for part in path:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[leaf] = copy.deepcopy(value)  # a later key may lie in it, and it is the caller's


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; the value of a searched key is its distribution."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and prefix != "search.space.":
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def field_keys(model=Experiment, prefix: str = "") -> list[str]:
    """All dotted keys that an experiment file can set."""
    keys = []
    for name, field in model.model_fields.items():
        section = _section_of(field.annotation)
        keys += [prefix + name] + (field_keys(section, f"{prefix}{name}.") if section else [])
    return keys


def _section_of(annotation):
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
