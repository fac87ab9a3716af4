"""However a trial ends, the cluster is free of it within ten seconds: no actor, placement group or reservation is left."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from tests.conftest import EXPERIMENTS, ROOT, SMALL, SMALL_STEPS

SHORT = {"is stopped": 1, "raises": 1, "is killed": 1}


def test_nothing_is_left_of_trials_that_stop_raise_or_are_killed(ray_cluster, tints, tmp_path):
    report = end_trials(tints, tmp_path, "short")
    assert report["left"] == [], report
    assert report["ended"] == SHORT


def test_nothing_is_left_without_a_dashboard_and_with_a_second_ray_on_the_machine(own_ray, tints, tmp_path):
    report = run_case(tints, tmp_path, "short", "second ray")
    assert report["left"] == [], report
    assert report["ended"] == SHORT


def test_nothing_is_left_of_trials_that_stop_raise_hang_or_kill_their_worker(own_ray, tints, tmp_path):
    report = run_case(tints, tmp_path, "everything", "dashboard")
    assert report["left"] == [], report
    assert report["ended"] == SHORT | {"kills its worker": 1, "finishes": 1, "hangs": 1}


def run_case(data: str, folder: Path, what: str, setting: str) -> dict:
    """Ends trials in a process and a Ray of their own."""
    command = [sys.executable, __file__, data, str(folder), what, setting]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
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
        if number == SMALL_STEPS + 2:
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


def main(data: str, folder: str, what: str, setting: str) -> None:
    import ray

    other = start_other_ray() if setting == "second ray" else None
    ray.init(address="local", num_cpus=2, include_dashboard=setting == "dashboard", log_to_driver=False)
    report = end_trials(data, Path(folder), what)
    ray.shutdown()
    if other:
        other.terminate()
        other.wait()
    print(json.dumps(report))


def end_trials(data: str, folder: Path, what: str) -> dict:
    """Runs trials on the Ray that is connected; says how they ended, and what was left of them ten seconds later.

    Args:
        what: everything, or short for what takes the least time.
    """
    import ray
    import ray.tune

    from deit_ray.cluster import connect
    from deit_ray.cluster.holdings import sweep
    from deit_ray.experiment.load import load_experiment
    from deit_ray.trial.assemble import make_trial
    from deit_ray.trial.launch import share
    from deit_ray.trial.resolve import resolve
    from deit_ray.trial.trial import Trial
    from tests.support.holdings import snapshot, what_is_left

    keys = {"data.uri": data, "results.uri": str(folder), "distillation.kind": "none", "train.epochs": 3}
    resolved = resolve(load_experiment(EXPERIMENTS / "digits_student.yaml", SMALL | keys))
    make = partial(make_ending, partial(make_trial, resolved.experiment, "cpu", share(resolved), ("val",)))
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
    return {"left": left, "ended": ended}


def start_other_ray() -> subprocess.Popen:
    """A Ray of somebody else on the same machine."""
    code = "import ray, time; ray.init(address='local', num_cpus=1, include_dashboard=False); print('up', flush=True); time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline().strip() == "up"
    return process


if __name__ == "__main__":
    main(*sys.argv[1:])
