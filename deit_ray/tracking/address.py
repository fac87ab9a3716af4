"""Where MLflow is: found and checked before anything starts, without an import of MLflow."""

import os
import re
from importlib.metadata import entry_points
from urllib.parse import urlsplit

from deit_ray import storage
from deit_ray.errors import UserError
from deit_ray.experiment.config import Experiment
from deit_ray.results.folders import EXPERIMENT
from deit_ray.tracking.tracked import Record

VARIABLE = "MLFLOW_TRACKING_URI"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
ALLOWED = (
    "allowed are http://HOST:PORT and https://HOST of an MLflow server, a database such as "
    "sqlite:////PATH/mlflow.db or postgresql://USER:PASSWORD@HOST/NAME, and databricks"
)


def with_tracking(experiment: Experiment) -> tuple[Experiment, str | None]:
    """The experiment of a new study or run, with the tracking URI that it keeps: MLFLOW_TRACKING_URI counts
    where `tracking.uri` names none.

    Returns:
        The experiment; and what a person must know if the variable counts, else None.

    Raises:
        UserError: MLflow cannot work with the URI.
    """
    uri = os.environ.get(VARIABLE)
    if not uri or experiment.tracking.uri:
        return experiment, None
    _check(VARIABLE, uri, storage.absolute(experiment.results.uri))
    note = f"MLflow at {shown(uri)}, as {VARIABLE} says; {EXPERIMENT} keeps it for a resume and sync"
    return experiment.with_overrides({"tracking.uri": uri}), note


def note_on_uri(experiment: Experiment) -> str | None:
    """Says that the runs of an experiment go elsewhere than MLFLOW_TRACKING_URI says; None if they do not."""
    uri = os.environ.get(VARIABLE)
    if not uri or uri == experiment.tracking.uri:
        return None
    if experiment.tracking.uri:
        return f"MLflow at {shown(experiment.tracking.uri)}: tracking.uri goes before {VARIABLE}"
    return f"{EXPERIMENT} names no tracking.uri, and goes before {VARIABLE}, which counts for new runs only"


def tracking_uri(experiment: Experiment, folder: str | None = None) -> str:
    """MLflow's URI for an experiment: `tracking.uri`, else a SQLite file next to the results.

    Args:
        folder: URI of the folder of a study or run that has begun. Earlier versions obeyed
            MLFLOW_TRACKING_URI at every start; only the record in the folder then names the server.

    Raises:
        UserError: MLflow cannot work with the URI; or there is none, and the results are not on a local disk.
    """
    results = storage.absolute(experiment.results.uri)
    if experiment.tracking.uri:
        _check("tracking.uri", experiment.tracking.uri, results)
        return experiment.tracking.uri
    record = Record.read(folder) if folder else None
    if record and not record.uri.startswith("sqlite:"):  # a file moves with the results
        return record.uri
    if not storage.is_local(results):
        raise UserError(
            f"tracking.uri: missing; results.uri is {results}, where no SQLite file can be; "
            "name an MLflow server"
        )
    return f"sqlite:///{results}/mlflow.db"


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
            f"{key}: {shown(uri)}: MLflow no longer keeps runs in a folder; {ALLOWED}; leave {key} out for a "
            "SQLite file next to the results; `mlflow migrate-filestore` brings the runs of a folder into one"
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
