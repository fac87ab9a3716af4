"""Ray, quiet: connects to a cluster or starts a local one, and says what the cluster has or could have."""

import _thread
import contextlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import ray
import yaml

from deit_ray import storage
from deit_ray.cluster import ray_private, surroundings
from deit_ray.cluster.code import code_hash
from deit_ray.cluster.machine import cheap_checks
from deit_ray.cluster.ray_private import HEAD
from deit_ray.cluster.signals import kept_handlers
from deit_ray.errors import UserError, first_line

EMERGENCIES = (
    "memory",
    "out of disk",
    "disk usage",
    "cannot be scheduled",
    "insufficient resources",
    "infeasible",
)
WATCH_S = 1.0
SPILL_WATCH_S = 5.0
MISSES = 4  # questions in a row that Ray does not answer before it counts as lost
SPILL_WARNING_BYTES = 1 << 30
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journals have all that Tune would log
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # we handle Ctrl-C
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",  # Tune's state of all trials grows with each trial, and is never read
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that is cancelled may have measured nothing yet
}


@contextlib.contextmanager
def connected(
    address: str | None,
    verbose: bool,
    warn: Callable[[str], None],
    modules: tuple[str, ...] = (),
    begin: Callable[[str], None] = lambda text: None,
) -> Iterator[None]:
    """Connects this process to a Ray while the context is entered.

    The Ray is the one that this process is connected to already; else the one at `address` or RAY_ADDRESS;
    else, on the head node of a cluster, that cluster; else a local one that is started here, and stopped at
    the end.

    Args:
        address: of a Ray cluster, "auto" or "local".
        verbose: shows all of Ray's output. By default Ray is silent.
        warn: called with what a person must know.
        modules: dotted names of what most processes of a local Ray will import: they start with it
            (forkserver.py).
        begin: called with what begins, before it takes seconds.

    Raises:
        UserError: nothing answers at the address, or Ray cannot start here; within seconds.
    """
    address = chosen_address(address)
    os.environ.update(SETTINGS)
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with contextlib.ExitStack() as stack:
        if not verbose:
            os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Tune's new output prints errors whatever the verbosity
            logging.getLogger("ray").setLevel(logging.CRITICAL)
            logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
            stack.enter_context(ray_private.messages_handled_by(lambda lines: _pass_on(lines, warn)))
        stack.callback(ray.shutdown)
        begin("starting Ray on this machine" if address == "local" else f"connecting to Ray at {address}")
        _prepare(address, warn)
        if address == "local" and sys.platform == "linux":
            stack.enter_context(ray_private.forked_workers(modules))
        with kept_handlers(), ray_private.without_uv_environment(), _explaining(address):
            ray.init(
                address=address,
                include_dashboard=False if address == "local" else None,
                log_to_driver=verbose,
                configure_logging=verbose,
                logging_level=logging.INFO if verbose else logging.CRITICAL,
            )
        surroundings.go_direct(node["NodeManagerAddress"] for node in ray.nodes())
        with _watching(warn):
            yield


def chosen_address(address: str | None) -> str:
    """The address of the Ray to use: the one that is given, else RAY_ADDRESS, else "auto" on the head node
    of a cluster, else "local"."""
    on_head = surroundings.on_head() is not None
    return address or os.environ.get("RAY_ADDRESS") or ("auto" if on_head else "local")


def _prepare(address: str, warn: Callable[[str], None]) -> None:
    """Checks and prepares what Ray takes from its surroundings.

    Raises:
        UserError: nothing answers at the address, or no folder can be used.
    """
    surroundings.go_direct([ray.util.get_node_ip_address()])
    for check in cheap_checks():
        if check.remedy is not None:
            warn(f"{check.subject}: {check.found}; {check.remedy}")
    if address == "local":
        folder, why = surroundings.base_folder()
        if why is not None:
            warn(f"Ray keeps its temporary files in {folder}: {why}")
            os.environ["RAY_TMPDIR"] = folder
        surroundings.bring_token()
    else:
        with _explaining(address):
            found = ray_private.address_found(address)
        surroundings.go_direct([surroundings.check_address(found)])
        try:
            ray_private.check_is_cluster(found, surroundings.ANSWER_S)
        except grpc.RpcError as error:
            why = "what listens there is no Ray of this version"
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                why = "it asks for its token: set RAY_AUTH_MODE=token, and copy its ~/.ray/auth_token to here"
            named = found if found == address else f"{found}, which the address auto means here"
            raise UserError(surroundings.silent(named, why)) from error


@contextlib.contextmanager
def _explaining(address: str) -> Iterator[None]:
    """Turns whatever keeps Ray from starting, or from being connected, into one sentence."""
    try:
        yield
    except Exception as error:
        # Ray raises a plain Exception when a start takes too long
        known = (ConnectionError, ValueError, RuntimeError, OSError, ray.exceptions.RayError)
        if not isinstance(error, known) and type(error) is not Exception:
            raise
        if address == "local":
            raise UserError(
                f"Ray cannot start on this machine: {first_line(error)}; if the machine is busy, repeat the "
                f"command later; the logs of its processes are in {ray_private.log_folder()}, if it came "
                "that far"
            ) from error
        if address == "auto":
            raise UserError(
                'Ray: the address is "auto", but no Ray runs on this machine; start one with `ray start '
                "--head`, or use --address local"
            ) from error
        raise UserError(surroundings.silent(address, first_line(error))) from error


@contextlib.contextmanager
def calling(address: str | None, warn: Callable[[str], None]) -> Iterator[Callable]:
    """Yields a function that calls another one with arguments: in this process, or, with an address, on that
    cluster's head."""
    if address is None:
        yield lambda function, *arguments: function(*arguments)
        return
    with connected(address, False, warn):
        yield lambda function, *arguments: _call_on_head(function, arguments)


def _call_on_head(function: Callable, arguments: tuple):
    task = ray.remote(num_cpus=0, resources={HEAD: 0.001}, max_retries=0)(function)
    try:
        return ray.get(task.remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def _pass_on(lines: list[str], warn: Callable[[str], None]) -> None:
    """Warns of the emergencies among the lines that raylets publish to every driver; most lines are
    advice."""
    for line in lines:
        if line.startswith("Raylet is terminated"):  # `_watching` notices that too
            continue
        died = re.match(r"A worker died or was killed.*Worker PID: (\d+) Worker exit type: (\w+)", line)
        if died:
            warn(
                f"process {died[1]} of a trial died ({died[2]}): it was killed (perhaps out of memory); "
                "its work will be repeated"
            )
            continue
        if any(word in line.lower() for word in EMERGENCIES):
            warn(" ".join(line.split()))


@contextlib.contextmanager
def _watching(warn: Callable[[str], None]) -> Iterator[None]:
    """Interrupts the main thread when Ray is gone, and warns when the object store writes to the disk."""
    stop, address = threading.Event(), ray.get_runtime_context().gcs_address

    def look():
        spilled, looked, missed = 0, 0.0, 0
        while not stop.wait(WATCH_S):
            if ray_private.has_local_daemon_died():
                return _thread.interrupt_main()
            if time.monotonic() - looked < SPILL_WATCH_S:
                continue
            looked = time.monotonic()
            try:
                ray_private.check_answers(address)
            except Exception:  # Ray has not answered, whichever exception its client raises
                missed += 1
                if missed == MISSES:
                    return _thread.interrupt_main()
                continue
            missed = 0
            total = ray_private.spilled_bytes(address)
            if total is not None and total - spilled > SPILL_WARNING_BYTES:
                spilled = total
                warn(
                    f"the object store is full: {spilled / 1e9:.1f} GB of blocks were written to the disk, "
                    "which slows the stream; fewer trials at a time (search.max_concurrent) need less"
                )

    thread = threading.Thread(target=look, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()


def is_alive() -> bool:
    """Whether the Ray that this process is connected to still answers."""
    if not ray.is_initialized() or ray_private.has_local_daemon_died():
        return False
    try:
        ray_private.check_answers(ray.get_runtime_context().gcs_address)
    except Exception:  # Ray has not answered, whichever exception its client raises
        return False
    return True


def possible_resources() -> dict[str, float]:
    """The resources that the cluster has, or, where it scales by itself, could have at most."""
    now = ray.cluster_resources()
    most: dict[str, float] = {}
    for count, resources in _node_types():
        for name, amount in resources.items():
            most[name] = most.get(name, 0) + count * amount
    return {name: max(now.get(name, 0), most.get(name, 0)) for name in now.keys() | most.keys()}


def possible_nodes() -> int:
    """How many nodes the cluster has, or could have at most."""
    return max(sum(node["Alive"] for node in ray.nodes()), sum(count for count, _ in _node_types()))


def code_of_nodes() -> str | None:
    """The hash of this process's code, which every node of the cluster must have; None with one node."""
    return code_hash() if possible_nodes() > 1 else None


def _node_types() -> list[tuple[int, dict[str, float]]]:
    """For each node type of a cluster that `ray up` made: (the most nodes, the resources of one). Empty off
    the head node."""
    path = surroundings.on_head()
    if path is None:
        return []
    config = yaml.safe_load(path.read_text())
    head = config.get("head_node_type")
    return [
        (
            max(node_type.get("max_workers", 0), node_type.get("min_workers", 0), int(name == head)),
            node_type.get("resources", {}),
        )
        for name, node_type in config.get("available_node_types", {}).items()
    ]


def training_device(wanted: str, resources: dict[str, float]) -> str:
    """The device to train on, cpu or cuda.

    Args:
        wanted: cpu, cuda or auto.
        resources: of the cluster.

    Raises:
        UserError: cuda is wanted, but the cluster has no GPU.
    """
    if wanted == "cuda" and not resources.get("GPU"):
        raise UserError("train.device: cuda, but the cluster has no GPU; use auto or cpu")
    if wanted == "auto":
        return "cuda" if resources.get("GPU") else "cpu"
    return wanted


def check_reachable(key: str, uri: str) -> None:
    """Refuses a local path that other nodes of the cluster cannot reach.

    Args:
        key: the setting's dotted key, for the message.
        uri: the path.

    Raises:
        UserError: the cluster has several nodes and the path is on this one alone.
    """
    nodes = possible_nodes()
    if nodes < 2 or not storage.is_local(uri):
        return
    shared = ("nfs", "nfs4", "lustre", "fuse", "ceph", "beegfs", "gpfs", "9p", "efs", "afs")
    kind = _file_system(storage.local_path(uri))
    if not kind.startswith(shared):
        raise UserError(
            f"{key}: {uri} is a local path ({kind}), but the cluster has {nodes} nodes, which could "
            "not reach it; set it to a place on a network file system, or to s3://BUCKET/PATH or "
            "gs://BUCKET/PATH (a study's results: not to gs://)"
        )


def _file_system(path: str) -> str:
    """The type of the file system that holds a path, from /proc/mounts."""
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        mount, type_ = line.split()[1:3]
        if (path == mount or path.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best):
            best, kind = mount, type_
    return kind
