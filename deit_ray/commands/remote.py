"""The work of --cluster: what runs on the machine of a person also runs on a cluster that `ray up` made.

A study is a Ray job on the head, so it needs no terminal. Other commands run on the head through SSH.
"""

import contextlib
import posixpath
import re
import secrets
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deit_ray import hints, storage
from deit_ray.cluster import jobs
from deit_ray.cluster.code import code_hash
from deit_ray.cluster.description import Description, move_to_cluster
from deit_ray.cluster.head import Facts, Head, find_head
from deit_ray.cluster.surroundings import free_port
from deit_ray.commands.ui import find_port, show_page
from deit_ray.errors import Interrupted, UnavailableError, UserError
from deit_ray.experiment.config import Experiment
from deit_ray.experiment.load import dump_experiment
from deit_ray.results.folders import BEST, EXPERIMENT
from deit_ray.study.search import check_searchable
from deit_ray.terminal.console import Console

PATIENCE_S = 60.0  # without a connection to a job that is followed
PAUSE_S = 3.0  # between two tries
PAGES = {"MLflow": 5000, "optuna-dashboard": 8080, "Ray's dashboard": 8265}  # ports of the head's loopback


@dataclass
class Followed:
    """A study's job while its log is shown.

    Attributes:
        path: of cluster.yaml.
        job: its submission id.
        pattern: finds the study's name in the log.
        study: name of the study, once the log has named it.
        started: whether the job was sent to the head.
        read: the number of characters of its log that were shown.
    """

    path: str
    job: str
    pattern: re.Pattern
    console: Console
    study: str | None = None
    started: bool = False
    read: int = 0

    def show(self, text: str) -> None:
        """Shows a part of the log."""
        if self.study is None and (found := self.pattern.search(text)):
            self.study = found[1]
        self.console.out.print(text, end="", markup=False)
        self.read += len(text)

    def command(self, *words: str) -> str:
        """A command of deit-ray for the study on the cluster."""
        return hints.command(*words, *([self.study] if self.study else []), "--cluster", self.path)

    @property
    def name(self) -> str:
        return self.study or self.job

    def resuming(self) -> str:
        """Says how to resume the study once it does not run."""
        name = self.study or "STUDY"
        return f"resume it: {hints.command('tune', '--resume', name, '--cluster', self.path)}"

    def where(self) -> str:
        """Says how to look at the study and how to stop it."""
        if self.study:
            return f"look at it: {self.command('status')}\nstop it: {self.command('stop')}"
        stop = hints.line("ray", "exec", self.path, f"ray job stop {self.job}")
        return f"look at it: {self.command('status')}\nstop it: {stop}"


def tune_on_cluster(
    experiment: Experiment, description: Description, console: Console, verbose: bool
) -> None:
    """Starts a study as a job on a cluster's head, and shows its log until it ends.

    Raises:
        UserError: the cluster is not up, refuses the job, or the study ended with an error.
        Interrupted: Ctrl-C was pressed; the study goes on.
    """
    check_searchable(experiment)
    moved, note = move_to_cluster(experiment, description)
    if note:
        console.say(note)
    with tempfile.TemporaryDirectory(prefix="deit_ray-job-") as folder:
        file = f"{experiment.name}.yaml"
        Path(folder, file).write_text(dump_experiment(moved))
        pattern = re.compile(rf"^({re.escape(experiment.name)}-\d+): ", re.MULTILINE)
        words = ["tune", file, "--address", "auto", *(["--verbose"] if verbose else [])]
        followed = Followed(description.path, _job_name(experiment.name), pattern, console)
        _run_job(description, followed, words, folder)


def resume_on_cluster(
    study: str, options: list[str], results: str, description: Description, console: Console
) -> None:
    """Resumes a study as a job on a cluster's head, as `tune_on_cluster` starts one.

    Args:
        study: its name, with or without its number.
        options: more options of `tune --resume`.
        results: on the cluster; see `Description.place`.
    """
    place = description.place("--results", results)
    words = ["tune", "--resume", study, *options, "--results", place, "--address", "auto"]
    pattern = re.compile(rf"^({re.escape(study)}(?:-\d+)?): ", re.MULTILINE)
    followed = Followed(description.path, _job_name(f"{study}-resumed"), pattern, console)
    _run_job(description, followed, words, None)


def run_on_head(description: Description, words: list[str], results: str) -> int:
    """Runs a command of deit-ray on a cluster's head, and shows what it prints; returns its exit status.

    Args:
        results: on the cluster; see `Description.place`.
    """
    place = description.place("--results", results)
    return find_head(description).run(*words, "--results", place).returncode


def best_on_cluster(
    study: str, options: list[str], results: str, description: Description, console: Console
) -> int:
    """Runs `best` on a cluster's head, and brings its files to results/STUDY here, where the command would
    write them for a study of this machine.

    Returns:
        The exit status of `best`.

    Raises:
        UserError: results/STUDY is a study or run of this machine.
    """
    place, head = description.place("--results", results), find_head(description)
    folder = f"/tmp/deit_ray-best-{secrets.token_hex(8)}"
    try:
        done = head.run("best", study, *options, "--results", place, "--out", folder, capture=True)
        brought = []
        if head.run_script(f"test -d {folder}").returncode == 0:
            with tempfile.TemporaryDirectory(prefix="deit_ray-") as here:
                head.fetch(folder, here)
                brought = _take_home(Path(here), console.warn)
    finally:
        head.run_script(f"rm -rf {folder}")
    lines = [line for line in done.stdout.splitlines() if folder not in line]
    for line in [*lines, *(f"  {file}" for file in brought)]:
        console.say(line)
    return done.returncode


def copy_files(uris: tuple[str, ...], name: str, out: str) -> list[str]:
    """Copies files into the folder `name` of the folder `out`; returns their new URIs."""
    copies = [storage.join(out, name, posixpath.basename(uri)) for uri in uris]
    for uri, copy in zip(uris, copies, strict=True):
        storage.write_bytes(copy, storage.read_bytes(uri))
    return copies


def open_pages(
    description: Description, study: str | None, port: int | None, browse: bool, console: Console
) -> None:
    """Shows the pages of a cluster's head at ports of this machine, until Ctrl-C.

    Args:
        study: whose run table is opened in MLflow; None opens the list of all.
        port: for MLflow, by default 5000, or the next free one.
        browse: whether to open MLflow in a browser, if this machine has a display.

    Raises:
        UserError: the port is in use.
        Interrupted: Ctrl-C was pressed.
        UnavailableError: the connection is lost.
    """
    head = find_head(description)
    ports = {"MLflow": find_port(port)}
    for name, there in PAGES.items():
        ports.setdefault(name, free_port(there, set(ports.values())))
    try:
        with head.tunnel({ports[name]: there for name, there in PAGES.items()}) as process:
            for name, here in ports.items():
                url = f"http://127.0.0.1:{here}"
                if not _answers(here):
                    console.say(f"{name}: {url} (the head does not answer there yet)")
                elif name == "MLflow":
                    show_page(name, _page(url, study, console), browse, console)
                else:
                    console.say(f"{name}: {url}")
            token = hints.line("ray", "exec", description.path, "cat ~/.ray/auth_token")
            console.say(f"Ray's dashboard asks for the cluster's token, which this shows: {token}")
            console.say("Ctrl-C closes these pages; the cluster runs on")
            process.wait()
    except KeyboardInterrupt as error:
        raise Interrupted("the pages are closed; the cluster runs on") from error
    raise UnavailableError(f"{description.path}: the connection to the head is lost; repeat the command")


def _page(url: str, study: str | None, console: Console) -> str:
    """The address of a study's run table in the head's MLflow; that of all runs if it has no such study."""
    from deit_ray.tracking.pages import page_by_view, page_of_all  # imports MLflow, which takes seconds

    if study is not None:
        if page := page_by_view(url, study):
            return page
        console.warn(f"{study}: MLflow does not have it; status lists the studies")
    return page_of_all(url)


def _job_name(name: str) -> str:
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _run_job(description: Description, followed: Followed, words: list[str], folder: str | None) -> None:
    head = find_head(description)
    facts = head.facts()
    if facts.code != code_hash():
        followed.console.warn(
            f"the head has other code of deit_ray ({facts.code}) than this machine ({code_hash()}), and the "
            f"study runs with the head's; {description.remedy} brings this machine's there, and interrupts "
            "what runs on the cluster"
        )
    try:
        _start_and_follow(head, facts, followed, words, folder)
    except KeyboardInterrupt as error:
        if not followed.started:
            raise
        raise Interrupted(f"{followed.name} goes on, on the cluster\n{followed.where()}") from error


def _start_and_follow(
    head: Head, facts: Facts, followed: Followed, words: list[str], folder: str | None
) -> None:
    lost = None  # when the connection was lost
    while True:
        try:
            port = free_port(jobs.PORT)
            with head.tunnel({port: jobs.PORT}):
                if not followed.started:
                    line = jobs.job_command(port, followed.job, [facts.program, *words], folder)
                    followed.console.say(f"running, with the cluster's token: {hints.line(*line)}")
                    followed.started = True
                    jobs.submit(line, facts.token)
                job = jobs.Job(port, followed.job, facts.token)
                if not job.is_known():
                    raise UserError(f"{followed.name}: ended, since Ray was restarted\n{followed.resuming()}")
                lost = None
                job.follow(followed.read, followed.show)
                return _end(job, followed)
        except UnavailableError as error:
            if not followed.started:
                raise
            lost = lost or time.monotonic()
            if time.monotonic() - lost > PATIENCE_S:
                raise UnavailableError(
                    f"{error}; the study goes on if the head does\n{followed.where()}\n{followed.resuming()}"
                ) from error
            time.sleep(PAUSE_S)


def _end(job: jobs.Job, followed: Followed) -> None:
    """Says how a job has ended.

    Raises:
        UserError: it did not end well.
    """
    status = job.status()
    if status == "SUCCEEDED":
        pages, best = followed.command("ui"), followed.command("best")
        followed.console.say(f"compare its runs: {pages}\nbring its model home: {best}")
        return
    why = "its job was stopped" if status == "STOPPED" else f"its job failed; {job.reason()}"
    raise UserError(
        f"{followed.name}: {why}\nlook at it: {followed.command('status')}\n{followed.resuming()}"
    )


def _take_home(here: Path, warn: Callable[[str], None]) -> list[str]:
    """Moves the files of `copy_files` into the results of this machine; returns their places."""
    from deit_ray.study.study import is_unchanged, replace_file  # takes a second

    brought = []
    for folder in sorted(here.iterdir()):
        target = Path(hints.DEFAULT_RESULTS, folder.name)
        if (target / EXPERIMENT).exists():
            raise UserError(
                f"{target}: is a study or run of this machine, so the cluster's files are not brought there; "
                "run the command in another folder"
            )
        for file in sorted(folder.iterdir()):
            uri = str(target / file.name)
            # a person may have changed best.yaml; of the weights, the newest are kept
            replace_file(uri, file.read_bytes(), is_unchanged if file.name == BEST else bool, warn)
            brought.append(uri)
    return brought


def _answers(port: int) -> bool:
    """Whether a web server answers at a port of loopback."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.settimeout(5)
        connection.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
        return bool(connection.recv(1))
    return False
