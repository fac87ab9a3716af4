"""Deletes the runs and models of a study or run in MLflow, found by their identities."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from deit_ray.outcome import Outcome
from deit_ray.terminal.format import counted
from deit_ray.tracking.address import has_store, shown
from deit_ray.tracking.delivery import quiet_mlflow
from deit_ray.tracking.model_server import ModelServer, NoModels, names_for
from deit_ray.tracking.models import RUN_IDENTITY
from deit_ray.tracking.reasons import naming_server
from deit_ray.tracking.requests import IDENTITY
from deit_ray.tracking.tracked import Record
from deit_ray.tracking.view import view_tag


@dataclass(frozen=True)
class TrackedRuns:
    """Runs that MLflow has, with their models.

    Attributes:
        uri: MLflow's URI, without a password.
        ids: MLflow's ids of the runs.
        models: MLflow's ids of their models.
        registered: (name, numbers) of the registered model, with its versions that this package made.
        elsewhere: URIs of other places that have got runs which this MLflow does not have.
        server: the connection to MLflow.
        delete_view: deletes the study's view.
    """

    uri: str
    ids: tuple[str, ...]
    models: tuple[str, ...]
    registered: tuple[tuple[str, tuple[str, ...]], ...]
    elsewhere: tuple[str, ...]
    server: ModelServer
    delete_view: Callable[[], None]

    @property
    def purge(self) -> str:
        """The command that deletes for good what was deleted in MLflow."""
        return f"mlflow gc --backend-store-uri {self.uri}" if self.uri.startswith("sqlite") else "mlflow gc"

    def describe(self) -> str:
        """What MLflow has, in words."""
        said = f"{counted(len(self.ids), 'run')} in MLflow at {self.uri}"
        if self.models:
            said += f", with {counted(len(self.models), 'model')}"
        for name, numbers in self.registered:
            said += f", and {counted(len(numbers), 'version')} of the registered model {name}"
        return said

    def delete_all(self) -> None:
        """Deletes the versions, the models, the runs, and the study's view. It may be repeated.

        A registered model goes with its last version: a person may have added one.

        Raises:
            UnavailableError: MLflow does not answer.
        """
        with naming_server(self.uri):
            for name, numbers in self.registered:
                for number in numbers:
                    self.server.delete_version(name, number)
                if not self.server.has_versions(name):
                    self.server.delete_registered(name)
            for model_id in self.models:
                self.server.delete_model(model_id)
            for run_id in self.ids:
                self.server.delete_run(run_id)
            self.delete_view()


def find_tracked(
    uri: str, experiment: str, name: str, records: Iterable[Record], identity: str | None = None
) -> TrackedRuns:
    """The runs of some records that MLflow has, with their models; nothing is changed there.

    Args:
        uri: MLflow's tracking URI.
        experiment: MLflow's name of the experiment.
        name: of the study or run.
        records: of runs that were delivered, to this place or to another one.
        study: name and identity of the study that they belong to.

    Raises:
        UnavailableError: MLflow does not answer.
    """
    quiet_mlflow()
    server, ids, models, elsewhere = ModelServer(uri, experiment, None, lambda: None), [], [], set()
    registered = []
    with naming_server(uri):
        is_there = has_store(uri) and server.find_experiment()
        for record in records:
            found = [run.run_id for run in server.find_all(record.id)] if is_there else []
            ids += found
            if is_there and record.outcome in (None, Outcome.finished().text):  # the others have no model
                models += find_models(server, record)
            if not found and (record.uri, record.experiment) != (uri, experiment):
                elsewhere.add(shown(record.uri))
        if is_there and identity:
            registered = find_registered(server, name, identity)

    def delete_view() -> None:
        if is_there:
            server.delete_view(view_tag(name))

    return TrackedRuns(
        uri=shown(uri),
        ids=tuple(ids),
        models=tuple(models),
        registered=tuple(registered),
        elsewhere=tuple(sorted(elsewhere)),
        server=server,
        delete_view=delete_view,
    )


def find_models(server: ModelServer, record: Record) -> list[str]:
    """MLflow's ids of the models of a run."""
    try:
        return [model.model_id for model in server.find_models(RUN_IDENTITY, record.id)]
    except NoModels:
        return []


def find_registered(server: ModelServer, study: str, identity: str) -> list[tuple[str, tuple[str, ...]]]:
    """(name, numbers of the versions that this package made) of a study's registered model, if it has one."""
    found = []
    try:
        for name in names_for(study, identity):
            known = server.registered_model(name)
            if known is not None and known.tags.get(IDENTITY) == identity:
                found.append((name, tuple(version.number for version in server.versions(name))))
    except NoModels:
        pass
    return found
