"""MLflow's user interface: the run table of a study, on a server of its own or the one that has the study.
And Optuna's own tools."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from deit_ray import hints, storage
from deit_ray.cluster.surroundings import free_port, go_direct
from deit_ray.errors import Interrupted, UnavailableError, UserError, lines_of
from deit_ray.experiment.config import Experiment
from deit_ray.results.folders import EXPERIMENT, experiment_of, find_run, name_of, recorded, results_of
from deit_ray.terminal.console import Console
from deit_ray.tracking.address import has_store, shown, tracking_uri

PORT = 5000  # MLflow's own
START_S = 120.0  # longest wait for a server that starts
END_S = 10.0  # longest wait for one that ends
SETTINGS = {
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # six idle processes
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class Place:
    """Where MLflow has the runs that a person wants to see.

    Attributes:
        uri: MLflow's tracking URI.
        folder: URI of the study, run or trial; None for all runs.
        experiment: of the folder.
    """

    uri: str
    folder: str | None = None
    experiment: Experiment | None = None

    @property
    def is_server(self) -> bool:
        """Whether a server is there, so that none needs to be started."""
        return self.uri.startswith(("http://", "https://"))

    @property
    def name(self) -> str:
        return "MLflow" if self.folder is None else name_of(self.folder)

    def page(self, server: str) -> str:
        """The address of the page: a study's run table in its view, a run's page, or all runs.

        Args:
            server: URL of the MLflow server.

        Raises:
            UserError: MLflow does not have the study or run yet.
            UnavailableError: MLflow does not answer.
        """
        # these take a second, in which a server can start
        from deit_ray.study.database import is_study
        from deit_ray.study.sync import view_of
        from deit_ray.tracking.pages import page_of_all, page_of_run, page_of_study

        if self.folder is None:
            return page_of_all(server)
        experiment = self.experiment.tracking.experiment
        if is_study(self.folder):
            return page_of_study(server, experiment, self.folder, view_of(self.name, self.experiment))
        return page_of_run(server, experiment, self.folder)


def find_place(name: str | None, results: str) -> Place:
    """Where MLflow has the runs of a study, run or trial; without a name, all runs of the results.

    Raises:
        UserError: there is no such study or run; MLflow has nothing yet; or MLflow has no pages there that
            can be opened.
    """
    if name is None:
        return _find_place_of_all(results)
    folder = find_run(name, results)
    experiment = experiment_of(folder)
    uri = tracking_uri(experiment)
    if uri.startswith("databricks"):
        raise UserError(f"{name_of(folder)}: its runs are in Databricks; open them in its own pages")
    if not has_store(uri):
        deliver = hints.command("sync", name_of(folder).partition("/")[0], results=results_of(folder))
        raise UserError(f"{name_of(folder)}: there is no {shown(uri)}; deliver to it: {deliver}")
    return Place(uri, folder, experiment)


def _find_place_of_all(results: str) -> Place:
    place = storage.absolute(results)
    if storage.is_local(place) and os.path.exists(f"{place}/mlflow.db"):
        return Place(f"sqlite:///{place}/mlflow.db")
    folders = [storage.join(results, name) for name in storage.list_names(results)]
    folders = [folder for folder in folders if storage.exists(storage.join(folder, EXPERIMENT))]
    uris = {uri for folder in folders if (uri := recorded(folder).tracking.uri)}
    if len(uris) == 1:
        return Place(uris.pop())
    if uris:
        one = hints.command("ui", name_of(folders[-1]), results=results)
        raise UserError(f"{results}: its runs are in {len(uris)} MLflows; name a study or run: {one}")
    if storage.is_local(place):
        raise UserError(
            f"{results}: has no MLflow database yet; train or tune something first, or name --results"
        )
    raise UserError(
        f"{results}: no MLflow database can be there; open the MLflow server that tracking.uri names, or "
        "copy the studies for optuna-dashboard: --optuna FILE"
    )


def open_ui(place: Place, port: int | None, browse: bool, console: Console) -> None:
    """Shows where the page of a study or run is, and opens it in a browser. Where no server has it, serves it
    on this machine's loopback address until Ctrl-C.

    Args:
        port: of the server, by default 5000, or the next free one.
        browse: whether to open a browser, if this machine has a display.

    Raises:
        UserError: MLflow does not have the study or run yet, or the port is in use.
        UnavailableError: MLflow does not answer, or does not start.
        Interrupted: Ctrl-C was pressed.
    """
    if place.is_server:
        return show_page(place.name, place.page(place.uri), browse, console)
    port = find_port(port)
    from deit_ray.tracking.pages import import_mlflow

    console.begin(f"starting MLflow on port {port} (some seconds)")
    try:
        with _serving(place.uri, port) as server:
            url = f"http://127.0.0.1:{port}"
            import_mlflow()  # while the server starts
            server.wait_for_start(url)
            show_page(place.name, place.page(url), browse, console)
            console.say("Ctrl-C ends MLflow")
            server.process.wait()
            raise UnavailableError(f"MLflow has ended: {server.reason()}")
    except KeyboardInterrupt as error:
        raise Interrupted("MLflow has ended; everything is kept") from error


def show_page(name: str, page: str, browse: bool, console: Console) -> None:
    """Says where a page is, and opens it in the person's browser if this machine has a display."""
    console.say(f"{name}: {page}")
    if browse and _has_display():
        webbrowser.open(page)


def find_port(wanted: int | None, default: int = PORT) -> int:
    """A port of loopback on which nothing listens: the wanted one, or without one the default or the next.

    Raises:
        UserError: the wanted port is in use.
    """
    free = free_port(wanted or default)
    if wanted not in (None, free):
        raise UserError(f"--port {wanted}: is in use; name another one, such as --port {free}")
    return free


def _has_display() -> bool:
    """Whether a browser can show a window: without one, Python would open a browser in the terminal."""
    names = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    return sys.platform == "darwin" or any(os.environ.get(name) for name in names)


@dataclass(frozen=True)
class _Server:
    """An MLflow server that this process has started, and what it prints."""

    uri: str
    process: subprocess.Popen
    printed: IO[bytes]

    def wait_for_start(self, url: str) -> None:
        """Returns once the server answers.

        Raises:
            UnavailableError: it has ended, or does not answer.
        """
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise UnavailableError(f"MLflow on {shown(self.uri)} does not start: {self.reason()}")
            time.sleep(0.1)

    def reason(self) -> str:
        """The last line that the server has printed."""
        self.printed.seek(0)
        lines = lines_of(self.printed.read().decode(errors="replace"))
        return lines[-1] if lines else "it says nothing"


@contextlib.contextmanager
def _serving(uri: str, port: int) -> Iterator[_Server]:
    """An MLflow server on loopback over a database, without its job workers, as long as it is entered."""
    options = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
        "--uvicorn-opts": "--log-level warning",
    }
    words = [word for option in options.items() for word in option]
    command = [sys.executable, "-m", "mlflow", "server", *words]
    go_direct()
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            # not an option, which every person on this machine could read: it may have a password
            env=os.environ | SETTINGS | {"MLFLOW_BACKEND_STORE_URI": uri},
            start_new_session=True,  # MLflow's own processes end with it
        )
        try:
            yield _Server(uri, process, printed)
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """Ends a process that leads a session, and the processes of its group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):  # then it is killed
            process.wait(END_S)


def copy_studies(results: str, path: str) -> list[str]:
    """Copies the Optuna studies in a results folder into a new SQLite file, for Optuna's own tools.

    Returns:
        The names of the studies.

    Raises:
        UserError: the file exists or cannot be written, or there is no study.
    """
    from deit_ray.study.database import copy_database
    from deit_ray.study.study import Study, names_of_studies

    storage.check_writable("--optuna", os.path.dirname(storage.local_path(path)))
    if os.path.exists(path):
        raise UserError(f"--optuna {path}: exists already; name a new file")
    names = names_of_studies(results)
    if not names:
        raise UserError(f"{results}: has no studies")
    for name in names:
        copy_database(Study.open(name, results).database, storage.local_path(path))
    return names
