"""The loss of DeiT (arXiv:2012.12877, section 4).

The labels train the class token, the teacher trains the distillation token.
"""

import torch
import torch.nn.functional as F


def label_loss(logits_BC: torch.Tensor, targets_BC: torch.Tensor, valid_B: torch.Tensor) -> torch.Tensor:
    """Cross entropy with soft targets, mean over the valid samples."""
    return _mean(-(targets_BC * F.log_softmax(logits_BC, dim=1)).sum(1), valid_B)


def binary_label_loss(
    logits_BC: torch.Tensor, targets_BC: torch.Tensor, valid_B: torch.Tensor
) -> torch.Tensor:
    """Binary cross entropy of each class, mean over classes and valid samples (DeiT III, arXiv:2204.07118).

    Every class with a share of the target is one, as in engine.py of the reference with --bce-loss.
    """
    is_target = targets_BC.gt(0).to(logits_BC.dtype)
    return _mean(F.binary_cross_entropy_with_logits(logits_BC, is_target, reduction="none").mean(1), valid_B)


def hard_distillation_loss(
    logits_BC: torch.Tensor, teacher_BC: torch.Tensor, valid_B: torch.Tensor
) -> torch.Tensor:
    """Cross entropy with the teacher's decision (equation 3)."""
    return _mean(F.cross_entropy(logits_BC, teacher_BC.argmax(1), reduction="none"), valid_B)


def soft_distillation_loss(
    logits_BC: torch.Tensor, teacher_BC: torch.Tensor, valid_B: torch.Tensor, temperature: float, mean: str
) -> torch.Tensor:
    """Kullback-Leibler divergence from the teacher, times temperature squared (equation 2).

    Args:
        mean: `elements` divides the sum by batch x classes, as losses.py of the reference does. `batch`
            divides it by the batch, as timm does.
    """
    log_p, log_q = (F.log_softmax(x / temperature, dim=1) for x in (logits_BC, teacher_BC))
    loss = _mean(F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1), valid_B) * temperature**2
    return loss / logits_BC.shape[1] if mean == "elements" else loss


LABEL_LOSSES = {"cross_entropy": label_loss, "bce": binary_label_loss}


def distilled_loss(
    outputs,
    targets_BC: torch.Tensor,
    teacher_BC: torch.Tensor | None,
    valid_B: torch.Tensor,
    distillation,
    label: str = "cross_entropy",
) -> dict[str, torch.Tensor]:
    """The training loss and its parts.

    Args:
        outputs: logits [batch, classes], or the pair (logits of the class token, logits of the distillation
            token).
        targets_BC: soft targets of the labels.
        teacher_BC: the teacher's logits; None without distillation.
        valid_B: 1.0 for samples that count, otherwise 0.0.
        distillation: the experiment's section, with kind, weight, temperature and soft_mean.
        label: the labels' loss, a key of `LABEL_LOSSES`.

    Returns:
        `loss`, and with distillation `loss_label` and `loss_teacher`. With one head, both are losses of that
        head.
    """
    cls, dist = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    if distillation.kind == "none":
        fused = (cls + dist) / 2 if isinstance(outputs, tuple) else cls
        return {"loss": LABEL_LOSSES[label](fused, targets_BC, valid_B)}
    from_labels = LABEL_LOSSES[label](cls, targets_BC, valid_B)
    if distillation.kind == "hard":
        from_teacher = hard_distillation_loss(dist, teacher_BC, valid_B)
    else:
        from_teacher = soft_distillation_loss(
            dist, teacher_BC, valid_B, distillation.temperature, distillation.soft_mean
        )
    weight = distillation.weight
    return {
        "loss": (1 - weight) * from_labels + weight * from_teacher,
        "loss_label": from_labels,
        "loss_teacher": from_teacher,
    }


def _mean(losses_B: torch.Tensor, valid_B: torch.Tensor) -> torch.Tensor:
    return (losses_B * valid_B).sum() / valid_B.sum().clamp(min=1)
