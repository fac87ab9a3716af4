"""Counts what the connected Ray holds for trials: actors, placement groups, CPUs and reservations."""

import time
from collections import Counter

import ray
from ray._private.state import actors
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.util import placement_group_table

DEADLINE_S = 10.0
# actors that all trials share
SHARED = {
    "AutoscalingCoordinator",
    "_AutoscalingCoordinatorActor",
    "StatsActor",
    "_StatsActor",
    "DatasetStatsActor",
}


def snapshot() -> dict:
    """What the cluster holds: living actors by class, placement groups, free CPUs, reservations."""
    alive = [actor["ActorClassName"] for actor in actors().values() if actor["State"] != "DEAD"]
    groups = [
        row["name"] or row["placement_group_id"]
        for row in placement_group_table().values()
        if row["state"] != "REMOVED"
    ]
    return {
        "actors": sorted(name for name in alive if name.rpartition(".")[2] not in SHARED),
        "groups": sorted(groups),
        "cpus": ray.available_resources().get("CPU", 0),
        "reserved": reservations(),
    }


def reservations() -> int:
    """Number of requests for CPUs, by Ray Train and by streams, that Ray Data's coordinator has."""
    coordinator = get_or_create_autoscaling_coordinator()
    return ray.get(coordinator.__ray_call__.remote(lambda self: len(self._ongoing_reqs)))


def what_is_left(baseline: dict, what: str = "") -> list[str]:
    """Waits until no holding exceeds the baseline, ten seconds at most; returns those that do."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        now = snapshot()
        left = [
            f"{what} {key}: {now[key]}"
            for key in ("actors", "groups")
            if Counter(now[key]) - Counter(baseline[key])
        ]
        left += [f"{what} cpus: {now['cpus']}"] if now["cpus"] < baseline["cpus"] else []
        left += [f"{what} reservations: {now['reserved']}"] if now["reserved"] > baseline["reserved"] else []
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)
