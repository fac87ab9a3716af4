"""Everything that deit_ray uses of Ray Core and Ray Data although Ray does not promise to keep it.

Each entry says why it is needed and what to do when a new Ray no longer has it; tests/test_ray_private.py
finds out whether it is there. Ray's own coordinators and the stream's tasks load this module, so it imports
neither torch nor Ray Train, and Ray Data only where an entry needs it. trial/train_private.py does the same
for Ray Train.
"""

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_constants
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.experimental import internal_kv

from deit_ray.cluster import forkserver

# Places an actor on the head node, which outlives spot nodes. When the name is gone: give the head a resource
# of our own in cluster/*.yaml and in the local Ray that connect.py starts.
HEAD = HEAD_NODE_RESOURCE_NAME

# The cluster's key-value store holds the wishes to cancel and the cursors of streams, without a process of
# its own. When it is gone: keep both in one actor for each study.


def put_value(key: str, value: bytes) -> None:
    internal_kv._internal_kv_put(key, value, overwrite=True)


def get_value(key: str) -> bytes | None:
    return internal_kv._internal_kv_get(key)


def delete_value(key: str) -> None:
    internal_kv._internal_kv_del(key)


def delete_values(prefix: str) -> None:
    internal_kv._internal_kv_del(prefix, del_by_prefix=True)


# Ray Data's coordinator keeps the CPUs that a stream or a worker group has reserved for 180 s when its
# process was killed; nothing public gives them back sooner. When it is gone: see whether killed trials still
# hold CPUs (tests/trial/test_resources.py), and if so, wait for them.


def reservations() -> list[str]:
    """The names of all requests for CPUs that stand in the cluster."""
    return ray.get(_coordinator().__ray_call__.remote(_names_of_requests))


def cancel_reservations(run: str) -> None:
    """Cancels the requests for CPUs whose names contain a run's name."""
    ray.get(_coordinator().__ray_call__.remote(partial(_cancel_requests, run)))


def _coordinator() -> ray.actor.ActorHandle:
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator

    return default_autoscaling_coordinator.get_or_create_autoscaling_coordinator()


def _names_of_requests(coordinator) -> list[str]:
    return list(coordinator._ongoing_reqs)


def _cancel_requests(run: str, coordinator) -> None:
    for name in _names_of_requests(coordinator):
        if run in name:
            coordinator.cancel_request(name)


def import_in_coordinator(splits: list) -> None:
    """Has the process that coordinates a `streaming_split` import now what it would import at the first
    request.

    The first batch comes a good second sooner. When `_coord_actor` or a module is gone: leave the call out,
    and look at `startup_s` of bench/ingest.py.

    Args:
        splits: the `ray.data.DataIterator` of each rank.
    """
    splits[0]._coord_actor.__ray_call__.remote(_import_executor)


EXECUTOR_MODULES = tuple(
    f"ray.data._internal.{name}"
    for name in ("execution.streaming_executor", "logical.optimizers", "planner.planner")
)


def _import_executor(coordinator) -> None:
    for module in EXECUTOR_MODULES:
        importlib.import_module(module)


DIRECT = ray_constants.GLOBAL_GRPC_OPTIONS  # of a channel that uses no proxy
STATS_S = 10.0  # longest wait for an answer


def store_stats(address: str):
    """How full the object stores of a cluster are, and what they have written to the disk since the cluster
    began.

    Ray's public state API answers this only where a dashboard runs. When the helpers are gone: read the
    metrics that every raylet exports for Prometheus.

    Args:
        address: of the cluster's GCS.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

    node = next(node for node in _state_of(address).node_table() if node["Alive"])
    raylet = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    with contextlib.closing(init_grpc_channel(raylet, DIRECT)) as channel:
        stub = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
        request = node_manager_pb2.FormatGlobalMemoryInfoRequest(include_memory_info=False)
        return stub.FormatGlobalMemoryInfo(request, timeout=STATS_S).store_stats


def spilled_bytes(address: str) -> int | None:
    """Bytes that a cluster's object stores have written to the disk; None if that cannot be found out: no
    statistic ends a run.

    Args:
        address: of the cluster's GCS.
    """
    try:
        return store_stats(address).spilled_bytes_total
    except Exception:  # whichever exception Ray's client raises
        return None


def address_found(address: str) -> str:
    """The address of the cluster that "auto" means on this machine; another address as it is.

    As in `ray.init`, "auto" brings this machine's token along. When the helpers are gone: leave it to
    `ray.init`, which waits for a quarter of an hour if that cluster is dead.

    Raises:
        ConnectionError: no cluster runs on this machine, or several do.
    """
    from ray._private.authentication import authentication_token_setup
    from ray._private.services import canonicalize_bootstrap_address_or_die

    if address != "auto":
        return address
    found = canonicalize_bootstrap_address_or_die(address)
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    return found


def check_is_cluster(address: str, seconds: float) -> None:
    """Asks whether the GCS of a Ray cluster of this version answers at an address, for so many seconds.

    `ray.init` waits for a quarter of an hour, whatever listens there. When the service is gone: connect to
    the port, and leave the rest to `ray.init`.

    Raises:
        grpc.RpcError: what listens there gives no such answer.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    with contextlib.closing(init_grpc_channel(address, DIRECT)) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=seconds)


@contextlib.contextmanager
def without_uv_environment() -> Iterator[None]:
    """While it is entered, `ray.init` makes no runtime environment of its own under `uv run`.

    Ray would upload the working folder, and start each process by `uv run` in a copy of it: none ever starts
    there. All processes use this process's Python instead. When the constant is gone: see whether
    `uv run deit-ray train` works without it.
    """
    with mock.patch.object(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", False):
        yield


def psutil_of_ray():
    """The psutil that Ray brings, which `import ray` makes importable. When it is gone: require psutil."""
    import psutil

    return psutil


def nvml():
    """The client of NVIDIA's management library that Ray brings. When it is gone: require nvidia-ml-py."""
    from ray._private.thirdparty import pynvml

    return pynvml


def job_id() -> str:
    """The name of this process's Ray job: the one with which it was submitted, else Ray's own; an empty text
    without a Ray.

    Ray tells a submitted process its name only in this variable. When that is gone: ask the dashboard.
    """
    if not ray.is_initialized():
        return ""
    settings = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    submitted = (settings.get("metadata") or {}).get("job_submission_id")
    return submitted or ray.get_runtime_context().get_job_id()


def log_folder() -> str:
    """The folder with the logs of the Ray that was started last on this machine.

    When the helper is gone: name the folder of temporary files.
    """
    return f"{get_default_ray_temp_dir()}/session_latest/logs"


def check_answers(address: str) -> None:
    """Raises an exception, whichever its client chooses, if the cluster whose GCS has this address does not
    answer.

    `ray.nodes()` waits for many seconds for a GCS that is gone. When the helper is gone: call `ray.nodes()`
    in a thread, and wait for the thread no longer than a second.
    """
    _state_of(address)


def _state_of(address: str):
    from ray._private.internal_api import get_state_from_address

    return get_state_from_address(address)


@contextlib.contextmanager
def messages_handled_by(handle: Callable[[list[str]], None]) -> Iterator[None]:
    """Gives the lines that raylets publish to every driver to a function instead of printing them.

    Without it Ray prints hundreds of lines a minute into our terminal, or, with log_to_driver=False, drops
    the emergencies too. When it is gone: start Ray with log_to_driver=False and read the raylets' log files.
    """
    printer = ray._private.worker.print_to_stdstream
    ray._private.worker.print_to_stdstream = lambda data, *_, **__: handle(data["lines"])
    try:
        yield
    finally:
        ray._private.worker.print_to_stdstream = printer


def has_local_daemon_died() -> bool:
    """Whether a daemon of a local Ray that this process started is dead: then Ray waits for it for minutes.

    When it is gone: `check_answers` notices the same some seconds later.
    """
    return has_started_ray() and bool(ray._private.worker._global_node.dead_processes())


def has_started_ray() -> bool:
    """Whether the Ray that this process is connected to is a local one that it has started.

    When it is gone: have connect.py remember it.
    """
    node = ray._private.worker._global_node
    return node is not None and node.head


def machine_resources() -> dict[str, float]:
    """The CPUs and GPUs that a Ray started on this machine would have.

    `deit-ray plan` says what fits without starting a Ray. When it is gone: count with os.cpu_count and
    nvidia-smi.
    """
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    found = ResourceAndLabelSpec().resolve(is_head=True)
    return {"CPU": found.num_cpus, "GPU": found.num_gpus}


# The rest is for forkserver.py. Forked workers save most of the CPU time of a trial's start. When a part of
# it is gone: leave `forked_workers` out of connect.py, and look at `start_cpu_ratio` of
# bench/trial_overhead.py.

RAYLET_PID = "RAY_RAYLET_PID"  # environment variable of every worker: the fork server ends with its raylet


@contextlib.contextmanager
def forked_workers(modules: tuple[str, ...]) -> Iterator[None]:
    """Has a local Ray that is started meanwhile fork its worker processes; see forkserver.py.

    `ray.init` cannot be told which file a worker runs, but the parameters that it makes can.

    Args:
        modules: dotted names of what the workers will import. Unless it is empty, Ray Data's executor comes
            with it.
    """
    from ray._private import parameter
    from ray._private.workers import default_worker

    names = [default_worker.__name__, *modules, *(EXECUTOR_MODULES if modules else ())]
    original = parameter.RayParams
    parameter.RayParams = partial(original, worker_path=forkserver.__file__)
    os.environ[forkserver.WORKER] = default_worker.__file__
    os.environ[forkserver.MODULES] = ",".join(names)
    try:
        yield
    finally:
        parameter.RayParams = original
        del os.environ[forkserver.WORKER], os.environ[forkserver.MODULES]


def import_modules(names: list[str]) -> None:
    """Imports modules without a draw from Ray's generator of random ids: all children would continue its
    sequence.

    Importing Ray Data makes actor classes, each of which draws an id for itself: the system draws them here.
    """
    original = ray.actor.ActorClassID
    ray.actor.ActorClassID = _SystemIds
    try:
        for name in names:
            importlib.import_module(name)
    finally:
        ray.actor.ActorClassID = original


class _SystemIds:
    @staticmethod
    def from_random() -> "ray.ActorClassID":
        return ray.ActorClassID(os.urandom(ray.ActorClassID.size()))


def draw_ids_apart() -> bool:
    """Whether two children of this process draw different random ids: what it has imported may have seeded
    Ray's generator."""
    drawn = set()
    for _ in range(2):
        end, start = os.pipe()
        if os.fork() == 0:
            os.write(start, ray.UniqueID.from_random().binary())
            os._exit(0)
        os.wait()
        drawn.add(os.read(end, ray.UniqueID.size()))
        os.close(start)
        os.close(end)
    if len(drawn) < 2:
        print("an import has seeded Ray's random ids: every worker is started afresh", flush=True)
    return len(drawn) == 2
