"""Brings MLflow up to date with the runs of a study: performs the requests of requests.py, keeps the records.

Every request may be repeated. A run is looked up by its identity before it is created. MLflow stores a point
once by (run, name, time, step, value), and a point has the time at which it was measured. So a repeated
delivery duplicates nothing.
"""

import itertools
import json
import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace

from deit_ray import storage
from deit_ray.cluster import surroundings
from deit_ray.results.journal import iterate_segments
from deit_ray.tracking import model_delivery, models, requests
from deit_ray.tracking.curves import is_curve
from deit_ray.tracking.model_server import ModelServer, NoModels
from deit_ray.tracking.reasons import reason_of
from deit_ray.tracking.requests import Request
from deit_ray.tracking.server import Gone, Refused, is_unknown
from deit_ray.tracking.tracked import RECORD, Delivered, Desired, Record, Run
from deit_ray.tracking.uploads import NoArtifacts, Uploads

TIMEOUT_S = 30  # of one request


class Delivery:
    """Delivers runs, one request after the other; see `deliver`.

    Args:
        server: the connection to MLflow.
        warn: shows a person a message when MLflow refuses a part of a run.

    Attributes:
        generation: incremented when MLflow turns out to know less than before.
        changes: number of requests so far that changed something in MLflow.
        uploads: sends artifacts.
        takes_no_models: whether a person was told that MLflow takes no models.
    """

    def __init__(self, server: ModelServer, warn: Callable[[str], None]):
        quiet_mlflow()
        self.server, self.warn = server, warn
        self.uploads = Uploads(server, warn)
        self.generation, self.changes, self.takes_no_models = 1, 0, False

    def deliver(self, run: Run) -> None:
        """Brings a run in MLflow up to date.

        Raises:
            Exception: any error of the server, the network or the disk. The next call continues from there.
        """
        try:
            self._bring_up_to_date(run)
        except Exception as error:
            if not (isinstance(error, Gone) or is_unknown(error)):
                raise
            self.generation += 1  # another database, or somebody deleted the run
            self.server.experiment_id = None
            self._bring_up_to_date(run)

    def _bring_up_to_date(self, run: Run) -> None:
        desired = run.desired  # read before the journal: once the ending is known, the journal is complete
        self.server.connect()
        if run.parent:
            self._perform_all(run.parent, run.parent.desired, requests.opening_requests)
            desired = replace(desired, parent_id=run.parent.record.run_id)
        run.delivered = replace(run.delivered, unsent=None)  # the journal may have grown
        self._perform_all(run, desired, models.next_requests)
        if desired.ending and desired.ending.best and desired.ending is not run.closed:
            best = desired.ending.best
            self._bring_up_to_date(best)  # its model is registered
            registered = replace(desired, best=models.best_of(best.desired, best.delivered))
            self._perform_all(run, registered, models.next_requests)
        run.delivered = replace(run.delivered, description=desired.description)
        if desired.ending:
            run.delivered = replace(run.delivered, closed=desired.ending, duplicates=None)

    def _perform_all(self, run: Run, desired: Desired, plan: Callable) -> None:
        """Performs the requests that `plan` returns, until it returns none."""
        if run.generation != self.generation:
            run.delivered, run.generation = run.delivered.unknown(), self.generation
        try:
            while wanted := plan(desired, run.delivered):
                for request in wanted:
                    self._perform_or_note_refusal(run, desired, request)
        except Exception:
            run.delivered = models.after_failure(requests.after_failure(desired, run.delivered))
            raise

    def _perform_or_note_refusal(self, run: Run, desired: Desired, request: Request) -> None:
        try:
            run.delivered = self._perform(desired, run.delivered, request)
        except Refused as refusal:
            is_known = request.part in {other.part for other in run.delivered.refused}
            if isinstance(refusal, NoModels):
                self._warn_of_no_models(refusal)
            elif not (is_known or isinstance(refusal, NoArtifacts)):
                reason = reason_of(refusal.__cause__)
                self.warn(f"{desired.name}: {request.part} cannot be delivered to MLflow: {reason}")
            run.delivered = requests.after_refusal(run.delivered, request)

    def _warn_of_no_models(self, refusal: NoModels) -> None:
        """Says once that MLflow takes no models."""
        if not self.takes_no_models:
            self.takes_no_models = True
            why = refusal.__cause__
            is_old = getattr(why, "error_code", None) == "ENDPOINT_NOT_FOUND"
            reason = "it is older than MLflow 3" if is_old else reason_of(why)
            self.warn(f"MLflow takes no models ({reason}); everything else is delivered")

    def _perform(self, desired: Desired, delivered: Delivered, request: Request) -> Delivered:
        """Performs one request; returns the new knowledge about the run.

        Raises:
            Refused: MLflow refuses the request as invalid.
            Gone: MLflow no longer has the run.
        """
        match request:
            case requests.ReadRecord():
                return self._read_record(desired, delivered)
            case requests.ReadJournal(first):
                segments = itertools.islice(iterate_segments(desired.journal, first), requests.SEGMENTS)
                return replace(delivered, unsent=tuple(segments))
            case requests.FindRun():
                return self._find_run(desired, delivered, request)
            case requests.CreateRun():
                found = self.server.create_run(request)
                self.changes += 1
                return replace(delivered, found=found)
            case requests.SetDescription():
                return self._set_description(delivered, request)
            case requests.FindDuplicates(identity):
                return self._find_duplicates(delivered, identity)
            case requests.ShareView(view):
                self.changes += self.server.share_view(view)
                return requests.after_request(delivered, request)
            case models.ModelRequest():
                return model_delivery.perform(self, desired, delivered, request)
        self._change_run(delivered, request)
        self.changes += not isinstance(request, requests.ResetRecord | requests.Note)
        after = requests.after_request(delivered, request)
        if isinstance(request, requests.ResetRecord) or after.record != delivered.record:
            save(desired.folder, after.record)
        return after

    def _change_run(self, delivered: Delivered, request: Request) -> None:
        """Performs a request that changes a run whose id is known. Requests about the record do nothing."""
        server, run_id = self.server, delivered.record.run_id
        match request:
            case requests.Describe():
                server.describe(run_id, request)
            case requests.LogDatasets(datasets):
                server.log_datasets(run_id, datasets)
            case requests.LogArtifact(uri):
                self.uploads.send(run_id, server.log_artifact, run_id, uri)
            case requests.DeleteTag(key):
                server.delete_tag(run_id, key)
            case requests.ReopenRun():
                server.reopen(run_id)
            case requests.LogPoints(_, count):
                points = itertools.chain.from_iterable(delivered.unsent[:count])
                server.log_points(run_id, [point for point in points if is_curve(point.name)])
            case requests.DeleteDuplicate(duplicate):
                server.delete_duplicate(duplicate, run_id)
            case requests.LogEnding():
                server.log_ending(run_id, request)
            case requests.Terminate(status, time_ms):
                server.terminate(run_id, status, time_ms)

    def _read_record(self, desired: Desired, delivered: Delivered) -> Delivered:
        """Reads the record in the run's folder, or makes a new one."""
        uri, experiment = self.server.uri, self.server.experiment
        known = Record.read(desired.folder)
        if known is None:
            record = Record(uuid.uuid4().hex, uri, experiment)
            return replace(delivered, record=record, may_exist=False, duplicates=())
        is_here = (known.uri, known.experiment) == (uri, experiment)
        record = known if is_here else Record(known.id, uri, experiment)
        return replace(delivered, record=record)

    def _find_run(self, desired: Desired, delivered: Delivered, request: requests.FindRun) -> Delivered:
        """Looks for the run in MLflow, and reads the points that it must have from the journal."""
        found = self.server.find_run(request.run_id) if request.run_id else None
        if found is None:
            found = next(iter(self.server.find_all(request.identity)), None)
        if found is None:
            return replace(delivered, may_exist=False)
        segments = delivered.record.segments
        last = last_values(desired.journal, segments) if desired.journal else {}
        return replace(delivered, found=found, last=last, segments=segments)

    def _set_description(self, delivered: Delivered, request: requests.SetDescription) -> Delivered:
        """Sets the description, unless a person has changed it since MLflow was last asked."""
        run_id = delivered.record.run_id
        now = self.server.find_run(run_id)
        if now is None:
            raise Gone
        delivered = replace(delivered, found=replace(delivered.found, tags=now.tags))
        is_there = now.tags.get(requests.DESCRIPTION) == request.text
        if is_there or requests.is_described_by_a_person(now.tags):
            return delivered
        self.server.set_description(run_id, request)
        self.changes += 1
        return requests.after_request(delivered, request)

    def _find_duplicates(self, delivered: Delivered, identity: str) -> Delivered:
        """Looks for all runs of the identity. The earliest one is kept."""
        same = self.server.find_all(identity)
        if not same:
            raise Gone
        kept, *others = same
        return replace(delivered, found=kept, last={}, duplicates=tuple(other.run_id for other in others))


def save(folder: str, record: Record) -> None:
    """Writes the record into the run's folder."""
    storage.write_bytes(storage.join(folder, RECORD), json.dumps(asdict(record)).encode())


def last_values(journal: str, segments: int) -> dict[str, float]:
    """The last value of each curve in the first `segments` segments of a journal."""
    last: dict[str, float] = {}
    for segment in itertools.islice(iterate_segments(journal, 0), segments):
        last |= {point.name: point.value for point in segment if is_curve(point.name)}
    return last


def quiet_mlflow() -> None:
    """Sets MLflow up for this process, before MLflow is imported: silent, and without its own retries.

    If a server creates a run and then answers 500, or too late, a retry of MLflow would create a second run.
    `Delivery` looks for the run first.
    """
    surroundings.go_direct()
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(TIMEOUT_S))
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # the tracker warns a person, once
    logging.getLogger("alembic").setLevel(logging.ERROR)
