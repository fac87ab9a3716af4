"""Starts the processes of a local Ray as forks of one that has imported everything already.

Ray starts a fresh Python for every actor, and for a task when no process is idle. A trial needs about eight
of them, and each imports for one to six seconds. `ray_private.forked_workers` has the raylet run this file
instead of Ray's own worker. It passes its arguments, environment, folder and streams to the fork server of
this Ray, which it starts where there is none. The child that the fork server makes then runs Ray's worker: a
process of its own, like any other of Ray's.

Without a fork server, and for processes with a runtime environment, this file becomes Ray's worker itself. It
runs once for every process, so it imports little before.
"""

import array
import marshal
import os
import socket
import sys

# environment variables, from `ray_private.forked_workers`
WORKER = "DEIT_RAY_WORKER"  # path of Ray's worker
MODULES = "DEIT_RAY_MODULES"  # names of the modules to import, separated by commas

SOCKET = "fork"  # beside the raylet's, whose name is longer: the length of a socket's path is limited
BACKLOG = 1024
RECEIVE_S = 5.0
FORKED, REFUSED = b"1", b"0"


def start_worker(arguments: list[str]) -> None:
    """Has the fork server start a worker with these arguments, or becomes one; returns when it has
    started."""
    options = dict(argument.partition("=")[::2] for argument in arguments)
    is_plain = options.get("--runtime-env-hash", "0") == "0" and "--worker-type" not in options
    if not (is_plain and has_forked(arguments, os.path.dirname(options["--raylet-name"]))):
        os.execv(sys.executable, [sys.executable, os.environ[WORKER], *arguments])


def has_forked(arguments: list[str], folder: str) -> bool:
    """Whether the fork server of the Ray whose sockets lie in a folder has started a worker with these
    arguments."""
    request = marshal.dumps((arguments, os.getcwd(), dict(os.environ)))
    streams = array.array("i", [0, 1, 2])
    try:
        with connect(os.path.join(folder, SOCKET)) as server:
            header = len(request).to_bytes(8, "big")
            server.sendmsg([header], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
            server.sendall(request)
            return server.recv(1) == FORKED  # comes when the fork server has imported everything
    except OSError:
        return False


def connect(path: str) -> socket.socket:
    """A connection to the fork server, which is started where it does not run."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        start_server(path)
        connection.connect(path)
    return connection


def start_server(path: str) -> None:
    """Starts the fork server, unless another process has just done so. Connections wait until it has imported
    everything."""
    import fcntl

    with (
        open(f"{path}.lock", "w") as lock,
        socket.socket(socket.AF_UNIX) as other,
        socket.socket(socket.AF_UNIX) as server,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            other.connect(path)
            return
        except FileNotFoundError:
            pass
        except ConnectionRefusedError:  # left behind by a dead one
            os.unlink(path)
        server.bind(path)
        os.chmod(path, 0o600)  # who can connect can run code
        server.listen(BACKLOG)
        if os.fork() == 0:
            os.setpgid(0, 0)  # the raylet kills the process group of every worker that ends
            os.set_inheritable(server.fileno(), True)
            log = os.path.join(os.path.dirname(os.path.dirname(path)), "logs", "forkserver.log")
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            for stream, file in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
                os.dup2(file, stream)
            command = [sys.executable, os.path.abspath(__file__), str(server.fileno())]
            os.execve(sys.executable, command, os.environ | {"OMP_NUM_THREADS": "1"})


def serve(server: socket.socket) -> tuple | None:
    """Imports the modules, then forks a child for each request, until the raylet is gone.

    Returns:
        In a child, the arguments of `become_worker`; None when the raylet is gone.
    """
    import gc
    import select
    import signal

    from deit_ray.cluster import ray_private

    ray_private.import_modules(os.environ[MODULES].split(","))
    answer = FORKED if ray_private.draw_ids_apart() else REFUSED
    gc.collect()
    gc.freeze()  # else the first collection of every child would copy everything
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as in the raylet: nobody waits for workers
    raylet = os.pidfd_open(int(os.environ[ray_private.RAYLET_PID]))
    poll = select.poll()
    poll.register(raylet, select.POLLIN)
    poll.register(server, select.POLLIN)
    while not any(ready == raylet for ready, _ in poll.poll()):
        with server.accept()[0] as connection:
            request, streams = receive(connection)
            if request is not None and answer == FORKED and os.fork() == 0:
                server.close()
                os.close(raylet)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                    os.close(stream)
                return request
            for stream in streams:
                os.close(stream)
            answer_to(connection, answer)
    return None


def receive(connection: socket.socket) -> tuple[tuple | None, list[int]]:
    """A request and its three streams; None where its sender died meanwhile."""
    connection.settimeout(RECEIVE_S)
    streams, request = array.array("i"), b""
    try:
        header, control, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * streams.itemsize))
        for _, _, data in control:
            streams.frombytes(data)
        length = int.from_bytes(header, "big")
        while len(request) < length and (part := connection.recv(length - len(request))):
            request += part
    except OSError as error:
        print(f"a request has not arrived: {error}", flush=True)
        return None, list(streams)
    is_whole = length and len(request) == length and len(streams) == 3
    return marshal.loads(request) if is_whole else None, list(streams)


def answer_to(connection: socket.socket, answer: bytes) -> None:
    try:
        connection.sendall(answer)
    except OSError as error:
        print(f"an answer has not arrived: {error}", flush=True)


def become_worker(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """Runs Ray's worker in this process, as if it had been started with these arguments, there and so."""
    import random
    import runpy

    import numpy as np

    os.setpgid(0, 0)  # as the raylet does with each worker
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    np.random.seed()
    worker = os.environ[WORKER]
    sys.argv = [worker, *arguments]
    sys.path[0] = os.path.dirname(worker)
    runpy.run_path(worker, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) == 2:  # the fork server
        sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        request = serve(socket.socket(fileno=int(sys.argv[1])))
        if request is not None:
            become_worker(*request)
    else:
        start_worker(sys.argv[1:])
