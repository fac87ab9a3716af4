"""Deletes the runs of a study or run in MLflow, found by their identities."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from deit_ray.tracking.address import has_store, shown
from deit_ray.tracking.delivery import quiet_mlflow
from deit_ray.tracking.reasons import naming_server
from deit_ray.tracking.server import Server
from deit_ray.tracking.tracked import Record
from deit_ray.tracking.view import view_tag


@dataclass(frozen=True)
class TrackedRuns:
    """Runs that MLflow has.

    Attributes:
        uri: MLflow's URI, without a password.
        ids: MLflow's ids of the runs.
        elsewhere: URIs of other places that have got runs which this MLflow does not have.
        delete: deletes one run by its id.
        delete_view: deletes the study's view.
    """

    uri: str
    ids: tuple[str, ...]
    elsewhere: tuple[str, ...]
    delete: Callable[[str], None]
    delete_view: Callable[[], None]

    @property
    def purge(self) -> str:
        """The command that deletes for good what was deleted in MLflow."""
        return f"mlflow gc --backend-store-uri {self.uri}" if self.uri.startswith("sqlite") else "mlflow gc"

    def delete_all(self) -> None:
        """Deletes the runs, and the study's view. It may be repeated.

        Raises:
            UnavailableError: MLflow does not answer.
        """
        with naming_server(self.uri):
            for run_id in self.ids:
                self.delete(run_id)
            self.delete_view()


def find_tracked(uri: str, experiment: str, name: str, records: Iterable[Record]) -> TrackedRuns:
    """The runs of some records that MLflow has; nothing is changed there.

    Args:
        uri: MLflow's tracking URI.
        experiment: MLflow's name of the experiment.
        name: of the study or run.
        records: of runs that were delivered, to this place or to another one.

    Raises:
        UnavailableError: MLflow does not answer.
    """
    quiet_mlflow()
    server, ids, elsewhere = Server(uri, experiment, None, lambda: None), [], set()
    with naming_server(uri):
        is_there = has_store(uri) and server.find_experiment()
        for record in records:
            found = [run.run_id for run in server.find_all(record.id)] if is_there else []
            ids += found
            if not found and (record.uri, record.experiment) != (uri, experiment):
                elsewhere.add(shown(record.uri))

    def delete_view() -> None:
        if is_there:
            server.delete_view(view_tag(name))

    return TrackedRuns(shown(uri), tuple(ids), tuple(sorted(elsewhere)), server.delete_run, delete_view)
