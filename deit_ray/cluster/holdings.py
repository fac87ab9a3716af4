"""What a run holds of a cluster, found by the run's name: to give it back, and to ask the run to end.

It imports neither torch nor Ray Train: Ray's coordinator of reservations, an actor that all trials share, imports it too.
"""

import contextlib
import hashlib
from functools import partial

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.experimental import internal_kv
from ray.util.placement_group import get_placement_group, remove_placement_group


def run_of(folder: str) -> str:
    """The name by which a run's holdings in the cluster are known: of its folder, since that is its own."""
    return hashlib.sha256(folder.encode()).hexdigest()[:16]


def group_name(run: str) -> str:
    return f"deit_ray/{run}"


def kv_prefix(run: str) -> str:
    """What the keys of a run begin with in the cluster's key-value store."""
    return f"deit_ray/{run}/"


def sweep(folder: str) -> None:
    """Gives back what a run may hold though its process was killed: its placement group, and its reservations of CPUs."""
    run = run_of(folder)
    with contextlib.suppress(
        ValueError
    ):  # it holds none. Ray's table of all groups lists those of every trial that ever was
        remove_placement_group(get_placement_group(group_name(run)))
    coordinator = get_or_create_autoscaling_coordinator()
    ray.get(coordinator.__ray_call__.remote(partial(_cancel_requests, run)))
    internal_kv._internal_kv_del(kv_prefix(run), del_by_prefix=True)


def _cancel_requests(run: str, coordinator) -> None:
    for requester in [requester for requester in coordinator._ongoing_reqs if run in requester]:
        coordinator.cancel_request(requester)


def cancel(folder: str) -> None:
    """Asks a running trial to end; it does so within a second or two, whatever its workers do."""
    internal_kv._internal_kv_put(_cancel_key(folder), b"1")


def is_cancelled(folder: str) -> bool:
    return internal_kv._internal_kv_get(_cancel_key(folder)) is not None


def forget_cancel(folder: str) -> None:
    """Takes back what `cancel` asked for, before a trial is started again."""
    internal_kv._internal_kv_del(_cancel_key(folder))


def _cancel_key(folder: str) -> str:
    return f"deit_ray-cancel/{run_of(folder)}"
