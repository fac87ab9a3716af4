"""Compares DeiT's augmentation with timm's PIL transforms, and measures its share of a training step.

- cpu_vs_timm, torch_cpu_vs_timm: DeiT's policy on 256 crops of 224 pixels, uint8 to uint8, as the stream
  applies it; compared with the transform of timm's prefetching loader (RandAugment on PIL images, then
  tensors; without collation).
- whole_vs_timm: from the same crops to a float batch that is erased, mixed and normalised. timm has two ways
  to do this, and its faster one counts: `pil` (ToTensor, Normalize, RandomErasing for each image) and
  `prefetcher` (the same operations on the batch).
- gpu_share_of_step: on a GPU, the share of augmentation, erasing and mixing in a training step. The step
  distils DeiT-S from a RegNetY-16GF by hard distillation.

Both sides leave out crop and flip. timm's PIL images are made from the crops before the clock starts. Each
CPU core has one process, which works on its share of the batch. All contenders run once in every round. The
fastest round of each contender counts, since other load disturbed it least.

    python bench/augment.py [--rounds N]

About 2 minutes on 2 CPU cores.
"""

import argparse
import multiprocessing
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_sample_images

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.record import record
from deit_ray.augment import erasing, kernel_cv2, kernel_torch, mixing
from deit_ray.augment.policy import Photometric
from deit_ray.experiment.config import Experiment
from deit_ray.models.student import create_student
from deit_ray.models.teacher import TeacherWeights
from deit_ray.training.step import Batch, Normalise, TrainStep

SIZE, BATCH, CLASSES, SEED = 224, 256, 1000, 0
CPU = torch.device("cpu")
EXPERIMENT = Experiment.model_validate(
    {
        "name": "bench",
        "data": {"uri": "none"},
        "distillation": {"teacher": {"weights": "none"}},
        "augment": {"place": "device"},
    }
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="how often each contender runs")
    rounds = parser.parse_args().rounds
    figures = measure_cpu(rounds)
    if torch.cuda.is_available():
        figures |= measure_share(torch.device("cuda"), EXPERIMENT, "regnety_160", BATCH, 5 * rounds)
    record("augment", {name: round(value, 4) for name, value in figures.items()})


def measure_cpu(rounds: int) -> dict[str, float]:
    """Seconds that each contender takes for a batch, and the ratios of timm's seconds to ours."""
    cores = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(cores), context.Queue()
    workers = [
        context.Process(target=take_turns, args=(rank, cores, rounds, barrier, results))
        for rank in range(cores)
    ]
    for worker in workers:
        worker.start()
    times_s = results.get()
    for worker in workers:
        worker.join()
    best = {name: min(values) for name, values in times_s.items()}
    return {
        "cpu_vs_timm": best["timm"] / best["cv2"],
        "torch_cpu_vs_timm": best["timm"] / best["torch"],
        "whole_vs_timm": min(best["timm_whole_pil"], best["timm_whole_prefetcher"]) / best["cv2_whole"],
        **{f"{name}_s": value for name, value in best.items()},
        "processes": cores,
        "load_before": os.getloadavg()[0],
    }


def take_turns(rank: int, cores: int, rounds: int, barrier, results) -> None:
    """Runs every contender in turn; all processes start each one together, and rank 0 reports the times."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    np.random.seed(rank)
    ids = np.array_split(np.arange(BATCH), cores)[rank]
    images, labels = crops(ids), torch.from_numpy(ids) % CLASSES
    contenders = {
        "cv2": lambda epoch: augment_by_cv2(images, photometric().stages(epoch, ids, ids, SIZE, SIZE)),
        "torch": lambda epoch: augment_by_torch(images, photometric().stages(epoch, ids, ids, SIZE, SIZE)),
        "cv2_whole": partial(augment_and_mix, images, labels, ids),
        **timms(images, labels),
    }
    times_s = {name: [] for name in contenders}
    for epoch in range(-1, rounds):  # the first round warms up
        for name, contender in contenders.items():
            barrier.wait()
            begin = time.perf_counter()
            contender(epoch % 2**16)
            barrier.wait()
            times_s[name].append(time.perf_counter() - begin)
    if rank == 0:
        results.put({name: values[1:] for name, values in times_s.items()})


def crops(ids: np.ndarray) -> np.ndarray:
    """A different part of one of two photographs for each id: uint8 [ids, SIZE, SIZE, 3]."""
    pictures, rng = load_sample_images().images, np.random.default_rng(SEED)
    corners = rng.integers(0, (427 - SIZE, 640 - SIZE), (BATCH, 2))
    return np.stack(
        [pictures[i % 2][y : y + SIZE, x : x + SIZE] for i, (y, x) in zip(ids, corners[ids], strict=True)]
    )


def photometric() -> Photometric:
    return Photometric.of(EXPERIMENT.augment, EXPERIMENT.data.mean, SEED)


def augment_and_mix(
    images: np.ndarray, labels: torch.Tensor, ids: np.ndarray, epoch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augments, erases, mixes and normalises as the stream and `Inputs` do."""
    chain, normalise = photometric(), Normalise(EXPERIMENT.data.mean, EXPERIMENT.data.std, CPU)
    pixels = (
        augment_by_cv2(images, chain.stages(epoch, ids, ids, SIZE, SIZE))
        .permute(0, 3, 1, 2)
        .float()
        .div_(255)
    )
    erasing.erase(
        pixels, SEED, epoch, ids, ids, chain.levels.random_erasing, normalise.mean[0], normalise.std[0]
    )
    one_view, every = np.zeros(len(ids), int), np.ones(len(ids), bool)
    mix = mixing.draw_batch(chain.levels, SEED, epoch, 0, one_view, every, SIZE, SIZE, CPU)
    return normalise(mix.images(pixels)), mix.targets(mixing.smooth_targets(labels, CLASSES, 0.1))


def augment_by_cv2(images: np.ndarray, stages) -> torch.Tensor:
    augmented = images.copy()
    kernel_cv2.augment_images(augmented, stages)
    return torch.from_numpy(augmented)


def augment_by_torch(images: np.ndarray, stages) -> torch.Tensor:
    return kernel_torch.augment_images(torch.from_numpy(images), stages)


def timms(images: np.ndarray, labels: torch.Tensor) -> dict:
    """timm's transforms for DeiT, without crop and flip, by contender."""
    from PIL import Image
    from timm.data import Mixup
    from timm.data.loader import fast_collate
    from timm.data.random_erasing import RandomErasing
    from timm.data.transforms_factory import transforms_imagenet_train

    pictures = [Image.fromarray(image) for image in images]
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    erase = RandomErasing(0.25, mode="pixel", max_count=1, device="cpu")
    mean, std = (
        255 * torch.tensor(values).view(1, 3, 1, 1) for values in (EXPERIMENT.data.mean, EXPERIMENT.data.std)
    )
    arguments = {
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "interpolation": "bicubic",
        "re_prob": 0.25,
        "re_mode": "pixel",
        "separate": True,
    }
    _, randaugment, to_tensor = transforms_imagenet_train(SIZE, **arguments)
    _, _, to_bytes = transforms_imagenet_train(SIZE, use_prefetcher=True, **arguments)

    def pil(_):
        return mixup(torch.stack([to_tensor(randaugment(picture)) for picture in pictures]), labels)

    def prefetcher(_):
        batch, _ = fast_collate([(to_bytes(randaugment(picture)), 0) for picture in pictures])
        return mixup(erase(batch.float().sub_(mean).div_(std)), labels)

    def policy(_):
        return [to_bytes(randaugment(picture)) for picture in pictures]

    return {"timm": policy, "timm_whole_pil": pil, "timm_whole_prefetcher": prefetcher}


def measure_share(
    device: torch.device, experiment: Experiment, teacher: str, batch: int, steps: int
) -> dict[str, float]:
    """Seconds of a whole step and of its `Inputs` alone (augmentation, conversion, erasing, mixing).

    The weights are random.
    """
    import timm

    size = experiment.data.image_size
    model = create_student(experiment.student, size, CLASSES).to(device)
    weights = TeacherWeights(
        teacher, {"num_classes": CLASSES}, timm.create_model(teacher).state_dict(), [0.5] * 3, [0.5] * 3
    )
    step, ids = TrainStep(experiment, model, model, weights, CLASSES, 1000, 0, device), np.arange(batch)
    tensors = {
        "images": torch.from_numpy(np.resize(crops(ids % BATCH), (batch, size, size, 3))).to(device),
        "labels": torch.from_numpy(ids % CLASSES).to(device),
        "valid": torch.ones(batch, device=device),
    }
    samples = Batch(tensors, ids, np.zeros_like(ids), 0)
    whole_s = seconds_each(lambda number: step(samples, number), steps, device)
    augment_s = seconds_each(lambda number: step.inputs(samples, number), steps, device)
    return {"gpu_share_of_step": augment_s / whole_s, "gpu_step_s": whole_s, "gpu_augment_s": augment_s}


def seconds_each(run, times: int, device: torch.device) -> float:
    for number in range(3):
        run(number)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    for number in range(times):
        run(number)
    wait()
    return (time.perf_counter() - begin) / times


if __name__ == "__main__":
    main()
