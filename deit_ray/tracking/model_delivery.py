"""Performs the requests about models; see models.py."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from deit_ray.tracking import models
from deit_ray.tracking.tracked import Delivered, Desired

if TYPE_CHECKING:
    from deit_ray.tracking.delivery import Delivery


def perform(
    delivery: Delivery, desired: Desired, delivered: Delivered, request: models.ModelRequest
) -> Delivered:
    """Performs one request about the models of a run; returns the new knowledge about the run.

    Raises:
        Refused: MLflow refuses the request, or has no models.
    """
    server, run_id = delivery.server, delivered.record.run_id
    match request:
        case models.FindModel():
            return replace(delivered, model=server.find_model(run_id, request))
        case models.FindRegistered():
            return replace(delivered, registered=server.find_registered(run_id, request))
    delivery.changes += 1
    match request:
        case models.CreateModel():
            made = server.create_model(run_id, request)
            return replace(delivered, model=replace(made, others=delivered.model.others))
        case models.CreateRegistered():
            if not server.create_registered(request):
                return replace(delivered, registered=None)
            if request.name != request.study:
                delivery.warn(
                    f"{request.study}: MLflow has another model of this name, so the best model of this "
                    f"study is models:/{request.name}@{models.ALIAS}"
                )
        case models.CreateVersion():
            made = server.create_version(request)
            known = delivered.registered
            return replace(delivered, registered=replace(known, versions=(*known.versions, made)))
        case _:
            _change(delivery, run_id, request)
    return models.after_request(delivered, request)


def _change(delivery: Delivery, run_id: str, request: models.ModelRequest) -> None:
    """Performs a request whose answer adds nothing."""
    server = delivery.server
    match request:
        case models.UploadModel():
            delivery.uploads.send(run_id, server.upload_model, run_id, request)
        case models.FinishModel(model_id):
            server.finish_model(model_id)
        case models.DeleteModel(model_id):
            server.delete_model(model_id)
        case models.LinkModel(model_id):
            server.link_model(run_id, model_id)
        case models.LogModelMetrics():
            server.log_model_metrics(run_id, request)
        case models.TagVersions():
            server.tag_versions(request)
        case models.SetAlias():
            server.set_alias(request)
        case models.DeleteVersion(name, number):
            server.delete_version(name, number)
