"""Tasks of the `data` commands: over the cluster's CPUs with Ray, or, where they are few, in this process."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import ray

from deit_ray.cluster import connect

HERE = 5000  # so few images are worked on in this process: a Ray takes longer to start
AHEAD = 2  # tasks that wait for each CPU: their arguments are in memory


@contextlib.contextmanager
def workers(
    images: int, places: dict[str, str], address: str | None, warn: Callable[[str], None], verbose: bool
) -> Iterator[bool]:
    """Whether tasks run over Ray, which is there meanwhile: where a cluster is named, or there are many images.

    Args:
        places: URIs that tasks read or write, by what the user calls them.
        address, warn, verbose: see `connect.connected`.

    Raises:
        UserError: other nodes cannot reach one of the places.
    """
    if address is None and images <= HERE:
        yield False
        return
    with connect.connected(address, verbose, warn):
        for name, uri in places.items():
            connect.check_reachable(name, uri)
        yield True


def run_tasks(function: Callable, arguments: Iterable[tuple], parallel: bool) -> Iterator[tuple[int, object]]:
    """Calls a function with each of the arguments; yields (its number, the result) as they end.

    What a task raises is raised here, and ends the others; a task whose machine went away runs again.
    """
    if not parallel:
        yield from ((number, function(*given)) for number, given in enumerate(arguments))
        return
    task = ray.remote(num_cpus=1, retry_exceptions=False)(function)
    waiting, running = enumerate(arguments), {}
    try:
        while True:
            # a cluster that grows is asked anew
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
