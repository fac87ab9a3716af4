"""However a trial ends, the cluster is free of it within ten seconds: no actor, placement group or
reservation is left."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from tests.conftest import EXPERIMENTS, ROOT, SMALL, SMALL_STEPS

GO_ON = "go-on"  # a file that the trial which outlasts another one waits for
EPOCHS = {  # that a trial reports
    "is stopped": 2,
    "outlasts": 3,
    "finishes": 3,
    "kills its worker": 3,
    "hangs and is stopped": 1,
    "raises": None,
}
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
    assert report["ended"] == SHORT | {
        "kills its worker": 1,
        "finishes": 1,
        "hangs": 1,
        "hangs and is stopped": 1,
        "is stopped": 2,
        "outlasts": 1,
    }


def run_case(data: str, folder: Path, what: str, setting: str) -> dict:
    """Ends trials in a process and a Ray of their own."""
    command = [sys.executable, __file__, data, str(folder), what, setting]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
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
            if end.startswith("hangs"):
                time.sleep(3600)
            if end == "outlasts":
                wait_for(folder.parent / GO_ON)
            if end == "kills its worker" and not (folder / "died").exists():
                (folder / "died").touch()
                os._exit(1)
        return call(self, batch, number)

    TrainStep.__call__ = step
    try:
        run_worker(worker, config)
    finally:
        TrainStep.__call__ = call


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.1)


def main(data: str, folder: str, what: str, setting: str) -> None:
    import ray

    from deit_ray.cluster.ray_private import forked_workers
    from deit_ray.trial.needs import MODULES

    other = start_other_ray() if setting == "second ray" else None
    with forked_workers(MODULES):
        ray.init(address="local", num_cpus=2, include_dashboard=setting == "dashboard", log_to_driver=False)
    report = end_trials(data, Path(folder), what)
    ray.shutdown()
    if other:
        other.terminate()
        other.wait()
    print(json.dumps(report))


def make_maker(data: str, folder: Path, epochs: int):
    """Gives the function that makes a trial of few images."""
    from deit_ray.experiment.load import load_experiment
    from deit_ray.trial.assemble import make_trial
    from deit_ray.trial.launch import share
    from deit_ray.trial.resolve import resolve

    keys = {
        "data.uri": data,
        "results.uri": str(folder),
        "distillation.kind": "none",
        "train.epochs": epochs,
    }
    resolved = resolve(load_experiment(EXPERIMENTS / "digits_student.yaml", SMALL | keys))
    return partial(make_trial, resolved.experiment, "cpu", share(resolved), ("val",))


def run_tuner(make, folder: Path, space: dict, **run_config):
    """Runs trials with Ray Tune as a study does, two at a time."""
    import ray.tune

    from deit_ray.cluster import connect
    from deit_ray.trial.train_private import without_runtime_environment
    from deit_ray.trial.trial import Trial

    resources = ray.tune.PlacementGroupFactory([{connect.HEAD: 0.001}])
    folders = ray.tune.sample_from(lambda spec: f"{folder}/{os.urandom(4).hex()}")
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(ray.tune.with_parameters(Trial, make=make), resources),
        param_space=space | {"folder": folders},
        tune_config=ray.tune.TuneConfig(metric="epoch", mode="max", max_concurrent_trials=2),
        run_config=ray.tune.RunConfig(
            name=os.urandom(4).hex(), storage_path=f"{folder}/tune", verbose=0, **run_config
        ),
    )
    with without_runtime_environment():
        return tuner.fit()


def end_trials(data: str, folder: Path, what: str) -> dict:
    """Runs trials on the Ray that is connected; says how they ended, and what was left of them ten seconds
    later.

    Args:
        what: everything, or short for what takes the least time.
    """
    import ray
    import ray.tune

    from deit_ray.cluster.holdings import sweep
    from deit_ray.trial.trial import Trial
    from tests.support.holdings import snapshot, what_is_left

    make = partial(make_ending, make_maker(data, folder, 3))
    baseline = snapshot()
    ended, left = {}, []

    def tune(ends: list[str], **run_config):
        for result in run_tuner(make, folder, {"end": ray.tune.grid_search(ends)}, **run_config):
            end = result.config["end"]
            wanted = EPOCHS[end]
            assert bool(result.error) == (end == "raises"), result.error
            assert wanted is None or result.metrics["epoch"] == wanted, (end, result.metrics)
            ended[end] = ended.get(end, 0) + 1
        left.extend(what_is_left(baseline))

    def start_hanging(where: str):
        actor_class = ray.tune.with_parameters(Trial, make=make)
        actor = ray.remote(num_cpus=0)(actor_class).remote(config={"end": "hangs", "folder": where})
        assert ray.get(actor.train.remote())["epoch"] == 1
        return actor

    tune(["is stopped", "raises"], stop=is_stopped)
    if what == "everything":
        tune(["kills its worker", "finishes"])
        tune(["hangs and is stopped"], stop={"epoch": 1})
        tune(["is stopped", "outlasts"], stop=is_stopped, callbacks=[watch_the_stopped(folder / GO_ON, left)])
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


def is_stopped(trial_id: str, result: dict) -> bool:
    return result["config"]["end"] == "is stopped" and result["epoch"] >= 2


def watch_the_stopped(go_on: Path, left: list[str]):
    """Tune's callback that, after one of two trials was stopped, waits until only the other one's actors are
    left.

    Then it lets the other one go on. What is still there after ten seconds is added to `left`.
    """
    import ray.tune

    from tests.support.holdings import DEADLINE_S, snapshot

    class Watch(ray.tune.Callback):
        stopped_at = None

        def on_trial_complete(self, iteration, trials, trial, **info):
            if trial.config["end"] == "is stopped":
                self.stopped_at = time.monotonic()

        def on_step_end(self, iteration, trials, **info):
            if self.stopped_at is None or go_on.exists():
                return
            found = snapshot()
            workers = [name for name in found["actors"] if name.endswith("RayTrainWorker")]
            groups = [
                name for name in found["groups"] if name.startswith("deit_ray/")
            ]  # the others are Tune's
            is_freed = len(workers) == len(groups) == 1
            if is_freed or time.monotonic() - self.stopped_at > DEADLINE_S:
                left.extend([] if is_freed else [f"beside the trial that goes on: {found}"])
                go_on.touch()

    return Watch()


def start_other_ray() -> subprocess.Popen:
    """A Ray of somebody else on the same machine."""
    code = (
        "import ray, time; ray.init(address='local', num_cpus=1, include_dashboard=False); "
        "print('up', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline().strip() == "up"
    return process


if __name__ == "__main__":
    main(*sys.argv[1:])
