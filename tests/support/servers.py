"""Real servers on loopback for tests and benchmarks: MLflow, PostgreSQL, S3, and a proxy that misbehaves."""

import contextlib
import http.client
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

START_S = 90
SETTINGS = {
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes that nothing here needs
    # A request that logs a batch takes a second connection while it holds the first. With MLflow's default of
    # 15 connections, the 40 threads of a server's worker wait for each other, half a minute at a time, if 40
    # writers come at the same time.
    "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "50",
    "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "100",
    "PYTHONWARNINGS": "ignore",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class MlflowServer:
    """`mlflow server`. It starts when the context is entered.

    Args:
        folder: folder of its log.
        backend: URI of its database; by default SQLite in the folder.
        workers: number of its processes.
        port: the port to listen on; by default a free one.
        artifacts: URI of the folder of the artifacts; by default in the folder.
    """

    def __init__(
        self,
        folder: Path,
        backend: str | None = None,
        workers: int = 1,
        port: int | None = None,
        artifacts: str | None = None,
    ):
        self.artifacts = artifacts or str(Path(folder) / "artifacts")
        self.folder, self.workers, self.port = Path(folder), workers, port or free_port()
        self.backend = backend or f"sqlite:///{self.folder}/mlflow.db"
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "MlflowServer":
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self.kill()

    def start(self, wait: bool = True) -> None:
        options = {
            "--backend-store-uri": self.backend,
            "--artifacts-destination": self.artifacts,
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--workers": str(self.workers),
            "--uvicorn-opts": "--log-level warning",
        }
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            *(word for option in options.items() for word in option),
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | SETTINGS, start_new_session=True
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns once the server answers."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"mlflow server did not start:\n{(self.folder / 'server.log').read_text()[-3000:]}"
                    ) from None
                time.sleep(0.1)

    def kill(self) -> None:
        """Kills the server and its workers by SIGKILL."""
        if self.process is not None:
            kill_session(self.process)
            self.process = None


def answers(url: str) -> bool:
    """Whether a server answers a request."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


class S3Server:
    """An S3 API server in this process (moto). It starts when the context is entered."""

    def __init__(self):
        self.port = free_port()

    def __enter__(self) -> "S3Server":
        from moto.server import ThreadedMotoServer  # takes a second, which only tests of S3 need

        self.server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self.server.start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.stop()


def s3_environment(port: int) -> dict[str, str]:
    """The environment of a process that uses the S3 server on a port of loopback."""
    return {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }


@contextlib.contextmanager
def s3_process() -> Iterator[str]:
    """An S3 API server (moto) in a process of its own; yields the URI of an empty bucket.

    This process and its children use it.
    """
    import boto3
    from botocore.config import Config

    port = free_port()
    os.environ |= s3_environment(port)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            config = Config(retries={"mode": "standard", "total_max_attempts": 10})
            boto3.client("s3", config=config).create_bucket(Bucket="bench")
            yield "s3://bench"
        finally:
            server.terminate()


class Postgres:
    """A PostgreSQL in a new folder, from Debian's binaries; it trusts every connection from this machine."""

    def __init__(self):
        self.port = free_port()
        # not below pytest's folder, which only its owner may enter
        self.root = tempfile.mkdtemp(prefix="postgres-")
        self.uri = f"postgresql+psycopg2://postgres@127.0.0.1:{self.port}/postgres"
        self.process: subprocess.Popen | None = None

    @staticmethod
    def binaries() -> Path | None:
        """The folder of the binaries, None if there is none. Debian does not put it on PATH."""
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        on_path = shutil.which("initdb")
        return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None

    def __enter__(self) -> "Postgres":
        data = f"{self.root}/data"
        if os.getuid() == 0:
            os.chown(self.root, pwd.getpwnam("postgres").pw_uid, -1)
        command = [
            self.binaries() / "initdb",
            "-D",
            data,
            "-U",
            "postgres",
            "--auth=trust",
            "-E",
            "UTF8",
            "--no-sync",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **self._as_its_user())
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self.kill()
        shutil.rmtree(self.root, ignore_errors=True)

    def start(self) -> None:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "max_connections": 400,
        }
        command = [self.binaries() / "postgres", "-D", f"{self.root}/data"]
        command += [word for key, value in options.items() for word in ("-c", f"{key}={value}")]
        with open(f"{self.root}/log", "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, **self._as_its_user()
            )
        deadline = time.monotonic() + START_S
        ready = [self.binaries() / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, stdout=subprocess.DEVNULL).returncode:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{Path(self.root, 'log').read_text()[-3000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """Kills the server and its children by SIGKILL. After `start`, committed data is there again."""
        if self.process is not None:
            kill_tree(self.process)
            self.process = None

    @staticmethod
    def _as_its_user() -> dict:
        """PostgreSQL refuses to run as root."""
        return {"user": "postgres", "cwd": "/"} if os.getuid() == 0 else {"cwd": "/"}


def kill_session(process: subprocess.Popen) -> None:
    """Kills a process that leads a session, and all processes of its group."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_tree(process: subprocess.Popen) -> None:
    """Kills a process and its children, and waits until they are gone.

    The children may lead groups of their own, as PostgreSQL's do.
    """
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [process.pid, *map(int, children)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    deadline = time.monotonic() + 10
    while any(is_alive(int(pid)) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Proxy:
    """A proxy in front of a server, which misbehaves in a chosen way.

    Args:
        port: the server's.

    Attributes:
        mode: pass; delay (passes after `delay_s`); refuse_before (answers 500 and passes nothing on);
            fail_after (passes the request on, and answers 500); garbage (answers 200 without JSON); hang
            (never answers); close (closes the connection); close_after (passes the request on, and closes the
            connection); missing (answers 404, as a server without such a page).
        only: it misbehaves only if the path contains this text.
        times: number of requests until it passes all; None for no limit.
        dropped: names of request headers, in lower case, that it does not pass on.
        unknown: names of request headers, in lower case, that it answers with 501.
        seen: the paths of all requests.
        method: that of the latest request.
    """

    def __init__(self, port: int):
        self.mode, self.only, self.times, self.delay_s = "pass", "", None, 3.0
        self.dropped = {"host", "transfer-encoding", "content-length"}
        self.unknown: set[str] = set()
        self.seen: list[str] = []
        self.method = ""
        self.target, self.over = port, threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    def __enter__(self) -> "Proxy":
        self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()

    def misbehave(self, mode: str, only: str = "", times: int | None = None) -> None:
        self.mode, self.only, self.times = mode, only, times

    def _mode_for(self, path: str) -> str:
        self.seen.append(path)
        if self.mode == "pass" or self.only not in path or self.times == 0:
            return "pass"
        if self.times is not None:
            self.times -= 1
        return self.mode

    def _handler(proxy):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                body = self._read_body()
                proxy.method = self.command
                mode = proxy._mode_for(self.path)
                if mode == "hang":
                    proxy.over.wait()
                if mode in ("hang", "close"):
                    self.close_connection = True
                    return
                if mode == "delay":
                    time.sleep(proxy.delay_s)
                if proxy.unknown & {name.lower() for name in self.headers}:
                    return self._answer(501, b"<Error><Code>NotImplemented</Code></Error>")
                if mode == "refuse_before":
                    return self._answer(500, b"Internal Server Error")
                if mode == "missing":
                    return self._answer(404, b"Not Found")
                if mode == "garbage":
                    return self._answer(200, b"<html>Welcome to nginx!</html>")
                connection = http.client.HTTPConnection("127.0.0.1", proxy.target, timeout=60)
                try:
                    headers = {k: v for k, v in self.headers.items() if k.lower() not in proxy.dropped}
                    connection.request(self.command, self.path, body, headers)
                    response = connection.getresponse()
                    content, status, headers = response.read(), response.status, dict(response.getheaders())
                except OSError:
                    content, status, headers = b"Bad Gateway", 502, {}
                finally:
                    connection.close()
                if mode == "close_after":
                    self.close_connection = True
                    return
                if mode == "fail_after":
                    content, status, headers = b"Internal Server Error", 500, {}
                self._answer(status, content, headers)

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

            def _read_body(self) -> bytes:
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def _answer(self, status: int, content: bytes, headers: dict | None = None) -> None:
                self.send_response_only(status)
                headers = {"Content-Type": "text/plain", "Content-Length": str(len(content))} | (
                    headers or {}
                )
                for name, value in headers.items():
                    if name.lower() not in ("connection", "transfer-encoding"):
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        return Handler
