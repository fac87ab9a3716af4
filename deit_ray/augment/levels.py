"""One setting for the whole augmentation: `augment.strength` scales each of its arguments."""

from dataclasses import dataclass

from deit_ray.augment.table import MAX_MAGNITUDE


@dataclass(frozen=True)
class Levels:
    """The scaled arguments. Strength 0 applies nothing, strength 1 the values of the experiment.

    Attributes:
        strength: from 0 to 2.
        magnitude: mean magnitude of RandAugment's operations, from 0 to 10.
        num_ops: operations drawn for an image. 2.4 means two, and a third with 0.4 of the probability.
        p: probability that a drawn operation is applied.
        color_jitter: factors are drawn from 1 +- color_jitter; 0 if the policy excludes colour jitter.
        random_erasing: probability of erasing a rectangle of an image.
        mixup, cutmix: alphas of their Beta distributions; 0 is off.
        mixup_switch: probability of cutmix if both are on.
    """

    strength: float
    magnitude: float
    num_ops: float
    p: float
    color_jitter: float
    random_erasing: float
    mixup: float
    cutmix: float
    mixup_switch: float

    @classmethod
    def of(cls, augment) -> "Levels":
        """Scales the values of an `augment` section by its strength."""
        s, drawn = augment.strength, augment.randaugment
        jitters = augment.force_color_jitter or augment.policy in ("three_augment", "none")
        return cls(
            strength=s,
            magnitude=min(MAX_MAGNITUDE, s * drawn.magnitude),
            num_ops=max(1.0, s) * drawn.num_ops,
            p=min(1.0, s * drawn.p),
            color_jitter=min(1.0, s * augment.color_jitter) if jitters else 0.0,
            random_erasing=min(1.0, s * augment.random_erasing),
            mixup=s * augment.mixup,
            cutmix=s * augment.cutmix,
            mixup_switch=augment.mixup_switch,
        )
