"""The addresses of MLflow's pages for a study or run, asked from the MLflow server that has them."""

from deit_ray import hints
from deit_ray.errors import UserError
from deit_ray.results.folders import name_of, results_of
from deit_ray.tracking.delivery import quiet_mlflow
from deit_ray.tracking.reasons import naming_server
from deit_ray.tracking.server import Refused, Server
from deit_ray.tracking.tracked import Record
from deit_ray.tracking.view import View, list_page, newest, run_page, runs_page


def page_of_study(server: str, experiment: str, folder: str, view: View) -> str:
    """The address of a study's run table, in the study's view; without it if MLflow does not take the view.

    Args:
        server: URL of the MLflow server.
        experiment: MLflow's name of the experiment.
        folder: URI of the study's folder.

    Raises:
        UserError: MLflow does not have the study yet.
        UnavailableError: MLflow does not answer.
    """
    with naming_server(server):
        found, _ = _find(server, experiment, folder)
        try:
            found.share_view(view)
        except Refused:
            return runs_page(server, found.experiment_id)
        return runs_page(server, found.experiment_id, view.study)


def page_of_run(server: str, experiment: str, folder: str) -> str:
    """The address of the page of a run or trial.

    Raises:
        UserError: MLflow does not have the run yet.
        UnavailableError: MLflow does not answer.
    """
    with naming_server(server):
        found, run_id = _find(server, experiment, folder)
        return run_page(server, found.experiment_id, run_id)


def page_of_all(server: str) -> str:
    """The address of the run table of the only experiment that has runs, or of the list of experiments.

    Raises:
        UnavailableError: MLflow does not answer.
    """
    with naming_server(server):
        client = _client(server)
        ids = [experiment.experiment_id for experiment in client.search_experiments()]
        used = [one for one in ids if client.search_runs([one], max_results=1)]
        return runs_page(server, used[0]) if len(used) == 1 else list_page(server)


def page_by_view(server: str, name: str) -> str | None:
    """The address of the run table of a study that is known by its view alone; None if there is no view.

    Args:
        server: URL of the MLflow server.
        name: of the study, such as digits_search-1, or digits_search for the newest.

    Raises:
        UnavailableError: MLflow does not answer.
    """
    with naming_server(server):
        for experiment in _client(server).search_experiments():
            if study := newest(name, experiment.tags):
                return runs_page(server, experiment.experiment_id, study)
    return None


def import_mlflow() -> None:
    """Imports MLflow, which takes seconds, while a server starts."""
    quiet_mlflow()
    import mlflow.tracking  # noqa: F401


def _find(server: str, experiment: str, folder: str) -> tuple[Server, str]:
    """The connection to an experiment of MLflow, and MLflow's id of the run of a folder."""
    quiet_mlflow()
    found, record = Server(server, experiment, None, lambda: None), Record.read(folder)
    runs = found.find_all(record.id) if record and found.find_experiment() else []
    if not runs:
        name = name_of(folder)
        deliver = hints.command("sync", name.partition("/")[0], results=results_of(folder))
        raise UserError(f"{name}: MLflow does not have it yet; deliver it with: {deliver}")
    return found, runs[0].run_id


def _client(server: str):
    quiet_mlflow()
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=server)
