"""However a trial ends, the cluster is free of it within ten seconds: no actor, placement group or reservation is left.

Each case runs in a process of its own, with a Ray of its own, so that what is left can only be its trials'.
"""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import EXPERIMENTS, ROOT

pytestmark = pytest.mark.cluster
DEADLINE_S = 10.0


def test_nothing_is_left_without_a_dashboard_and_with_a_second_ray_on_the_machine(digits, tmp_path):
    report = run_case(digits, tmp_path, "short", "second ray")
    assert report["left"] == [], report
    assert report["ended"] == {"is stopped": 1, "raises": 1, "is killed": 1}


@pytest.mark.slow
def test_nothing_is_left_of_trials_that_stop_raise_hang_or_kill_their_worker(digits, tmp_path):
    report = run_case(digits, tmp_path, "everything", "dashboard")
    assert report["left"] == [], report
    assert report["ended"] == {
        "is stopped": 1,
        "raises": 1,
        "kills its worker": 1,
        "finishes": 1,
        "hangs": 1,
        "is killed": 1,
    }


def run_case(digits: str, folder: Path, what: str, setting: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, digits, str(folder), what, setting]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def make_ending(make, config: dict, on_report):
    """Makes a trial that ends in the way that its configuration says."""
    return make(config, on_report, loop=partial(end_as, config["end"], Path(config["folder"])))


def end_as(end: str, folder: Path, worker: str, config: dict) -> None:
    """What each worker runs: it trains, and in its second epoch it ends as it was told."""
    from deit_ray.training.step import TrainStep
    from deit_ray.trial.assemble import run_worker

    call = TrainStep.__call__

    def step(self, batch, number):
        if number == 30:
            if end == "raises":
                from deit_ray.errors import HopelessError

                raise HopelessError("as it was told")
            if end == "hangs":
                time.sleep(3600)
            if end == "kills its worker" and not (folder / "died").exists():
                (folder / "died").touch()
                os._exit(1)
        return call(self, batch, number)

    TrainStep.__call__ = step
    try:
        run_worker(worker, config)
    finally:
        TrainStep.__call__ = call


def main(digits: str, folder: str, what: str, setting: str) -> None:
    import ray
    import ray.tune

    from deit_ray.cluster import connect
    from deit_ray.cluster.holdings import sweep
    from deit_ray.experiment.load import load_experiment
    from deit_ray.trial import run
    from deit_ray.trial.assemble import make_trial
    from deit_ray.trial.trial import Trial

    other = start_other_ray() if setting == "second ray" else None
    ray.init(address="local", num_cpus=2, include_dashboard=setting == "dashboard", log_to_driver=False)
    keys = {
        "data.uri": digits,
        "results.uri": folder,
        "distillation.kind": "none",
        "train.epochs": 3,
        "optim.warmup_epochs": 1,
    }
    ready = run.check(load_experiment(EXPERIMENTS / "digits_student.yaml", keys))
    make = partial(make_ending, partial(make_trial, ready.experiment, "cpu", run.share(ready), ("val",)))
    baseline = snapshot()
    ended, left = {}, []

    def tune(ends: list[str], stop=None):
        space = {
            "end": ray.tune.grid_search(ends),
            "folder": ray.tune.sample_from(lambda spec: f"{folder}/{os.urandom(4).hex()}"),
        }
        resources = ray.tune.PlacementGroupFactory([{connect.HEAD: 0.001}])
        results = ray.tune.Tuner(
            ray.tune.with_resources(ray.tune.with_parameters(Trial, make=make), resources),
            param_space=space,
            tune_config=ray.tune.TuneConfig(metric="epoch", mode="max", max_concurrent_trials=2),
            run_config=ray.tune.RunConfig(
                name=os.urandom(4).hex(), storage_path=f"{folder}/tune", verbose=0, stop=stop
            ),
        ).fit()
        for result in results:
            end = result.config["end"]
            wanted = {"is stopped": 2, "finishes": 3, "kills its worker": 3, "raises": None}[end]
            assert bool(result.error) == (end == "raises"), result.error
            assert wanted is None or result.metrics["epoch"] == wanted, (end, result.metrics)
            ended[end] = ended.get(end, 0) + 1
        left.extend(what_is_left(baseline))

    def start_hanging(where: str):
        actor_class = ray.tune.with_parameters(Trial, make=make)
        actor = ray.remote(num_cpus=0)(actor_class).remote(config={"end": "hangs", "folder": where})
        assert ray.get(actor.train.remote())["epoch"] == 1
        return actor

    tune(["is stopped", "raises"], stop=lambda _, r: r["config"]["end"] == "is stopped" and r["epoch"] >= 2)
    if what == "everything":
        tune(["kills its worker", "finishes"])
        actor = start_hanging(f"{folder}/hangs")
        ray.get(actor.stop.remote())
        ray.kill(actor)
        left.extend(what_is_left(baseline, "hangs"))
        ended["hangs"] = 1
    actor = start_hanging(f"{folder}/is-killed")
    ray.kill(actor)  # the trial's own process dies, and cannot tidy up
    sweep(f"{folder}/is-killed")  # the driver does
    left.extend(what_is_left(baseline, "is killed"))
    ended["is killed"] = 1
    ray.shutdown()
    if other:
        other.terminate()
        other.wait()
    print(json.dumps({"left": left, "ended": ended}))


def start_other_ray() -> subprocess.Popen:
    """A Ray of somebody else on the same machine."""
    code = "import ray, time; ray.init(address='local', num_cpus=1, include_dashboard=False); print('up', flush=True); time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline().strip() == "up"
    return process


def snapshot() -> dict:
    """What the cluster holds: living actors by class, placement groups, free CPUs."""
    import ray
    from ray._private.state import actors
    from ray.util import placement_group_table

    alive = [a["ActorClassName"] for a in actors().values() if a["State"] not in ("DEAD",)]
    groups = [
        row["name"] or row["placement_group_id"]
        for row in placement_group_table().values()
        if row["state"] != "REMOVED"
    ]
    shared = {
        "AutoscalingCoordinator",
        "_AutoscalingCoordinatorActor",
        "StatsActor",
        "_StatsActor",
        "DatasetStatsActor",
    }
    return {
        "actors": sorted(name for name in alive if name.rpartition(".")[2] not in shared),
        "groups": sorted(groups),
        "cpus": ray.available_resources().get("CPU", 0),
        "reserved": reservations(),
    }


def reservations() -> int:
    """How many requests for CPUs stand with Ray Data's coordinator, by Train and by streams."""
    import ray

    try:
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            get_or_create_autoscaling_coordinator,
        )
    except ImportError:
        return -1
    coordinator = get_or_create_autoscaling_coordinator()
    return ray.get(coordinator.__ray_call__.remote(lambda self: len(self._ongoing_reqs)))


def what_is_left(baseline: dict, what: str = "") -> list[str]:
    """What there is more of than before, once ten seconds have passed; nothing as soon as all is free."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        now = snapshot()
        left = [f"{what} {key}: {now[key]}" for key in ("actors", "groups") if now[key] != baseline[key]]
        left += [f"{what} cpus: {now['cpus']}"] if now["cpus"] < baseline["cpus"] else []
        left += [f"{what} reservations: {now['reserved']}"] if now["reserved"] > baseline["reserved"] else []
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


if __name__ == "__main__":
    main(*sys.argv[1:])
