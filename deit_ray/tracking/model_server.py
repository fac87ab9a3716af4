"""The requests about models that deliveries send to an MLflow server."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from deit_ray import storage
from deit_ray.errors import UserError
from deit_ray.outcome import MODEL
from deit_ray.results.folders import EXPERIMENT
from deit_ray.tracking import models
from deit_ray.tracking.model_files import write_model_files
from deit_ray.tracking.model_state import FoundModel, Registered, Version
from deit_ray.tracking.requests import IDENTITY
from deit_ray.tracking.server import Refused, Server, is_refusal, is_unknown, local_copy

PAGE = 100  # models or versions in one answer
# answers of a server that has no models or no registry, or that has none for this login
MISSING = ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "FEATURE_DISABLED", "PERMISSION_DENIED")
TAKEN = ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS")
SHORT = 8  # letters of an identity that tell two registered models apart


class ModelServer(Server):
    """Sends the requests of `Server`, and those about models."""

    def find_model(self, run_id: str, request: models.FindModel) -> FoundModel:
        """The model of a run, by its identity. Others of the identity are named, such as a deleted run's."""
        found = self.find_models(IDENTITY, request.identity)
        own = [model for model in found if model.source_run_id == run_id]
        if not own:
            others = tuple(model.model_id for model in found)
            return FoundModel(others=others, has_file=storage.exists(request.uri))
        kept = own[0]
        return FoundModel(
            id=kept.model_id,
            location=kept.artifact_location,
            is_ready=str(kept.status) == "READY",
            is_linked=kept.model_id in self._outputs(run_id),
            metrics=frozenset((metric.key, metric.value) for metric in kept.metrics or ()),
            others=tuple(model.model_id for model in found if model is not kept),
        )

    def find_models(self, tag: str, value: str) -> list:
        """MLflow's models whose tag has a value, the earliest first."""
        query, token, found = f"tags.`{tag}` = '{value}'", None, []
        while True:
            page = self.ask(
                self.client.search_logged_models,
                [self.experiment_id],
                query,
                max_results=PAGE,
                page_token=token,
            )
            found += page
            token = page.token
            if not token:
                return sorted(found, key=lambda model: (model.creation_timestamp, model.model_id))

    def create_model(self, run_id: str, request: models.CreateModel) -> FoundModel:
        made = self.ask(
            self.client.create_logged_model,
            self.experiment_id,
            name=request.name,
            source_run_id=run_id,
            tags=dict(request.tags),
            params=dict(request.params),
        )
        return FoundModel(made.model_id, made.artifact_location)

    def upload_model(self, run_id: str, request: models.UploadModel) -> None:
        """Uploads the files of a model; in a folder of this machine, the weights are a link if possible."""
        model_id = request.model_id
        with contextlib.ExitStack() as stack:
            weights = stack.enter_context(local_copy(request.weights))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deit_ray-")))
            write_model_files(folder, os.path.getsize(weights), run_id, model_id)
            if storage.exists(request.experiment):
                (folder / EXPERIMENT).write_bytes(storage.read_bytes(request.experiment))
            if not link_file(weights, request.location):
                self.ask(self.client.log_model_artifact, model_id, weights)
            self.ask(self.client.log_model_artifacts, model_id, str(folder))

    def finish_model(self, model_id: str) -> None:
        self.ask(self.client.finalize_logged_model, model_id, "READY")

    def delete_model(self, model_id: str) -> None:
        """Deletes a model. MLflow keeps its files until its `gc`."""
        self.ask(self.client.delete_logged_model, model_id)

    def link_model(self, run_id: str, model_id: str) -> None:
        """Makes a model an output of a run; the run must not list it already."""
        from mlflow.entities import LoggedModelOutput

        self.ask(self.client.log_outputs, run_id, [LoggedModelOutput(model_id, step=0)])

    def log_model_metrics(self, run_id: str, request: models.LogModelMetrics) -> None:
        """Logs metrics of a run as its model's too: with the run's own points, which MLflow stores once."""
        from mlflow.entities import Metric

        metrics = []
        for name, value in request.metrics:
            known = self.ask(self.client.get_metric_history, run_id, name)
            time_ms, step = (known[-1].timestamp, known[-1].step) if known else (request.time_ms, 0)
            metrics.append(Metric(name, value, time_ms, step, model_id=request.model_id))
        self.ask(self.client.log_batch, run_id, metrics=metrics)

    def find_registered(self, run_id: str, request: models.FindRegistered) -> Registered:
        """The registered model of a study; where its name is taken by another one, a longer name."""
        names = names_for(request.study, request.identity)
        for name in names:
            known = self.registered_model(name)
            if known is None or known.tags.get(IDENTITY) == request.identity:
                break
        else:
            raise Refused from UserError(f"its names {' and '.join(names)} are taken by other models")
        tags = self.ask(self.client.get_logged_model, request.model_id).tags
        best = known.aliases.get(models.ALIAS) if known else None
        return Registered(
            name=name,
            exists=known is not None,
            versions=tuple(self.versions(name)) if known else (),
            best=best if best is None else str(best),  # MLflow's own stores give a number or its text
            versions_tag=tags.get(models.VERSIONS_TAG, ""),
            is_linked=request.model_id in self._outputs(run_id),
        )

    def registered_model(self, name: str):
        """MLflow's registered model of a name; None if it has none."""
        try:
            return self.ask(self.client.get_registered_model, name)
        except Exception as error:
            if not is_unknown(error):
                raise
            return None

    def versions(self, name: str) -> list[Version]:
        """The versions of a registered model that this package made."""
        token, found = None, []
        while True:
            query = f"name = '{name}'"
            page = self.ask(self.client.search_model_versions, query, max_results=PAGE, page_token=token)
            found += [
                Version(str(version.version), version.tags[IDENTITY], version.tags.get(models.MODEL_ID, ""))
                for version in page
                if IDENTITY in version.tags
            ]
            token = page.token
            if not token:
                return found

    def create_registered(self, request: models.CreateRegistered) -> bool:
        """Creates a registered model; False if somebody created one of the name just now."""
        text = f"The best students of the study {request.study}. models:/{request.name}@best is the best one."
        try:
            self.ask(self.client.create_registered_model, request.name, dict(request.tags), text)
        except Exception as error:
            if getattr(error, "error_code", None) not in TAKEN:
                raise
            return False
        return True

    def create_version(self, request: models.CreateVersion) -> Version:
        best = request.best
        # a database's own client looks for models:/ID at another address, that of the whole process
        is_server = self.uri.startswith(("http:", "https:", "databricks"))
        tags = dict(best.tags) | {IDENTITY: best.identity, models.MODEL_ID: best.model_id}
        made = self.ask(
            self.client.create_model_version,
            request.name,
            source=f"models:/{best.model_id}" if is_server else best.location,
            run_id=best.run_id,
            tags=tags,
            description=best.run_name,
            await_creation_for=0,
            model_id=best.model_id,
        )
        return Version(str(made.version), best.identity, best.model_id)

    def set_alias(self, request: models.SetAlias) -> None:
        self.ask(self.client.set_registered_model_alias, request.name, models.ALIAS, request.number)

    def delete_version(self, name: str, number: str) -> None:
        self.ask(self.client.delete_model_version, name, number)

    def has_versions(self, name: str) -> bool:
        """Whether a registered model has any version, also one that a person made."""
        return bool(self.ask(self.client.search_model_versions, f"name = '{name}'", max_results=1))

    def delete_registered(self, name: str) -> None:
        self.ask(self.client.delete_registered_model, name)

    def tag_versions(self, request: models.TagVersions) -> None:
        tags = {models.VERSIONS_TAG: request.text}
        self.ask(self.client.set_logged_model_tags, request.model_id, tags)

    def _outputs(self, run_id: str) -> set[str]:
        """MLflow's ids of the models that a run lists as its outputs."""
        outputs = self.ask(self.client.get_run, run_id).outputs
        return {output.model_id for output in outputs.model_outputs} if outputs else set()

    def ask(self, function: Callable, *arguments, **options):
        """Sends one request about models.

        Raises:
            Refused: MLflow refuses it, or has no models.
        """
        try:
            return self._request(function, *arguments, **options)
        except Exception as error:
            if getattr(error, "error_code", None) in MISSING:
                raise NoModels from error
            if is_refusal(error):
                raise Refused from error
            raise


class NoModels(Refused):
    """MLflow has no models or no registry, or they are not for this login."""


def names_for(study: str, identity: str) -> tuple[str, str]:
    """The names that a study's registered model may have: the second, where the first is taken."""
    return study, f"{study}-{identity[:SHORT]}"


def local_folder(location: str) -> str | None:
    """The path of a folder of MLflow's store of artifacts; None if it is not on this machine."""
    if urlsplit(location).scheme not in ("", "file"):
        return None
    from mlflow.utils.file_utils import local_file_uri_to_path

    return local_file_uri_to_path(location)


def link_file(path: str, location: str) -> bool:
    """Makes a file also a file of a folder of this machine, without a copy; False where that is impossible.

    Args:
        location: URI of the folder.
    """
    folder = local_folder(location)
    if folder is None:
        return False
    target = Path(folder, MODEL)
    partial = target.with_name(f".{MODEL}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        os.link(path, partial)
        os.replace(partial, target)  # where both are the same file already, this does nothing
        partial.unlink(missing_ok=True)
    except OSError:  # another disk, or one without links: the caller uploads a copy
        return False
    return True
