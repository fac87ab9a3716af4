"""Measures the whole training step beside timm's, and how much of a GPU's arithmetic a step uses.

The step: DeiT-Ti, -S or -B at 224 pixels, hard distillation from a convolutional teacher (RegNetY-16GF on a
GPU, RegNetY-200MF on a CPU), 1,000 classes, random weights, synthetic images in the device's memory.

- ours: `TrainStep`, from uint8 images: erasing, mixup or cutmix, smoothing, both normalisations, student,
  teacher, loss, AdamW, moving average. On a GPU, RandAugment on the device too, as in a training run there.
- timm: the same step as in timm's train.py (1.0.31) with the arguments of DeiT's recipe: `PrefetchLoader`
  (conversion, normalisation and erasing, on a side stream of a GPU), `TokenDistillationTask`,
  `SoftTargetCrossEntropy`, AdamW and `ModelEmaV3`, in the order of `train_one_epoch`, which also reads the
  loss in every step. RandAugment, mixup and the soft targets are not in the time, since train.py's loader
  makes them on the CPU.
- timm_compiled: the same with --torchcompile.
- timm_compiled_channels_last, with --all: also with --channels-last.
- ours_not_compiled, with --all: ours with train.compile never.

On a GPU, ours is compiled, as with train.compile auto; compiling that fails is an error here.

On a GPU, all of them compute in bfloat16 (timm with --amp --amp-dtype bfloat16, which is faster than its
default, float16, since it needs no loss scaling). On a CPU, they compute in float32, by default with one
thread, as train.threads; on a busy machine, the threads of an operation wait for each other.

The contenders take turns: each makes the same number of steps in every round. A ratio is the median of the
rounds' ratios. A batch of one contender is never another's, and every contender has batches of its own.

- cpu_vs_timm (DeiT-Ti), gpu_vs_timm and gpu_vs_timm_compiled (DeiT-S): our images/s over timm's.
- mfu_deit_b: DeiT-B without a teacher. Three times the FLOPs of a forward pass, which torch counts, over
  the time of a step and the card's dense bfloat16 peak. `mfu_of_matmul_deit_b` has the measured rate of a
  product of two 8192 x 8192 matrices as its denominator instead of the peak.

    python bench/step.py [--models NAME...] [--batch N] [--rounds N] [--steps N] [--threads N] [--all]
                          [--tiny]

About 4 minutes on 2 CPU cores. --tiny: a small student at 32 pixels on the CPU, to see that everything runs;
nothing is recorded.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data.loader import PrefetchLoader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import TokenDistillationTask
from timm.task.distillation import DistillationTeacher
from timm.utils import AverageMeter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.record import record  # noqa: E402
from deit_ray.augment import mixing  # noqa: E402
from deit_ray.experiment.config import Experiment  # noqa: E402
from deit_ray.models.shapes import count_multiply_adds  # noqa: E402
from deit_ray.models.student import create_student, model_arguments  # noqa: E402
from deit_ray.models.teacher import TeacherWeights  # noqa: E402
from deit_ray.training.step import Batch, TrainStep  # noqa: E402

CLASSES = 1000
BATCHES = 4  # different batches of a contender, one after the other
STUDENTS = {
    "deit_ti": "deit_tiny_distilled_patch16_224",
    "deit_s": "deit_small_distilled_patch16_224",
    "deit_b": "deit_base_distilled_patch16_224",
}
PLAIN_DEIT_B = "deit_base_patch16_224"
# FLOP/s of dense bfloat16 products, from NVIDIA's data sheets (which give them with sparsity, twice as many)
PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
MATRIX = 8192


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all contenders of a comparison have in common.

    Attributes:
        device: of the step.
        student, teacher: timm's names; without a teacher nothing is distilled.
        size: side of the images in pixels.
        batch: images of a step.
        arguments: further arguments of the student, as in the experiment's `student` section.
    """

    device: torch.device
    student: str
    teacher: str | None
    size: int
    batch: int
    arguments: dict = dataclasses.field(default_factory=dict)

    @property
    def experiment(self) -> Experiment:
        """DeiT's recipe: the defaults of an experiment."""
        kind = "hard" if self.teacher else "none"
        return Experiment.model_validate(
            {
                "name": "step",
                "data": {"uri": "none", "image_size": self.size},
                "student": {"model": self.student} | self.arguments,
                "distillation": {"kind": kind, "teacher": {"weights": "none"}},
                "train": {"batch_size": self.batch},
            }
        )

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def images(self, seed: int) -> torch.Tensor:
        """Noise, uint8 [BATCHES, batch, size, size, 3], on the device."""
        generator = torch.Generator().manual_seed(seed)
        shape = (BATCHES, self.batch, self.size, self.size, 3)
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(self.device)

    @property
    def labels(self) -> torch.Tensor:
        return (torch.arange(self.batch) % CLASSES).to(self.device)


CPU = Setting(torch.device("cpu"), STUDENTS["deit_ti"], "regnety_002", 224, 8)
TINY = Setting(CPU.device, STUDENTS["deit_ti"], "regnety_002", 32, 4, {"depth": 2, "patch_size": 8})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=STUDENTS, help="by default deit_ti, on a GPU deit_s")
    parser.add_argument("--batch", type=int, help="images of a step; by default 8, on a GPU 256")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, help="steps in a round; by default 2, on a GPU 10")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for all contenders")
    parser.add_argument("--all", action="store_true", help="all models, and timm's --channels-last")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.tiny:
        with quick_compiler():
            print(compare(TINY, "cpu", arguments.rounds, 1, compiled=True) | measure_mfu(TINY, 1))
        return
    on_gpu = torch.cuda.is_available()
    names = arguments.models or (list(STUDENTS) if arguments.all else ["deit_s" if on_gpu else "deit_ti"])
    figures = {}
    for name in names:
        setting, steps = (gpu_setting(name), 10) if on_gpu else (CPU, 2)
        setting = dataclasses.replace(setting, student=STUDENTS[name], batch=arguments.batch or setting.batch)
        measured = compare(
            setting,
            "gpu" if on_gpu else "cpu",
            arguments.rounds,
            arguments.steps or steps,
            compiled=on_gpu,
            more=on_gpu and arguments.all,
        )
        figures |= {(key if len(names) == 1 else f"{key}_{name}"): value for key, value in measured.items()}
    if on_gpu:
        figures |= measure_mfu(gpu_setting("deit_b"), 20)
    else:
        figures["threads"] = arguments.threads
    record("step", figures)


def quick_compiler():
    """A context in which torch.compile makes no machine code. Everything else is as without it."""
    return torch.compiler.set_stance(force_backend="eager")


def gpu_setting(name: str) -> Setting:
    return Setting(torch.device("cuda"), STUDENTS[name], "regnety_160", 224, 256)


# The comparison with timm


def compare(
    setting: Setting,
    prefix: str,
    rounds: int,
    steps: int,
    compiled: bool = False,
    more: bool = False,
) -> dict[str, float]:
    """Images/s of all contenders, and the ratios of ours to each of timm's.

    Args:
        prefix: cpu or gpu, the beginning of the ratios' names.
        rounds, steps: each contender makes `steps` steps in each round.
        compiled: compiles our step, and adds timm_compiled.
        more: adds timm_compiled_channels_last and ours_not_compiled.
    """
    torch.compiler.reset()  # so that no other comparison's code counts towards the limit of variants
    contenders = {"ours": our_step(setting, compiled), "timm": timm_step(setting)}
    if compiled:
        contenders["timm_compiled"] = timm_step(setting, compiled)
    if more:
        contenders["ours_not_compiled"] = our_step(setting)
        contenders["timm_compiled_channels_last"] = timm_step(setting, compiled, channels_last=True)
    seconds = take_turns(contenders, rounds, steps, setting.device)
    figures = {}
    for name, ratios in ratios_to(seconds, "ours").items():
        figures |= {
            f"{prefix}_vs_{name}": round(statistics.median(ratios), 3),
            f"{prefix}_vs_{name}_quartiles": [round(value, 3) for value in quartiles(ratios)],
        }
    for name, values in seconds.items():
        figures[f"{name}_images_per_s"] = round(setting.batch * steps / statistics.median(values), 1)
    return figures | {"student": setting.student, "teacher": setting.teacher, "batch": setting.batch}


def take_turns(
    contenders: dict[str, Callable[[], None]], rounds: int, steps: int, device: torch.device
) -> dict[str, list[float]]:
    """The seconds of each contender in each round. The order changes from round to round."""
    for step in contenders.values():
        for _ in range(3):
            step()
    seconds = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        for name in order:
            synchronize(device)
            begin = time.perf_counter()
            for _ in range(steps):
                contenders[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
        order.append(order.pop(0))
    return seconds


def ratios_to(seconds: dict[str, list[float]], ours: str) -> dict[str, list[float]]:
    """For each other contender, its seconds over ours in each round."""
    return {
        name: [theirs / own for theirs, own in zip(values, seconds[ours], strict=True)]
        for name, values in seconds.items()
        if name != ours
    }


def quartiles(values: list[float]) -> tuple[float, float]:
    return tuple(np.percentile(values, (25, 75)).tolist())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# Our step


def our_step(setting: Setting, compiled: bool = False) -> Callable[[], None]:
    """Makes `TrainStep` as a worker does; each call of the result is one step."""
    train_step = make_train_step(setting, {"train.compile": "always" if compiled else "never"})
    batches = our_batches(setting)
    steps = iter(range(10**9))

    def step() -> None:
        number = next(steps)
        train_step(batches[number % BATCHES], number)

    return step


def make_train_step(setting: Setting, keys: dict | None = None) -> TrainStep:
    """A `TrainStep` with random weights, of the setting's experiment with some keys replaced."""
    torch.manual_seed(0)
    experiment = setting.experiment.with_overrides(keys or {})
    model = create_student(experiment.student, setting.size, CLASSES).to(setting.device)
    teacher = None
    if setting.teacher:
        made = timm.create_model(setting.teacher, num_classes=CLASSES)
        mean, std = (list(made.pretrained_cfg[key]) for key in ("mean", "std"))
        teacher = TeacherWeights(setting.teacher, {"num_classes": CLASSES}, made.state_dict(), mean, std)
    return TrainStep(experiment, model, model, teacher, CLASSES, 1000, 0, setting.device)


def our_batches(setting: Setting) -> list[Batch]:
    ids = np.arange(setting.batch)
    valid = torch.ones(setting.batch, device=setting.device)
    return [
        Batch({"images": images, "labels": setting.labels, "valid": valid}, ids, np.zeros_like(ids), 0)
        for images in setting.images(seed=1)
    ]


# timm's step


def timm_step(setting: Setting, compiled: bool = False, channels_last: bool = False) -> Callable[[], None]:
    """The step of timm's train.py; each call of the result is one step.

    As train.py --amp --amp-dtype bfloat16 (GPU only) --opt adamw --weight-decay 0.05 --drop-path 0.1
    --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --reprob 0.25 --remode pixel --model-ema
    --model-ema-decay 0.99996 --kd-distill-type token --kd-token-distill-type hard --task-loss-weight 0.5
    """
    torch.manual_seed(0)
    if setting.on_gpu:  # as main() does
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    task = timm_task(setting, channels_last)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=5e-4, weight_decay=0.05)
    task.setup_ema(decay=0.99996)
    if compiled:
        task.compile()
        task.compile_ema()
    autocast = partial(torch.autocast, setting.device.type, torch.bfloat16, enabled=setting.on_gpu)
    losses = AverageMeter()
    loader = timm_batches(setting)
    numbers = iter(range(1, 10**9))
    task.get_trainable_module().train()
    optimizer.zero_grad()

    def step() -> None:
        images, targets = next(loader)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast():
            loss = task(images, targets)["loss"]
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), len(images))
        optimizer.zero_grad()
        task.update_ema(step=next(numbers))

    return step


def timm_task(setting: Setting, channels_last: bool) -> TokenDistillationTask:
    student = setting.experiment.student
    arguments = model_arguments(student, setting.size, CLASSES)
    model = timm.create_model(student.model, drop_path_rate=student.drop_path, **arguments)
    model.to(setting.device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    # train.py names the teacher, and the task downloads its weights; these are random
    teacher = timm.create_model(setting.teacher, num_classes=CLASSES).to(setting.device)
    return TokenDistillationTask(
        student_model=model,
        teacher_model=DistillationTeacher(teacher, device=setting.device),
        criterion=SoftTargetCrossEntropy().to(setting.device),
        distill_type="hard",
        task_loss_weight=0.5,
        device=setting.device,
        verbose=False,
    )


def timm_batches(setting: Setting) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of train.py's loader, whose workers have made uint8 images and soft targets."""
    images = setting.images(seed=2).permute(0, 1, 4, 2, 3).contiguous()
    smooth = mixing.smooth_targets(setting.labels, CLASSES, 0.1)
    targets = 0.7 * smooth + 0.3 * smooth.flip(0)  # as mixup makes them

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        number = 0
        while True:
            yield images[number % BATCHES], targets
            number += 1

    return iter(PrefetchLoader(batches(), device=setting.device, re_prob=0.25, re_mode="pixel"))


# The use of a GPU's arithmetic


def measure_mfu(setting: Setting, steps: int) -> dict[str, float]:
    """The share of a card's peak that the steps of a student without teacher and distillation token use."""
    if setting.on_gpu:
        setting = dataclasses.replace(setting, student=PLAIN_DEIT_B)
    setting = dataclasses.replace(setting, teacher=None)
    arguments = model_arguments(setting.experiment.student, setting.size, CLASSES)
    forward = 2 * setting.batch * count_multiply_adds(setting.student, arguments, setting.size)
    flops = 3 * forward * steps
    step = our_step(setting, compiled=setting.on_gpu)
    seconds = min(take_turns({"ours": step}, 3, steps, setting.device)["ours"])
    matmul = matmul_rate(setting.device, MATRIX if setting.on_gpu else 512)
    figures = {
        "mfu_of_matmul_deit_b": round(flops / seconds / matmul, 3),
        "matmul_tflop_per_s": round(matmul / 1e12, 3),
        "deit_b_images_per_s": round(setting.batch * steps / seconds, 1),
        "deit_b_step_tflop": round(flops / steps / 1e12, 4),
    }
    peak = peak_rate(torch.cuda.get_device_name()) if setting.on_gpu else None
    return figures | ({"mfu_deit_b": round(flops / seconds / peak, 3)} if peak else {})


def matmul_rate(device: torch.device, size: int) -> float:
    """FLOP/s of the product of two square bfloat16 matrices of random numbers."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = min(take_turns({"matmul": lambda: torch.mm(a, b)}, 5, 10, device)["matmul"])
    return 10 * 2 * size**3 / seconds


def peak_rate(card: str) -> float | None:
    """FLOP/s of a card's dense bfloat16 products; None if its data sheet is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in card), None)


if __name__ == "__main__":
    main()
