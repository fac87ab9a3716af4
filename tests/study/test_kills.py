"""A study whose processes are killed one after the other ends like an undisturbed one."""

import os
import re
import signal
from pathlib import Path

import ray
from ray._private.state import actors

from deit_ray.experiment.load import dump_experiment
from deit_ray.results.folders import saved_steps
from deit_ray.results.journal import iterate_points
from deit_ray.study.study import Study
from deit_ray.tracking.curves import is_curve
from tests.conftest import SMALL_STEPS, STUDY, Finished
from tests.support.commands import call, command, wait_for
from tests.support.holdings import snapshot, what_is_left
from tests.support.tracked import history_of, runs_below


def test_a_study_whose_worker_trial_server_and_driver_are_killed_equals_an_undisturbed_one(
    finished_study: Finished, make_small, server, tmp_path
):
    results, baseline = tmp_path / "results", snapshot()
    trial = results / "short-1" / "trial-0000"
    (tmp_path / "short.yaml").write_text(dump_experiment(make_small(results, STUDY)))
    address = ["--address", ray.get_runtime_context().gcs_address]
    with command("tune", tmp_path / "short.yaml", *address) as driver:

        def await_checkpoint(after: int) -> int:
            """Waits until a checkpoint later than a step is whole; returns its step."""
            wait_for(lambda: driver.poll() is not None or latest(trial) > after, 120)
            assert driver.poll() is None, driver.communicate()[0]
            return latest(trial)

        step = await_checkpoint(0)
        os.kill(pid_of("TrainWorker"), signal.SIGKILL)
        step = await_checkpoint(step)
        os.kill(pid_of("Trainable"), signal.SIGKILL)
        server.kill()
        await_checkpoint(step)
        driver.kill()
        output = driver.communicate(timeout=60)[0]
    server.start()
    assert re.search(r"warning: trial 0: its process died; it resumes from step \d+", output), output
    assert Study.open("short", str(results)).optuna.trials[0].state.name == "RUNNING"

    resumed = call("tune", "--resume", "short", "--results", results)
    assert resumed.status == 0, resumed
    expected = table(finished_study.results)
    assert table(results) == expected
    assert len(runs_below(server.uri, results)) == 4  # three trials, and the study
    for number in range(3):
        folder = results / "short-1" / f"trial-{number:04d}"
        written = [(p.name, p.step, p.value) for p in iterate_points(f"{folder}/journal")]
        assert len(written) == len({(name, step) for name, step, _ in written})
        undisturbed = iterate_points(f"{finished_study.folder}/trial-{number:04d}/journal")
        # a worker may measure on for a moment after the scheduler has stopped its trial
        last = max(expected[number][2]) * SMALL_STEPS
        assert measured(written, last) == measured(((p.name, p.step, p.value) for p in undisturbed), last)
        (run,) = [
            run for run in runs_below(server.uri, results) if run.data.tags["deit_ray.folder"] == str(folder)
        ]
        assert sorted((p.key, p.step, p.value) for p in history_of(server.uri, run)) == sorted(
            point for point in written if is_curve(point[0])
        )
    assert what_is_left(baseline) == []


def latest(folder: Path) -> int:
    return max(saved_steps(str(folder)), default=0)


def pid_of(part: str) -> int:
    """The pid of the only living actor whose class name contains `part`."""
    alive = {a["Pid"]: a["ActorClassName"] for a in actors().values() if a["State"] == "ALIVE"}
    found = [pid for pid, name in alive.items() if part in name]
    assert len(found) == 1, alive
    return found[0]


def table(results: Path) -> dict:
    """What Optuna has stored of the trials, to the last digit."""
    trials = Study.open("short", str(results)).optuna.trials
    return {t.number: (t.state, t.params, t.intermediate_values, t.value) for t in trials}


def measured(points, last: int) -> dict:
    """Points up to a step, without those that depend on the clock."""
    kept = [
        point
        for point in points
        if point[1] <= last and not point[0].startswith(("perf/", "cost/", "system/"))
    ]
    return {(name, step): value for name, step, value in kept}
