"""Evaluation. Every image counts exactly once, over any number of workers."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn

from deit_ray.models.student import head_logits
from deit_ray.training.step import Batch, Normalise

TOP5_FROM = 6  # classes; with five or fewer, top5 would always be 1

Answered = dict[str, np.ndarray]  # see `evaluate`


def metric_names(classes: int, two_heads: bool, has_ema: bool) -> list[str]:
    """The accuracies that `evaluate` measures, without the split."""
    names = ["top1", *(["top5"] if classes >= TOP5_FROM else [])]
    return [*names, *(["top1_cls", "top1_dist"] if two_heads else []), *(["top1_ema"] if has_ema else [])]


@torch.no_grad()
def evaluate(
    split: str,
    model: nn.Module,
    ema: nn.Module | None,
    batches: Iterator,
    steps: int,
    normalise: Normalise,
    autocast,
    balanced: bool = False,
    answered: list[Answered] | None = None,
) -> dict[str, float]:
    """Evaluates a model on the next batches of the stream, together with all other workers.

    Args:
        split: val or test, the prefix of the metrics' names.
        model: the student. Its mode (training or evaluation) is restored afterwards.
        ema: the student's moving average, or None.
        batches: this rank's `Samples`. Padding is marked invalid.
        steps: number of batches that belong to this evaluation.
        normalise: the student's normalisation.
        autocast: a context manager for the forward passes.
        balanced: whether top1_balanced is measured too.
        answered: takes, for each batch, this rank's answers as arrays [valid samples]: id, label, answer (the
            most likely class), probability (of the answer) and of_label (probability of the label).

    Returns:
        Metrics by name, with the split as prefix: top1 (a fraction), top5 where there are more than five
        classes, and loss, all of the fused logits; top1_balanced, the mean of each class's top1, over the
        classes that have images; top1_cls and top1_dist of the two heads; top1_ema of the moving average's
        fused logits; images, the number of images counted.
    """
    device = normalise.mean.device
    sums: dict[str, torch.Tensor] = {}
    by_class: torch.Tensor | None = None
    was_training = model.training
    model.eval()
    for _ in range(steps):
        batch = Batch.of(next(batches), device)
        images = normalise(batch.images.permute(0, 3, 1, 2).float() / 255)
        with autocast:
            logits = head_logits(model, images)
            if ema is not None:
                logits["ema"] = head_logits(ema.eval(), images)["fused"]
        for name, value in _count(logits, batch).items():
            sums[name] = sums.get(name, 0) + value
        if balanced:
            counted = _count_classes(logits["fused"].float(), batch)
            by_class = counted if by_class is None else by_class + counted
        if answered is not None:
            answered.append(_answers(logits["fused"].float(), batch))
    model.train(was_training)
    totals = torch.stack(list(sums.values()))
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(totals)
    totals = dict(zip(sums, totals.tolist(), strict=True))
    images = totals.pop("images")
    metrics = {f"{split}/{name}": value / max(images, 1) for name, value in totals.items()}
    if by_class is not None:
        metrics[f"{split}/top1_balanced"] = _balance(by_class)
    return metrics | {f"{split}/images": images}


def _count(logits: dict[str, torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
    """Sums over the valid samples of a batch, by name."""
    valid, labels = batch.valid.double(), batch.labels
    fused = logits["fused"].float()
    sums = {"images": valid.sum(), "top1": _correct(fused, labels, 1, valid)}
    if fused.shape[1] >= TOP5_FROM:
        sums["top5"] = _correct(fused, labels, 5, valid)
    sums["loss"] = (F.cross_entropy(fused, labels, reduction="none") * valid).sum()
    for head in logits.keys() - {"fused"}:
        sums[f"top1_{head}"] = _correct(logits[head].float(), labels, 1, valid)
    return dict(sorted(sums.items()))


def _correct(logits_BC: torch.Tensor, labels_B: torch.Tensor, k: int, valid_B: torch.Tensor) -> torch.Tensor:
    """The number of valid samples whose label is among the k largest logits."""
    hit = (logits_BC.topk(k, dim=1).indices == labels_B[:, None]).any(1)
    return (hit * valid_B).sum()


def _count_classes(logits_BC: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The valid samples of each class, and those answered correctly: float64 [2, classes]."""
    valid_B = batch.valid.double()
    hits_B = (logits_BC.argmax(1) == batch.labels) * valid_B
    counts_2C = torch.zeros(2, logits_BC.shape[1], dtype=torch.float64, device=logits_BC.device)
    return counts_2C.index_add_(1, batch.labels, torch.stack([valid_B, hits_B]))


def _balance(counts_2C: torch.Tensor) -> float:
    """The mean of the accuracies of all classes that have images, over all workers."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts_2C)
    images_C, hits_C = counts_2C
    present_C = images_C > 0
    return (hits_C[present_C] / images_C[present_C]).mean().item()


def _answers(logits_BC: torch.Tensor, batch: Batch) -> Answered:
    """The answers of a batch; see `evaluate`."""
    probabilities_BC = logits_BC.softmax(1)
    probability_B, answer_B = probabilities_BC.max(1)
    of_label_B = probabilities_BC.gather(1, batch.labels[:, None])[:, 0]
    valid_B = batch.valid.bool().cpu().numpy()
    tensors = {
        "label": batch.labels,
        "answer": answer_B,
        "probability": probability_B,
        "of_label": of_label_B,
    }
    arrays = {"id": batch.ids} | {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    return {name: array[valid_B] for name, array in arrays.items()}
