"""The one knob: what `augment.strength` makes of each argument of the augmentation."""

from dataclasses import dataclass

from deit_ray.augment.table import MAX_MAGNITUDE


@dataclass(frozen=True)
class Levels:
    """What is applied, after the strength. At strength 0 nothing is, at 1 what the experiment says.

    Attributes:
        strength: from 0 to 2.
        magnitude: of RandAugment's operations, up to 10.
        num_ops: operations drawn for an image; the fraction of 2.4 is a third operation with 0.4 of the probability.
        p: probability that a drawn operation is applied.
        color_jitter: factors are drawn from 1 +- this; 0 where the policy does not go with it.
        random_erasing: probability.
        mixup, cutmix: alphas, 0 is off.
        mixup_switch: probability of cutmix where both are on.
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
