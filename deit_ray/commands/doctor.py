"""Looks whether this machine, the cluster, the data and the tracking server are ready; nothing is changed.

Each check says what it found, and how to fix what is wrong. A check that cannot be made is wrong.
"""

from __future__ import annotations

import contextlib
import glob
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from deit_ray import storage
from deit_ray.cluster import machine, surroundings
from deit_ray.cluster.code import code_hash
from deit_ray.cluster.machine import Check, cheap_checks, disk_check, proxies
from deit_ray.errors import UserError, explain_os_error, first_line
from deit_ray.experiment.config import Experiment
from deit_ray.results.origin import package_versions
from deit_ray.terminal.format import counted, size
from deit_ray.terminal.session import Session
from deit_ray.tracking.address import has_store, shown, tracking_uri, with_tracking

ANSWER_S = 120.0  # longest wait for a node: its first process may have to start
MOST_APART_S = 5.0  # between the clocks of two machines
NO_DATA = ""  # data.uri of an experiment that names none
SAME_CODE = "bring the same sources to every node: ray up cluster.yaml"
AGAIN = "install the same versions on every node: pip install -c constraints.txt -e ."


def doctor(experiment: Experiment, session: Session | None = None) -> Iterator[Check]:
    """Yields what each check finds, the quick ones first.

    Args:
        experiment: names the data, the results and the tracking server.
        session: see `Session`: the cluster at its address is looked at, or a local Ray is started.
    """
    session = session or Session()
    yield from cheap_checks()
    yield proxies()
    yield from _guarded("PyTorch", _torch)
    yield from _guarded("results", lambda: _results(experiment))
    yield from _guarded("tracking", lambda: _tracking(experiment))
    yield from _guarded("Ray", lambda: _ray(experiment, session))


def _guarded(subject: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """What a check finds; an error that ends it is something wrong."""
    try:
        yield from check()
    except UserError as error:
        found, _, remedy = str(error).partition("; ")
        yield Check(subject, found, remedy or "see the sentence before")
    except OSError as error:
        yield Check(subject, explain_os_error(error), "see the sentence before")


def _torch() -> Iterator[Check]:
    """Whether torch and torchvision belong together, and see the GPUs that the system has."""
    again = "install deit-ray again: pip install -c constraints.txt -e ."
    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, OSError, RuntimeError) as error:
        yield Check("PyTorch", f"cannot be used: {first_line(error)}", again)
        return
    versions = f"torch {torch.__version__}"
    gpus = sorted(glob.glob("/dev/nvidia[0-9]*"))
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        kinds = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
        yield Check("PyTorch", f"{versions}, CUDA {torch.version.cuda}: {kinds}")
    elif gpus and torch.version.cuda is None:
        remedy = "install torch for CUDA: pip install -c constraints.txt torch torchvision"
        yield Check("PyTorch", f"{versions} is built for CPUs, but there are {len(gpus)} GPUs", remedy)
    elif gpus:
        found = f"{versions} for CUDA {torch.version.cuda} does not see the {len(gpus)} GPUs"
        yield Check("PyTorch", found, "update NVIDIA's driver; see nvidia-smi, and CUDA_VISIBLE_DEVICES")
    else:
        yield Check("PyTorch", f"{versions}; this machine has no GPU")


def _results(experiment: Experiment) -> Iterator[Check]:
    uri = experiment.results.uri
    storage.check_writable("results.uri", uri)
    if storage.is_local(uri):
        needed = _needed_bytes(experiment)
        why = f"{experiment.name} can take {size(needed)}; see deit-ray plan" if needed else ""
        yield disk_check("results", storage.local_path(uri), max(needed, machine.LEAST_DISK_BYTES), why)
        return
    if uri.startswith("s3://"):
        storage.check_conditions("results.uri", uri)
        yield Check("results", f"{uri}: can be written, and holds studies")
        return
    storage.list_names(uri)
    yield Check("results", f"{uri}: can be read; holds runs, no studies")


def _needed_bytes(experiment: Experiment) -> float:
    """The bytes that an experiment can take at most; 0 without a data set that can be read."""
    if experiment.data.uri == NO_DATA:
        return 0.0
    from deit_ray.commands.disk import disk_of
    from deit_ray.data import shards

    try:
        classes = len(shards.read_manifest(experiment.data.uri).classes)
    except UserError:  # the check of the data says why
        return 0.0
    trials = experiment.search.trials if experiment.search.space else 1
    return disk_of(experiment, classes, trials, 1).running


def _tracking(experiment: Experiment) -> Iterator[Check]:
    from deit_ray.tracking.probe import probe

    experiment, _ = with_tracking(experiment)
    uri, results = tracking_uri(experiment), storage.absolute(experiment.results.uri)
    if not has_store(uri):
        yield Check("tracking", f"{uri} will be made by the first run")
        return
    if urlsplit(uri).scheme in ("http", "https"):
        surroundings.go_direct()
    try:
        done = probe(uri, experiment.tracking.experiment, storage.join(results, "mlruns"))
    except UserError as error:
        remedy = "start it, or correct tracking.uri; deit-ray ui opens a database beside the results"
        yield Check("tracking", str(error), remedy)
        return
    yield Check("tracking", f"{shown(uri)}: {done}")


@dataclass(frozen=True)
class Node:
    """What a node says about itself.

    Attributes:
        host: its name.
        code: the hash of its deit_ray.
        versions: of Python and packages.
        clock: its time, in seconds since 1970.
        wrong: what its checks found wrong.
        data: what it reads of the data set, in words, or why it cannot; None without a data set.
        data_fails: whether it cannot.
        sees_results: whether it sees a file that the driver wrote into the results.
    """

    host: str
    code: str
    versions: dict[str, str]
    clock: float
    wrong: tuple[Check, ...]
    data: str | None
    data_fails: bool
    sees_results: bool


def look_at_node(data: str | None, probe: str | None) -> Node:
    """What the node on which it runs says about itself.

    Args:
        data: URI of a prepared data set, or None.
        probe: URI of a file that the driver wrote; None if the node need not see it.
    """
    wrong = tuple(check for check in cheap_checks() if check.remedy)
    found, fails = (None, False) if data is None else _read_data(data)
    sees = probe is None or _sees(probe)
    return Node(os.uname().nodename, code_hash(), package_versions(), time.time(), wrong, found, fails, sees)


def _read_data(uri: str) -> tuple[str, bool]:
    """Reads the manifest and the end of the first shard of each split; says what is there, and whether it
    failed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from deit_ray.data import shards

    try:
        manifest = shards.read_manifest(uri)
        for listed in manifest.splits.values():
            filesystem, path = storage.open_uri(storage.join(storage.absolute(uri), listed[0].file))
            with filesystem.open_input_file(path) as file:
                rows = pq.ParquetFile(file).metadata.num_rows
            if rows != listed[0].rows:
                return f"{listed[0].file} has {rows} rows, and {listed[0].rows} in the manifest", True
    except (UserError, OSError, pa.ArrowException) as error:
        return first_line(error), True
    images = ", ".join(f"{manifest.rows(split):,} {split}" for split in manifest.splits)
    return f"{images} images, fingerprint {manifest.fingerprint[:12]}", False


def _sees(uri: str) -> bool:
    try:
        return storage.exists(uri)
    except (UserError, OSError):
        return False


def _ray(experiment: Experiment, session: Session) -> Iterator[Check]:
    """Connects to the cluster, or starts a local Ray, and looks at its nodes."""
    from deit_ray.cluster import connect
    from deit_ray.trial.launch import check_cluster

    address = connect.chosen_address(session.address)
    begin = time.perf_counter()
    with session.connected():
        where = "starts on this machine" if address == "local" else f"answers at {address}"
        yield Check("Ray", f"{where}, in {time.perf_counter() - begin:.1f} s")
        resources = connect.possible_resources()
        yield _cluster_resources(resources)
        if experiment.data.uri != NO_DATA:
            try:
                device = check_cluster(experiment)
                yield Check("experiment", f"{experiment.name} fits, and trains on {device}")
            except UserError as error:
                found, _, remedy = str(error).partition("; ")
                yield Check("experiment", found, remedy or "correct it")
        yield from _nodes(experiment)


def _cluster_resources(resources: dict[str, float]) -> Check:
    amounts = [counted(resources.get(name, 0), name) for name in ("CPU", "GPU")]
    store = size(resources.get("object_store_memory", 0))
    found = f"{' and '.join(amounts)}, object store {store}"
    if resources.get("CPU", 0) < 1:
        return Check("resources", found, "add a node with CPUs: the stream and every trial need some")
    return Check("resources", found)


def _nodes(experiment: Experiment) -> Iterator[Check]:
    """Asks the nodes of the cluster, and says what is wrong with one of them or between them."""
    data = storage.absolute(experiment.data.uri) if experiment.data.uri != NO_DATA else None
    with _probe_file(experiment) as probe:
        answers, failures, apart = _ask_nodes(data, probe)
    yield from failures
    yield from compare_nodes(answers, apart, data, experiment.results.uri)


def compare_nodes(
    nodes: list[Node], apart: dict[str, float], data: str | None, results: str
) -> Iterator[Check]:
    """What is wrong on a node, and whether all nodes have the same code, packages, data and time.

    Args:
        apart: seconds that a node's clock is ahead of this machine's, by host.
        data, results: URIs, for messages.
    """
    for node in nodes:
        for check in node.wrong:
            yield replace(check, subject=f"{check.subject} on {node.host}")
        if not node.sees_results:
            yield Check(
                f"results on {node.host}",
                f"{results}: what one node writes there, this one does not see",
                "set results.uri to s3://BUCKET/PATH, or to a file system that every node mounts",
            )
        if node.data_fails:
            yield Check(f"data on {node.host}", node.data, "bring the data there, or allow it to be read")
    good = {node.host: node.data for node in nodes if node.data is not None and not node.data_fails}
    if good:
        yield _same("data", good, f"{data}: ", "copy the data set again")
    yield _same("code", {node.host: node.code for node in nodes}, "the same on every node: ", SAME_CODE)
    yield from _same_versions(nodes)
    yield from _same_time(apart)


def _same(subject: str, values: dict[str, str], prefix: str, remedy: str) -> Check:
    """Whether all nodes say the same."""
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{value} on {host}" for host, value in values.items())
        return Check(subject, f"differs: {listed}", remedy)
    return Check(subject, prefix + next(iter(values.values()), "no node answers"), None if values else remedy)


def _same_versions(nodes: list[Node]) -> Iterator[Check]:
    here = package_versions()
    wrong = {
        f"{name} {node.versions.get(name, 'missing')} on {node.host}, here {here.get(name, 'missing')}"
        for node in nodes
        for name in here.keys() | node.versions.keys()
        if here.get(name) != node.versions.get(name)
    }
    if wrong:
        yield Check("versions", "; ".join(sorted(wrong)), AGAIN)
    elif nodes:
        found = f"ray {here['ray']}, torch {here['torch']} and others, the same on every node"
        yield Check("versions", found)


def _same_time(apart: dict[str, float]) -> Iterator[Check]:
    far = {host: s for host, s in apart.items() if abs(s) > MOST_APART_S}
    if far:
        listed = ", ".join(f"{host} by {s:+.0f} s" for host, s in far.items())
        remedy = "set each: sudo timedatectl set-ntp true"
        yield Check("clocks", f"differ from this machine's: {listed}", remedy)
    elif len(apart) > 1:
        yield Check("clocks", f"{counted(len(apart), 'node')} agree within {MOST_APART_S:.0f} s")


@contextlib.contextmanager
def _probe_file(experiment: Experiment) -> Iterator[str | None]:
    """A file in the results while it is entered; None if this machine is the only node."""
    from deit_ray.cluster import connect

    uri = experiment.results.uri
    if connect.possible_nodes() < 2 or (storage.is_local(uri) and not storage.exists(uri)):
        yield None
        return
    probe = storage.join(storage.absolute(uri), f".probe-{uuid.uuid4().hex}")
    storage.write_bytes(probe, b"probe")
    try:
        yield probe
    finally:
        storage.remove(probe)


def _ask_nodes(data: str | None, probe: str | None) -> tuple[list[Node], list[Check], dict[str, float]]:
    """Asks every node of the cluster about itself.

    Returns:
        The answers; what is wrong about nodes that do not answer; and by host, how many seconds its clock is
        ahead of this machine's.
    """
    import ray

    from deit_ray.cluster.nodes import on_node

    hosts = {}
    for node in ray.nodes():
        if node["Alive"]:
            asked = on_node(node["NodeID"], look_at_node).remote(data, probe)
            name = node["NodeManagerHostname"]
            is_known = name in hosts.values()  # several nodes on one machine
            hosts[asked] = f"{name}, node {node['NodeID'][:6]}" if is_known else name
    answers, failures, apart, deadline = [], [], {}, time.monotonic() + ANSWER_S
    pending = list(hosts)
    while pending:
        done, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            break
        now, host = time.time(), hosts[done[0]]
        try:
            node = ray.get(done[0])
        except ray.exceptions.RayError as error:
            found = f"cannot run deit-ray's code: {first_line(getattr(error, 'cause', None) or error)}"
            failures.append(Check(f"node {host}", found, f"{SAME_CODE}; {AGAIN}"))
        else:
            answers.append(replace(node, host=host))
            apart[host] = node.clock - now
    for host in map(hosts.get, pending):
        found = f"does not answer within {ANSWER_S:.0f} s"
        failures.append(Check(f"node {host}", found, "see its logs, or end it"))
    return answers, failures, apart
