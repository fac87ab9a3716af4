"""Finds a model in MLflow by its URI, such as models:/digits_search-1@best, and brings it to this machine."""

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Callable

from deit_ray.errors import UserError
from deit_ray.outcome import MODEL
from deit_ray.results.folders import EXPERIMENT
from deit_ray.tracking.address import has_store, shown
from deit_ray.tracking.delivery import quiet_mlflow
from deit_ray.tracking.model_server import local_folder
from deit_ray.tracking.reasons import naming_server
from deit_ray.tracking.server import is_unknown

NAMED = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[^/@:]+)|/(?P<version>\d+|latest))")
MODEL_ID = re.compile(r"models:/(?P<id>m-[0-9a-f]+)")
RUN = re.compile(r"runs:/(?P<id>[^/]+)(?:/.+)?")
ALLOWED = "models:/STUDY@best, models:/STUDY/VERSION, models:/MODEL_ID and runs:/RUN_ID/model"
LISTED = 10  # names in a message


def is_model_uri(model: str) -> bool:
    """Whether a person names a model in MLflow."""
    return model.startswith(("models:", "runs:"))


def registered_name(model: str) -> str | None:
    """The name of the registered model in a model's URI, such as digits_search-1; None if it names none."""
    found = NAMED.fullmatch(model)
    return found["name"] if found else None


def fetch_model(model: str, uri: str) -> str:
    """The local path of a model's model.safetensors; a copy goes when the process ends.

    The experiment.yaml of its run is beside it.

    Args:
        model: URI of the model; see `ALLOWED`.
        uri: MLflow's tracking URI.

    Raises:
        UserError: it is no such URI, MLflow has no such model, or deit-ray did not make it.
        UnavailableError: MLflow or its store of artifacts does not answer.
    """
    if not any(pattern.fullmatch(model) for pattern in (NAMED, MODEL_ID, RUN)):
        raise UserError(f"{model}: is no model that MLflow can have; allowed are {ALLOWED}")
    if not has_store(uri):
        raise UserError(f"{model}: there is no MLflow at {shown(uri)}")
    quiet_mlflow()
    with naming_server(uri):
        from mlflow.tracking import MlflowClient

        return _fetch(model, Finder(MlflowClient(tracking_uri=uri), model, shown(uri)).location(), uri)


class Finder:
    """Finds where MLflow keeps the files of a model.

    Args:
        client: MLflow's client.
        model: URI of the model.
        place: MLflow's address, for messages.
    """

    def __init__(self, client, model: str, place: str):
        self.client, self.model, self.place = client, model, place

    def location(self) -> str:
        """URI of the folder with the model's files.

        Raises:
            UserError: MLflow has no such model.
        """
        if named := NAMED.fullmatch(self.model):
            name, version = named["name"], self._version(named)
            return self.client.get_model_version_download_uri(name, version)
        if by_id := MODEL_ID.fullmatch(self.model):
            found = self._get(self.client.get_logged_model, by_id["id"])
            return self._known(found, "has no such model").artifact_location
        run = self._known(self._get(self.client.get_run, RUN.fullmatch(self.model)["id"]), "has no such run")
        outputs = run.outputs.model_outputs if run.outputs else []
        models = [self._get(self.client.get_logged_model, output.model_id) for output in outputs]
        latest = max(filter(None, models), key=lambda found: found.creation_timestamp, default=None)
        return self._known(latest, "has no model of this run, which has not finished").artifact_location

    def _version(self, named: re.Match) -> str:
        """The number of the version that is meant."""
        name, alias, version = named["name"], named["alias"], named["version"]
        found = self._get(self.client.get_registered_model, name)
        if found is None:
            names = [known.name for known in self.client.search_registered_models()]
            self._known(None, f"has no registered model {name}; it has: {_listed(names)}")
        numbers = [v.version for v in self.client.search_model_versions(f"name = '{name}'")]
        numbers = [str(number) for number in sorted(map(int, numbers))]
        if alias is not None:
            aliases = _listed(f"{name}@{known}" for known in found.aliases)
            known = found.aliases.get(alias)
            return self._known(known, f"has no alias {alias} of {name}; it has: {aliases}")
        wanted = numbers[-1:] if version == "latest" else [n for n in numbers if n == version]
        missing = f"has no version {version} of {name}; it has: {_listed(numbers)}"
        return self._known(next(iter(wanted), None), missing)

    def _get(self, function: Callable, key: str):
        """MLflow's answer; None if MLflow has nothing of this name or id."""
        try:
            return function(key)
        except Exception as error:
            if not is_unknown(error):
                raise
            return None

    def _known(self, found, missing: str):
        if found is None:
            raise UserError(f"{self.model}: MLflow at {self.place} {missing}")
        return found


def _listed(names) -> str:
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return (", ".join(names[:LISTED]) or "none") + more


def _fetch(model: str, location: str, uri: str) -> str:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    if (here := local_folder(location)) is not None:
        path = os.path.join(here, MODEL)
        if not os.path.isfile(path):
            raise UserError(f"{model}: its file is not there: {path}")
        return path
    repository = get_artifact_repository(location, tracking_uri=uri)
    names = [file.path for file in repository.list_artifacts()]
    if MODEL not in names:
        raise UserError(f"{model}: has no {MODEL} at {location}: deit-ray did not make it")
    folder = tempfile.mkdtemp(prefix="deit_ray-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in (MODEL, EXPERIMENT):
        if name in names:
            repository.download_artifacts(name, folder)
    return os.path.join(folder, MODEL)
