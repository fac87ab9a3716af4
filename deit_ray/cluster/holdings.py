"""What a run holds of a cluster, found by the run's name: to give it back, and to ask the run to end.

It imports neither torch nor Ray Train: the driver uses it too, and most of its processes need neither.
"""

import contextlib
import hashlib

from ray.util.placement_group import get_placement_group, remove_placement_group

from deit_ray.cluster import ray_private


def run_of(folder: str) -> str:
    """The name by which a run's holdings in the cluster are known: a hash of the URI of its results
    folder."""
    return hashlib.sha256(folder.encode()).hexdigest()[:16]


def group_name(run: str) -> str:
    """The name of a run's placement group."""
    return f"deit_ray/{run}"


def kv_prefix(run: str) -> str:
    """The beginning of all the run's keys in the cluster's key-value store."""
    return f"deit_ray/{run}/"


def sweep(folder: str) -> None:
    """Gives back what a run may still hold although its process was killed: placement group, reserved CPUs,
    keys."""
    run = run_of(folder)
    with contextlib.suppress(ValueError):  # the run holds no placement group
        # looked up by name: Ray's table of all groups also lists those of every trial that has ended
        remove_placement_group(get_placement_group(group_name(run)))
    ray_private.cancel_reservations(run)
    ray_private.delete_values(kv_prefix(run))


def cancel(folder: str) -> None:
    """Asks a running trial to end. It ends within a second or two, even when its workers hang."""
    ray_private.put_value(_cancel_key(folder), b"1")


def is_cancelled(folder: str) -> bool:
    return ray_private.get_value(_cancel_key(folder)) is not None


def forget_cancel(folder: str) -> None:
    """Removes the request of `cancel`, before the trial is started again."""
    ray_private.delete_value(_cancel_key(folder))


def _cancel_key(folder: str) -> str:
    return f"deit_ray-cancel/{run_of(folder)}"
