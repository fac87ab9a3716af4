"""The one knob: what `augment.strength` makes of each augmentation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Levels:
    """What is applied, after the strength.

    Attributes:
        color_jitter: factors are drawn from 1 +- this.
        random_erasing: probability.
        mixup, cutmix: alphas, 0 is off.
        mixup_switch: probability of cutmix where both are on.
    """

    color_jitter: float
    random_erasing: float
    mixup: float
    cutmix: float
    mixup_switch: float

    @classmethod
    def of(cls, augment) -> "Levels":
        """Scales the values of an `augment` section by its strength: 0 is none of it, 1 the values, 2 twice them."""
        s = augment.strength
        return cls(
            color_jitter=min(1.0, s * augment.color_jitter),
            random_erasing=min(1.0, s * augment.random_erasing),
            mixup=s * augment.mixup,
            cutmix=s * augment.cutmix,
            mixup_switch=augment.mixup_switch,
        )


def color_jitter_place(place: str, device_type: str) -> str:
    """Where photometric work happens: `stream` or `device`; `auto` is the device where it is a GPU."""
    return place if place != "auto" else "device" if device_type == "cuda" else "stream"
