"""Starts one trial on the Ray that is connected, after a look at whether the cluster can run it."""

import contextlib
from collections.abc import Callable

import ray
import ray.tune

from deit_ray.cluster import connect, ray_private
from deit_ray.cluster.holdings import sweep
from deit_ray.cluster.nodes import ANSWER_S, Codes
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment
from deit_ray.terminal.format import counted
from deit_ray.trial.assemble import Shared
from deit_ray.trial.needs import Needs
from deit_ray.trial.resolve import Resolved
from deit_ray.trial.runnable import check_precision
from deit_ray.trial.trial import Trial


def check_machine(experiment: Experiment, address: str | None) -> None:
    """Refuses what this machine cannot run, before a Ray is started here; a cluster is looked at later.

    Args:
        address: as in `connect.connected`.

    Raises:
        UserError: as `check_fits`.
    """
    if not ray.is_initialized() and connect.chosen_address(address) == "local":
        check_fits(experiment, ray_private.machine_resources())


def check_cluster(experiment: Experiment) -> str:
    """The device that the experiment's trials run on: cpu or cuda. A Ray must be connected.

    Raises:
        UserError: a trial does not fit into the cluster, or a node could not reach the data or the results.
        OtherCodeError: a node has other code than this process.
    """
    device = check_fits(experiment, connect.possible_resources())
    for key, uri in (("results.uri", experiment.results.uri), ("data.uri", experiment.data.uri)):
        connect.check_reachable(key, uri)
    Codes(connect.code_of_nodes()).check(ANSWER_S)
    return device


def check_fits(experiment: Experiment, resources: dict[str, float]) -> str:
    """The device that a trial runs on, cpu or cuda.

    Raises:
        UserError: a trial does not fit; the message has the sum of its needs, and the resources. Or the
            device computes train.precision wrongly.
    """
    device = connect.training_device(experiment.train.device, resources)
    check_precision(experiment, device)
    needs = Needs.of(experiment, device)
    if needs.fit(resources) < 1:
        have = f"{counted(resources.get('CPU', 0), 'CPU')} and {counted(resources.get('GPU', 0), 'GPU')}"
        raise UserError(
            f"a trial can never start: it needs {needs.sum_shown(experiment)}, but the cluster has {have}; "
            "lower train.workers, train.cpus_per_worker or data.cpus_per_worker, or use a larger cluster"
        )
    return device


def share(resolved: Resolved) -> Shared:
    """Puts the things that all trials have in common into Ray's object store, once."""
    teacher = None if resolved.teacher is None else ray.put(resolved.teacher)
    initial = None if resolved.initial is None else ray.put(resolved.initial)
    return Shared(resolved.manifest, resolved.data, teacher, initial)


def trial_class(make: Callable) -> type:
    """The class of an actor that runs a trial, and that refuses to run with other code than this process's.

    Args:
        make: makes the trainer, as `Trial` needs it.
    """
    return ray.tune.with_parameters(Trial, make=make, code=connect.code_of_nodes())


def run_trial(
    make: Callable,
    folder: str,
    on_metrics: Callable[[dict[str, float]], None],
    on_report: Callable[[dict], None] = lambda result: None,
) -> dict[str, float]:
    """Runs one trial in an actor of its own, outside Ray Tune; returns the metrics of its last report.

    Args:
        make: makes the trainer, as `Trial` needs it.
        folder: URI of the trial's folder.
        on_metrics: called with the metrics of each report.
        on_report: called with each whole report, which may hold other things than numbers.
    """
    actor_class = trial_class(make)
    remote_class = ray.remote(num_cpus=0, resources={connect.HEAD: 0.001})(actor_class)
    actor = remote_class.remote(config={"folder": folder})
    metrics: dict[str, float] = {}
    try:
        while True:
            result = ray.get(actor.train.remote())
            if result.get("done"):
                return metrics
            on_report(result)
            metrics = {key: value for key, value in result.items() if "/" in key or key in ("epoch", "step")}
            metrics = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
            on_metrics(metrics)
    finally:
        if ray.is_initialized():
            # whatever happens in `stop`, the actor is killed next
            with contextlib.suppress(ray.exceptions.RayError, KeyboardInterrupt):
                ray.get(actor.stop.remote(), timeout=10)
            ray.kill(actor)
            sweep(folder)
