"""Where MLflow is: found and checked before anything starts, without an import of MLflow."""

import os
import re
from importlib.metadata import entry_points
from urllib.parse import urlsplit

from deit_ray import storage
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment

VARIABLE = "MLFLOW_TRACKING_URI"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
ALLOWED = (
    "allowed are http://HOST:PORT and https://HOST of an MLflow server, a database such as "
    "sqlite:////PATH/mlflow.db or postgresql://USER:PASSWORD@HOST/NAME, and databricks"
)


def tracking_uri(experiment: Experiment) -> str:
    """MLflow's URI for an experiment: `tracking.uri`, else MLFLOW_TRACKING_URI, else a SQLite file next to
    the results.

    Raises:
        UserError: MLflow cannot work with the URI; or there is none, and the results are not on a local disk.
    """
    results = storage.absolute(experiment.results.uri)
    for key, uri in (("tracking.uri", experiment.tracking.uri), (VARIABLE, os.environ.get(VARIABLE))):
        if uri:
            _check(key, uri, results)
            return uri
    if not storage.is_local(results):
        raise UserError(
            f"tracking.uri: missing; results.uri is {results}, where no SQLite file can be; "
            "name an MLflow server"
        )
    return f"sqlite:///{results}/mlflow.db"


def note_on_uri(experiment: Experiment) -> str | None:
    """What a person must know who has set MLFLOW_TRACKING_URI; None if it is not set."""
    uri = os.environ.get(VARIABLE)
    if not uri or uri == experiment.tracking.uri:
        return None
    if experiment.tracking.uri:
        return f"MLflow at {shown(experiment.tracking.uri)}: tracking.uri goes before {VARIABLE}"
    return f"MLflow at {shown(uri)}, as {VARIABLE} says"


def has_store(uri: str) -> bool:
    """Whether there can be runs at a URI: MLflow would make a SQLite file that is missing."""
    scheme, _, path = uri.partition(":///")
    return not scheme.startswith("sqlite") or os.path.exists(path.partition("?")[0])


def shown(uri: str) -> str:
    """A URI without its password."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", uri)


def _check(key: str, uri: str, results: str) -> None:
    scheme, _, rest = uri.partition(":")
    kind = scheme.partition("+")[0].lower()
    if uri in ("databricks", "databricks-uc") or (kind in ("databricks", "databricks-uc") and "://" in uri):
        _check_databricks(key, uri)
    elif "://" not in uri or kind == "file":
        raise UserError(
            f"{key}: {shown(uri)}: MLflow no longer keeps runs in a folder; {ALLOWED}; without a "
            "tracking.uri a SQLite file next to the results is used"
        )
    elif kind in ("http", "https"):
        try:
            parsed = urlsplit(uri)
            is_whole = bool(parsed.hostname) and parsed.port != 0
        except ValueError:
            is_whole = False
        if not is_whole:
            raise UserError(f"{key}: {shown(uri)}: is not a whole address; {ALLOWED}")
    elif kind == "sqlite":
        path = rest.removeprefix("//").removeprefix("/").partition("?")[0]
        folder = os.path.dirname(os.path.abspath(path))
        if not path or path == ":memory:":
            raise UserError(f"{key}: {uri}: names no file; {ALLOWED}")
        if not (os.path.isdir(folder) or folder == results):  # a run makes the folder of its results
            raise UserError(f"{key}: {uri}: there is no folder {folder}; make it, or correct the path")
    elif kind not in DATABASES and kind not in {entry.name for entry in _plugins()}:
        raise UserError(f"{key}: {shown(uri)}: {scheme} is unknown to MLflow; {ALLOWED}")


def _plugins():
    return entry_points(group="mlflow.tracking_store")


def _check_databricks(key: str, uri: str) -> None:
    has_login = os.environ.get("DATABRICKS_HOST") or os.environ.get("DATABRICKS_CONFIG_PROFILE")
    file = os.environ.get("DATABRICKS_CONFIG_FILE") or os.path.expanduser("~/.databrickscfg")
    if not (has_login or os.path.isfile(file)):
        raise UserError(
            f"{key}: {uri}: Databricks needs a login: set DATABRICKS_HOST and DATABRICKS_TOKEN, or run "
            "`databricks configure`"
        )
