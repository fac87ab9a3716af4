"""Runs the tasks of the `data` commands: with Ray, or in this process if there are few images."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import ray

from deit_ray.cluster import connect

HERE = 5000  # up to this many images are processed in this process, since Ray would take longer to start
AHEAD = 2  # tasks submitted for each CPU; the arguments of all submitted tasks are in memory


@contextlib.contextmanager
def workers(
    images: int, places: dict[str, str], address: str | None, warn: Callable[[str], None], verbose: bool
) -> Iterator[bool]:
    """Connects to Ray if `address` names a cluster or there are many images; yields whether tasks use Ray.

    Args:
        images: number of images to process.
        places: URIs that tasks read or write, by their name on the command line.
        address, warn, verbose: see `connect.connected`.

    Raises:
        UserError: other nodes of the cluster cannot reach one of the places.
    """
    if address is None and images <= HERE:
        yield False
        return
    with connect.connected(address, verbose, warn):
        for name, uri in places.items():
            connect.check_reachable(name, uri)
        yield True


def run_tasks(function: Callable, arguments: Iterable[tuple], parallel: bool) -> Iterator[tuple[int, object]]:
    """Calls a function with each of the arguments; yields (number of the call, result) as calls end.

    An exception of a task is raised here and cancels the other tasks. If a machine is lost, its tasks are
    repeated.
    """
    if not parallel:
        yield from ((number, function(*given)) for number, given in enumerate(arguments))
        return
    task = ray.remote(num_cpus=1, retry_exceptions=False)(function)
    waiting, running = enumerate(arguments), {}
    try:
        while True:
            # the cluster may have grown since the last look
            while len(running) < AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1))) and (
                following := next(waiting, None)
            ):
                running[task.remote(*following[1])] = following[0]
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            number = running.pop(done[0])
            try:
                result = ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None
            yield number, result
    finally:
        for reference in running:
            ray.cancel(reference, force=False)
