"""What a run reads of a prepared data set, and how its samples are made of it. No Ray is needed to say so."""

from deit_ray.accuracy import is_uneven, largest_share
from deit_ray.augment.policy import Photometric, place_of
from deit_ray.data import shards
from deit_ray.data.blocks import Recipe
from deit_ray.data.crop import Geometry
from deit_ray.data.worklist import WorkList
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment


def make_worklist(
    experiment: Experiment,
    manifest: shards.Manifest,
    uri: str,
    splits: tuple[str, ...],
    epochs: int | None = None,
) -> WorkList:
    """The work list of a run over a prepared data set.

    Args:
        splits: which of val and test are evaluated.
        epochs: instead of the experiment's; 0 for a run that only evaluates.
    """
    data, train = experiment.data, experiment.train
    groups = {split: shards.row_groups(uri, manifest, split, data.holdout) for split in splits}
    groups = {split: found for split, found in groups.items() if found.images}
    images = shards.row_groups(uri, manifest, "train", data.holdout) if epochs != 0 else shards.NO_ROW_GROUPS
    try:
        return WorkList(
            images, groups, train.batch_size, train.workers, data.views,
            train.epochs if epochs is None else epochs, train.eval_every, experiment.seed,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"train.batch_size: {error}; the data set at {uri} has {manifest.rows('train')}, "
                        f"of which data.holdout keeps {data.holdout:.0%} aside") from None  # fmt: skip


def count_val(experiment: Experiment, manifest: shards.Manifest) -> int:
    """The number of val images: the part of train that `data.holdout` keeps aside."""
    return shards.row_groups("", manifest, "val", experiment.data.holdout).images


def largest_shares(manifest: shards.Manifest) -> dict[str, float]:
    """The accuracy of always answering the largest class, by split; val is a random part of train."""
    shares = {split: largest_share(counts) for split, counts in manifest.class_counts.items()}
    return shares | ({"val": shares["train"]} if "train" in shares else {})


def uneven_splits(manifest: shards.Manifest) -> frozenset[str]:
    """The splits whose classes are uneven, see `accuracy.is_uneven`; val is a random part of train."""
    uneven = {split for split, counts in manifest.class_counts.items() if is_uneven(counts)}
    return frozenset(uneven | ({"val"} if "train" in uneven else set()))


def make_recipe(experiment: Experiment, device: str) -> Recipe:
    data = experiment.data
    geometry = Geometry(
        data.image_size,
        tuple(data.crop_scale),
        tuple(data.crop_ratio),
        data.flip,
        data.eval_crop,
        experiment.seed,
    )
    in_stream = place_of(experiment.augment.place, device) == "stream"
    photometric = Photometric.of(experiment.augment, data.mean, experiment.seed) if in_stream else None
    return Recipe(geometry, photometric, keep_crops=experiment.distillation.teacher_sees_crops)
