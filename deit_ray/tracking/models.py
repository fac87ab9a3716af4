"""The next requests for the models of a run: after all others, and before the run's record is closed.

A finished run has one model in MLflow. A study's run has a registered model, whose version with the alias
`best` is the model of the best trial. Like requests.py, this is a function of the desired and the delivered
state, and every request may be repeated: a model or version is looked for by its tag `deit_ray.id` before it
is made.
"""

import json
import re
from dataclasses import dataclass, replace
from typing import ClassVar

from deit_ray import storage
from deit_ray.results.folders import EXPERIMENT, name_of
from deit_ray.tracking import requests
from deit_ray.tracking.model_state import Best, Registered, Version
from deit_ray.tracking.requests import IDENTITY, PARAM_CHARS, TAG_CHARS, Note, Pairs, Request, fitting
from deit_ray.tracking.tracked import Delivered, Desired, stored

RUN_IDENTITY = "deit_ray.run"  # tag of a model: the identity of its run
MODEL_ID = "deit_ray.model"  # tag of a version: MLflow's id of its model
KEPT_TAGS = ("deit_ray.study", "deit_ray.trial", "deit_ray.experiment", "deit_ray.folder")  # of the run
ALIAS = "best"
VERSIONS_TAG = "mlflow.modelVersions"  # MLflow's own tag of a model that is registered


class ModelRequest:
    """A request about models. All of them may be refused: some servers have no models or no registry."""

    part: ClassVar[str] = "its model"


@dataclass(frozen=True)
class FindModel(ModelRequest):
    """Look for the models of an identity, or else for the model.safetensors."""

    identity: str
    uri: str


@dataclass(frozen=True)
class DeleteModel(ModelRequest):
    """Delete a second model of the same identity: the answer to a performed request was lost."""

    model_id: str


@dataclass(frozen=True)
class CreateModel(ModelRequest):
    name: str
    tags: Pairs
    params: Pairs


@dataclass(frozen=True)
class UploadModel(ModelRequest):
    """Upload the files of a model: weights, description, and the experiment of the run."""

    model_id: str
    location: str
    weights: str
    experiment: str


@dataclass(frozen=True)
class FinishModel(ModelRequest):
    """Tell MLflow that the model is whole."""

    model_id: str


@dataclass(frozen=True)
class LinkModel(ModelRequest):
    """Make the model an output of the run."""

    model_id: str


@dataclass(frozen=True)
class LogModelMetrics(ModelRequest):
    """Log the last values of the run as the model's too, so that MLflow's table of models can be sorted."""

    model_id: str
    metrics: tuple[tuple[str, float], ...]
    time_ms: int


class RegistryRequest(ModelRequest):
    """A request about the registered model of a study."""

    part: ClassVar[str] = "its registered model"


@dataclass(frozen=True)
class FindRegistered(RegistryRequest):
    """Look for the registered model of a study, its versions, and what MLflow says of the best model."""

    study: str
    identity: str
    model_id: str


@dataclass(frozen=True)
class CreateRegistered(RegistryRequest):
    name: str
    study: str
    tags: Pairs


@dataclass(frozen=True)
class CreateVersion(RegistryRequest):
    name: str
    best: Best


@dataclass(frozen=True)
class TagVersions(RegistryRequest):
    """Write into the model's tag which versions it is, from which MLflow's UI links them."""

    model_id: str
    text: str


@dataclass(frozen=True)
class SetAlias(RegistryRequest):
    name: str
    number: str


@dataclass(frozen=True)
class DeleteVersion(RegistryRequest):
    """Delete a second version of the same model, or one whose model is gone."""

    name: str
    number: str


def next_requests(desired: Desired, delivered: Delivered) -> list[Request | ModelRequest]:
    """As `requests.next_requests`, with the models of an ended run before its record is closed."""
    wanted = requests.next_requests(desired, delivered)
    is_closing = all(isinstance(request, Note) and request.outcome for request in wanted)
    if not is_closing or desired.ending is None or delivered.found is None:
        return wanted
    if desired.ending is delivered.closed:
        return wanted
    about_models = model_requests(desired, delivered) or registry_requests(desired, delivered)
    return about_models or requests.next_requests(desired, delivered)


def model_requests(desired: Desired, delivered: Delivered) -> list[ModelRequest]:
    """The next requests until MLflow has the model of a finished run, once."""
    ending, weights, found = desired.ending, desired.ending.model, delivered.model
    if weights is None:
        return []
    identity = identity_of(desired, delivered)
    if found is None:
        wanted = [FindModel(identity, weights.uri)]
    elif found.id is None:
        wanted = [_creation(desired, delivered)] if found.has_file else []
    elif not (found.is_ready or found.is_uploaded):
        experiment = storage.join(desired.folder, EXPERIMENT)
        wanted = [UploadModel(found.id, found.location, weights.uri, experiment)]
    else:
        wanted = [] if found.is_linked else [LinkModel(found.id)]
        stored_metrics = tuple((name, stored(value)) for name, value in ending.metrics.items())
        metrics = tuple(metric for metric in stored_metrics if metric not in found.metrics)
        wanted += [LogModelMetrics(found.id, metrics, ending.time_ms)] if metrics else []
        wanted += [] if found.is_ready else [FinishModel(found.id)]
        wanted += [DeleteModel(other) for other in found.others]
    return [request for request in wanted if request not in delivered.refused]


def registry_requests(desired: Desired, delivered: Delivered) -> list[ModelRequest]:
    """The next requests until a study's best model is the version of its registered model that is `best`."""
    best, record, found = desired.best, delivered.record, delivered.registered
    if best is None:
        return []
    if found is None:
        wanted = [FindRegistered(desired.name, record.id, best.model_id)]
    elif not found.exists:
        tags = ((IDENTITY, record.id), *_kept_tags(desired))
        wanted = [CreateRegistered(found.name, desired.name, tags)]
    elif (kept := kept_version(found, best)) is None:
        wanted = [CreateVersion(found.name, best)]
    else:
        wanted = [] if found.is_linked else [LinkModel(best.model_id)]
        if (text := versions_text(found, kept)) != found.versions_tag:
            wanted.append(TagVersions(best.model_id, text))
        if found.best != kept.number:
            wanted.append(SetAlias(found.name, kept.number))
        others = [v for v in found.versions if v.identity == best.identity and v != kept]
        wanted += [DeleteVersion(found.name, version.number) for version in others]
    return [request for request in wanted if request not in delivered.refused]


def identity_of(desired: Desired, delivered: Delivered) -> str:
    """The identity of a finished run's model: MLflow has it as the model's tag deit_ray.id."""
    return f"{delivered.record.id}-{desired.ending.model.version}"


def best_of(desired: Desired, delivered: Delivered) -> Best | None:
    """The model of a trial's run, to be registered; None if MLflow does not have it."""
    found = delivered.model
    if found is None or found.id is None or not found.is_ready:
        return None
    return Best(
        identity=identity_of(desired, delivered),
        model_id=found.id,
        location=found.location,
        run_id=delivered.record.run_id,
        run_name=desired.name,
        tags=_kept_tags(desired),
    )


def kept_version(found: Registered, best: Best) -> Version | None:
    """The version of the best model; of several, the first."""
    same = [v for v in found.versions if (v.identity, v.model_id) == (best.identity, best.model_id)]
    return min(same, key=lambda version: int(version.number), default=None)


def versions_text(found: Registered, version: Version) -> str:
    """MLflow's tag of a model that is registered: this version of this name, and those of other names."""
    known = json.loads(found.versions_tag or "[]")
    named = {"name": found.name, "version": int(version.number)}
    others = [entry for entry in known if entry["name"] != found.name]
    return found.versions_tag if known == [*others, named] else json.dumps([*others, named])


def model_name(folder: str) -> str:
    """The name of a run's model, such as digits_search-1-trial-0007, without letters that MLflow refuses."""
    return re.sub(r"[/:.%\"']", "-", name_of(folder))


def _creation(desired: Desired, delivered: Delivered) -> CreateModel:
    identity = ((IDENTITY, identity_of(desired, delivered)), (RUN_IDENTITY, delivered.record.id))
    params = tuple((key, fitting(value, PARAM_CHARS)) for key, value in desired.params.items())
    return CreateModel(model_name(desired.folder), (*identity, *_kept_tags(desired)), params)


def _kept_tags(desired: Desired) -> Pairs:
    """The tags of a run that its model has too."""
    return tuple((key, fitting(desired.tags[key], TAG_CHARS)) for key in KEPT_TAGS if key in desired.tags)


def after_request(delivered: Delivered, request: ModelRequest) -> Delivered:
    """The knowledge about a run after a request about models whose answer adds nothing was performed."""
    model, registered = delivered.model, delivered.registered
    match request:
        case UploadModel():
            return replace(delivered, model=replace(model, is_uploaded=True))
        case FinishModel():
            return replace(delivered, model=replace(model, is_ready=True))
        case DeleteModel(model_id):
            others = tuple(other for other in model.others if other != model_id)
            return replace(delivered, model=replace(model, others=others))
        case LinkModel() if registered is not None:
            return replace(delivered, registered=replace(registered, is_linked=True))
        case LinkModel():
            return replace(delivered, model=replace(model, is_linked=True))
        case LogModelMetrics(_, metrics):
            return replace(delivered, model=replace(model, metrics=model.metrics | set(metrics)))
        case CreateRegistered():
            return replace(delivered, registered=replace(registered, exists=True))
        case TagVersions(_, text):
            return replace(delivered, registered=replace(registered, versions_tag=text))
        case SetAlias(_, number):
            return replace(delivered, registered=replace(registered, best=number))
        case DeleteVersion(_, number):
            versions = tuple(version for version in registered.versions if version.number != number)
            return replace(delivered, registered=replace(registered, versions=versions))
    raise TypeError(f"{request} has an answer of its own")


def after_failure(delivered: Delivered) -> Delivered:
    """The knowledge that holds after a request failed: MLflow may have performed it nevertheless."""
    return replace(delivered, model=None, registered=None)
