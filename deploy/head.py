"""What the head of a cluster needs besides Ray. The commands of cluster.yaml call it on the head:

head.py environment  writes ~/.deit_ray_environment, which the shells and Ray's processes of all nodes read
head.py services     starts MLflow's server and optuna-dashboard, those of them that do not run
head.py dashboard    is optuna-dashboard, over a copy of the studies on S3
"""

import fcntl
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import yaml

HOME = Path.home()
FOLDER = HOME / "services"  # on the head's disk: logs, locks, MLflow's database
MLFLOW_PORT, DASHBOARD_PORT = 5000, 8080
START_S = 180
COPY_S = 60  # age of the copy at which optuna-dashboard makes a new one


def provider() -> dict:
    """The section `provider` of cluster.yaml, as `ray up` brought it to the head."""
    return yaml.safe_load((HOME / "ray_bootstrap_config.yaml").read_text())["provider"]


def environment() -> None:
    (HOME / ".deit_ray_environment").write_text(f"export AWS_DEFAULT_REGION={provider()['region']}\n")


def services() -> None:
    """Starts each service that does not run, and returns once all of them answer.

    A service holds a lock as long as it lives, so it is never started twice.
    """
    FOLDER.mkdir(exist_ok=True)
    here = [sys.executable, str(Path(__file__).resolve())]
    start("mlflow", mlflow_command())
    start("dashboard", [*here, "dashboard"])
    deadline = time.monotonic() + START_S
    for name, address in {
        "mlflow": f"http://127.0.0.1:{MLFLOW_PORT}/health",
        "dashboard": f"http://127.0.0.1:{DASHBOARD_PORT}/dashboard/",
    }.items():
        while not answers(address):
            if time.monotonic() > deadline:
                sys.exit(f"{name} does not answer at {address}; its log is {FOLDER}/{name}.log")
            time.sleep(0.3)


def mlflow_command() -> list[str]:
    options = {
        "--backend-store-uri": f"sqlite:///{FOLDER}/mlflow.db",
        "--artifacts-destination": f"s3://{provider()['bucket']}/mlflow",
        "--host": "127.0.0.1",  # people come through SSH
        "--port": str(MLFLOW_PORT),
        "--workers": "1",
        "--uvicorn-opts": "--log-level warning",
    }
    return [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        *(word for option in options.items() for word in option),
    ]


def start(name: str, command: list[str]) -> None:
    """Starts a service in the background, unless it runs."""
    lock = open(FOLDER / f"{name}.lock", "w")  # noqa: SIM115 (the service inherits it)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{name} runs already")
        return
    with open(FOLDER / f"{name}.log", "ab") as log:
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[lock.fileno()],
            cwd=HOME,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # seven idle processes
        )
    print(f"{name} starts")


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


class Threaded(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class Quiet(WSGIRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


class Copy:
    """optuna-dashboard over a copy of all studies, which a request renews when it is old.

    A study's own database is a log of objects, which its driver alone may extend.
    """

    def __init__(self, results: str):
        self.results, self.made, self.app, self.lock = results, None, None, threading.Lock()

    def __call__(self, environ, start_response):
        with self.lock:
            if self.made is None or time.monotonic() - self.made > COPY_S:
                self.app, self.made = self.copy(), time.monotonic()
        return self.app(environ, start_response)

    def copy(self):
        import optuna
        from optuna_dashboard import wsgi

        from deit_ray.study.study import Study, names_of_studies

        copied = optuna.storages.InMemoryStorage()
        for name in names_of_studies(self.results):
            database = Study.open(name, self.results).database
            optuna.copy_study(
                from_study_name=database.optuna.study_name,
                from_storage=database.place,
                to_storage=copied,
                to_study_name=name,
            )
        return wsgi(copied)


def dashboard() -> None:
    application = Copy(f"s3://{provider()['bucket']}/results")
    with make_server("127.0.0.1", DASHBOARD_PORT, application, Threaded, Quiet) as server:
        server.serve_forever()


if __name__ == "__main__":
    {"environment": environment, "services": services, "dashboard": dashboard}[sys.argv[1]]()
