"""MLflow's user interface over the database beside the results."""

import os
import socket
import sys

from deit_ray import storage
from deit_ray.errors import UserError

PORTS = 50  # that are tried


def database_of(results: str) -> str:
    """The URI of the MLflow database in a results folder.

    Raises:
        UserError: there is no database yet.
    """
    path = f"{storage.absolute(results)}/mlflow.db"
    if not os.path.exists(path):
        raise UserError(
            f"{results}: has no MLflow database yet; train or tune something first, or name --results"
        )
    return f"sqlite:///{path}"


def free_port(wanted: int) -> int:
    """The port on loopback that is wanted, or the next one that nothing listens on.

    Raises:
        UserError: none of the next ports can be used.
    """
    for port in range(wanted, min(wanted + PORTS, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:  # in use, or not allowed to this person
                continue
            return port
    raise UserError(
        f"--port {wanted}: neither it nor one of the next {PORTS} ports can be used; name another"
    )


def become_ui(database: str, port: int) -> None:
    """Replaces this process by an MLflow server on the loopback address; it does not return.

    Args:
        database: URI of an MLflow database.
    """
    os.environ |= {
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven idle processes
        "PYTHONWARNINGS": "ignore",
    }
    options = {
        "--backend-store-uri": database,
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
        "--uvicorn-opts": "--log-level warning",
    }
    words = [word for option in options.items() for word in option]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server", *words])
