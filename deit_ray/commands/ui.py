"""MLflow's user interface over the database beside the results, and Optuna's own tools."""

import os
import sys

from deit_ray import storage
from deit_ray.errors import UserError


def database_of(results: str) -> str:
    """The URI of the MLflow database in a results folder.

    Raises:
        UserError: there is no database yet; or the results are on an object store, where none can be.
    """
    if not storage.is_local(results):
        raise UserError(
            f"{results}: no MLflow database can be there; open the MLflow server that tracking.uri names, or "
            "copy the studies for optuna-dashboard: --optuna FILE"
        )
    path = f"{storage.absolute(results)}/mlflow.db"
    if not os.path.exists(path):
        raise UserError(
            f"{results}: has no MLflow database yet; train or tune something first, or name --results"
        )
    return f"sqlite:///{path}"


def copy_studies(results: str, path: str) -> list[str]:
    """Copies the Optuna studies in a results folder into a new SQLite file, for Optuna's own tools.

    Returns:
        The names of the studies.

    Raises:
        UserError: the file exists or cannot be written, or there is no study.
    """
    from deit_ray.study.database import copy_database
    from deit_ray.study.study import Study, names_of_studies

    storage.check_writable("--optuna", os.path.dirname(storage.local_path(path)))
    if os.path.exists(path):
        raise UserError(f"--optuna {path}: exists already; name a new file")
    names = names_of_studies(results)
    if not names:
        raise UserError(f"{results}: has no studies")
    for name in names:
        copy_database(Study.open(name, results).database, storage.local_path(path))
    return names


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
