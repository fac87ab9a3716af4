"""Whether a model's classes are those of a data set, in the same order."""

from deit_ray.errors import UserError

SHOWN = 3  # places at which names differ


def check_classes(known: list[str] | None, classes: list[str], where: str) -> list[str]:
    """Compares a model's class names with a data set's; returns notes for a person.

    Args:
        known: the model's, by output; None if its file does not say them.
        classes: the data set's, by label.
        where: the model, for messages.

    Raises:
        UserError: a class has another name, or another place.
    """
    if known is None:
        return [
            f"{where}: its file has no class names, so their order cannot be compared with the data set's"
        ]
    if len(known) != len(classes):
        raise UserError(f"{where}: knows {len(known)} classes, but the data set has {len(classes)}")
    differing = [label for label, pair in enumerate(zip(known, classes, strict=True)) if pair[0] != pair[1]]
    if not differing:
        return []
    same_names = sorted(known) == sorted(classes)
    places = ", ".join(
        f"class {label} is {known[label]}, in the data set {classes[label]}" for label in differing[:SHOWN]
    )
    more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    if (_are_numbers(known) or _are_numbers(classes)) and not {*known} & {*classes}:
        return [
            f"{where}: its classes or the data set's have numbers for names, so only their count is "
            f"compared, and not their order: {places}{more}"
        ]
    what = "the data set's classes in another order" if same_names else "other classes than the data set has"
    raise UserError(
        f"{where}: was trained on {what}: {places}{more}; "
        "name a model that was trained on this data set's classes"
    )


def _are_numbers(names: list[str]) -> bool:
    """Whether the names only count the classes, as those of data without class names do."""
    return names == [str(label) for label in range(len(names))]
