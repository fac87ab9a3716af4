"""A stage for one case of bench/faults.py: a folder, the commands that are run in it, and what they did.

Every command is a real process. Its output is read as a terminal or a pipe gets it, with the time of the
first byte.
"""

import contextlib
import fcntl
import hashlib
import os
import pty
import re
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEIT_RAY = (sys.executable, "-m", "deit_ray")
MARK = "DEIT_RAY_FAULTS"  # variable by which a case's processes are found
FIRST_LINE_S = 1.0
REMEASURED_S = 4.0  # a command that has said nothing by then is ended: it is late
PRODUCTS = ("out", "results", "home", "mlruns")  # where the commands may write
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\].*?\x07")  # a terminal's
CLEARED = re.compile(r"^(RAY|MLFLOW|HF|TORCH|DEIT_RAY)_|_proxy$|^(COLUMNS|LINES|TMPDIR|OMP_.*)$", re.I)


class SetupError(Exception):
    """A case could not be set up: this is a mistake of the bench, or of a command that it needs."""


@dataclass
class Seen:
    """A command that has ended.

    Attributes:
        status: its exit status, negative for a signal; None if the bench ended it.
        ended: why the bench ended it: "time", or "ray" since Ray had started.
        first_s: seconds from the start of the process to its first byte of output; None without output.
        peak_bytes: the largest resident memory of the process.
        ray: whether it started a Ray.
    """

    words: tuple[str, ...]
    out: str
    err: str
    status: int | None
    ended: str
    first_s: float | None
    seconds: float
    peak_bytes: int
    ray: bool

    @property
    def text(self) -> str:
        """Both streams, without colours."""
        return ESCAPES.sub("", self.out + self.err).replace("\r\n", "\n")

    @property
    def line(self) -> str:
        """The command line as a person types it, shortened."""
        return "deit-ray " + " ".join(word if len(word) < 60 else "..." + word[-50:] for word in self.words)


@dataclass
class Fault:
    """One count of a figure: lost, silent, raw or late."""

    figure: str
    text: str


@dataclass
class Launch:
    """How a command is started: kept to measure its first line again."""

    argv: list[str]
    cwd: Path
    environment: dict[str, str]


@dataclass
class Stage:
    """The folder of a case. A case writes its input, runs commands, and records what is wrong.

    Attributes:
        root: the folder; commands run in it.
        shared: a folder that all cases read: the prepared digits, and results of an earlier version.
        faults: what was wrong.
        suspects: commands whose first line came late, or that are measured in a terminal too.
    """

    root: Path
    shared: Path
    name: str
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    suspects: list[tuple[str, Launch, float | None]] = field(default_factory=list)
    ours: set[Path] = field(default_factory=set)
    outs: tuple[str, ...] = PRODUCTS
    before: dict[Path, str] | None = None
    results: set[str] = field(default_factory=lambda: {*PRODUCTS} - {"out"})
    undo: list[Callable[[], None]] = field(default_factory=list)
    launch: Launch | None = None

    def __post_init__(self):
        self.root.mkdir(parents=True)
        (self.root / "home").mkdir()
        self.short = Path(tempfile.mkdtemp(prefix="f-"))  # Ray makes sockets below it
        self.environment = {name: value for name, value in os.environ.items() if not CLEARED.search(name)} | {
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.root / "home"),
            "HF_HOME": str(self.root / "home/hf"),
            "RAY_TMPDIR": str(self.short),
            "TERM": "xterm-256color",
            MARK: f"{os.getpid()}-{self.name}",
        }

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def fault(self, figure: str, text: str) -> None:
        self.faults.append(Fault(figure, text))

    def setup(self, *words, env: dict | None = None, within_s: float = 240) -> Seen:
        """Runs a command that is not judged; the files that it writes are the product's.

        Raises:
            SetupError: it failed.
        """
        before = digests(self.root)
        seen = self._run(tuple(map(str, words)), env or {}, within_s, 0, False, (), {})
        if seen.status != 0:
            raise SetupError(f"{seen.line}: exit status {seen.status}: {seen.text[-300:]}")
        self.ours |= {path for path, digest in digests(self.root).items() if before.get(path) != digest}
        return seen

    def run(
        self,
        *words,
        env: dict[str, str | None] | None = None,
        within_s: float = 120,
        columns: int = 0,
        ends_at_ray: bool = False,
        prefix: tuple[str, ...] = (),
        during: Callable[[subprocess.Popen], None] | None = None,
        cwd: Path | None = None,
        answers: bool = True,
    ) -> Seen:
        """Runs a command that is judged for `raw` and `late`.

        Args:
            env: variables to set; None removes one.
            within_s: the command is ended after this time, which is a fault (`late`).
            columns: width of a terminal; 0 for pipes.
            ends_at_ray: a mistake that is visible without Ray: the command is ended once it starts Ray.
            prefix: a program that starts the command.
            during: called again and again while the command runs.
            answers: its first line must come within a second.
        """
        if self.before is None:
            self.before = digests(self.root)
        extra = {"during": during, "cwd": cwd}
        seen = self._run(tuple(map(str, words)), env or {}, within_s, columns, ends_at_ray, prefix, extra)
        self.seen.append(seen)
        self._judge_lateness(seen, within_s, answers)
        return seen

    def _judge_lateness(self, seen: Seen, within_s: float, answers: bool) -> None:
        if seen.ended == "time":
            self.fault("late", f"{seen.line}: has not ended within {within_s:.0f} s: {last_line(seen)}")
        if seen.ended == "ray":
            self.fault("late", f"{seen.line}: started Ray before it reported what is wrong")
        first = seen.first_s if seen.first_s is not None else seen.seconds
        if answers and seen.status is not None and first > FIRST_LINE_S:
            self.suspects.append((seen.line, self.launch, first))

    def measure_terminal_too(self) -> None:
        """The first line of the last command is measured in a terminal too."""
        if self.seen and not any(seen.ended for seen in self.seen):
            self.suspects.append((self.seen[-1].line, self.launch, None))

    def _run(self, words, env, within_s, columns, ends_at_ray, prefix, extra) -> Seen:
        environment = self.environment | env
        environment = {name: value for name, value in environment.items() if value is not None}
        argv = [*prefix, *DEIT_RAY, *words]
        self.launch = Launch(argv, extra.get("cwd") or self.root, environment)
        sessions = {Path(environment[key]) for key in ("RAY_TMPDIR", "TMPDIR") if environment.get(key)}
        known = {path for folder in sessions for path in ray_sessions(folder)}
        process, ends = start(self.launch, columns)
        began, reader = time.monotonic(), Reader(ends)
        ended, usage, during = "", None, extra.get("during")
        while True:
            reader.read(0.05)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                break
            if during is not None and during(process) is True:
                during = None
            has_ray = ends_at_ray and {p for folder in sessions for p in ray_sessions(folder)} - known
            if has_ray or time.monotonic() - began > within_s:
                ended = "ray" if has_ray else "time"
                os.killpg(process.pid, signal.SIGKILL)
                _, _, usage = os.wait4(process.pid, 0)
                process.returncode = -signal.SIGKILL
                break
        seconds = time.monotonic() - began
        reader.read(0.0, rest=True)
        first = None if reader.first is None else reader.first - began
        out, err = reader.texts()
        has_ray = bool({p for folder in sessions for p in ray_sessions(folder)} - known)
        if ended or has_ray:
            end_marked(self.environment[MARK])
        status = None if ended else process.returncode
        return Seen(words, out, err, status, ended, first, seconds, usage.ru_maxrss * 1024, has_ray)

    def find_lost(self) -> None:
        """Counts the files that are changed or gone, but for the product's own folders."""
        after = digests(self.root)
        for path, digest in (self.before or {}).items():
            own = path in self.ours and path.parts[0] in self.outs
            if own or path.parts[0] in self.results:
                continue
            if path not in after:
                self.fault("lost", f"{path} is gone")
            elif after[path] != digest:
                self.fault("lost", f"{path} was changed")

    def end(self) -> None:
        """Ends what the case has left running."""
        for step in reversed(self.undo):
            step()
        end_marked(self.environment[MARK])

    def remove(self) -> None:
        shutil.rmtree(self.short, ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)


def digests(root: Path) -> dict[Path, str]:
    """A digest of each file below a folder by its path; of a link, its target."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if path.is_symlink():
                content = os.readlink(os.fsencode(path))
            elif path.is_file():
                content = path.read_bytes()
            else:
                continue
            found[path.relative_to(root)] = hashlib.sha256(content).hexdigest()
    return found


def start(launch: Launch, columns: int) -> tuple[subprocess.Popen, dict[int, int]]:
    """Starts a process; returns it, and which stream (0 out, 1 err) each file descriptor to read is."""
    if columns:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        streams, ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}, {ours: 0}
    else:
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        streams = {"stdin": subprocess.DEVNULL, "stdout": out_end, "stderr": err_end}
        ends = {out: 0, err: 1}
    process = subprocess.Popen(
        launch.argv, cwd=launch.cwd, env=launch.environment, start_new_session=True, **streams
    )
    for stream in {value for value in streams.values() if value >= 0}:
        os.close(stream)
    return process, ends


class Reader:
    """Reads the output of a process, and notes when the first byte came."""

    def __init__(self, ends: dict[int, int]):
        self.ends, self.chunks, self.first = ends, ([], []), None
        self.selector = selectors.DefaultSelector()
        for end in ends:
            os.set_blocking(end, False)
            self.selector.register(end, selectors.EVENT_READ)

    def read(self, wait_s: float, rest: bool = False) -> None:
        """Reads what is there, after at most `wait_s` seconds; `rest` closes the streams afterwards."""
        if not self.selector.get_map():
            time.sleep(wait_s)
            return
        for key, _ in self.selector.select(wait_s):
            while chunk := self._chunk(key.fd):
                self.first = self.first or time.monotonic()
                self.chunks[self.ends[key.fd]].append(chunk)
        if rest:
            for end in self.ends:
                with contextlib.suppress(KeyError):
                    self.selector.unregister(end)
                os.close(end)

    def _chunk(self, end: int) -> bytes | None:
        try:
            chunk = os.read(end, 1 << 16)
        except BlockingIOError:
            return None
        except OSError:  # a terminal that nobody else has open
            chunk = b""
        if not chunk:
            self.selector.unregister(end)
        return chunk

    def texts(self) -> list[str]:
        return [b"".join(chunks).decode(errors="backslashreplace") for chunks in self.chunks]


def first_line_s(launch: Launch, columns: int) -> float:
    """Seconds until a command says something, which is then ended; REMEASURED_S if it says nothing.

    The time in which the process waited for a core does not count.
    """
    process, ends = start(launch, columns)
    began, reader, waited = time.monotonic(), Reader(ends), 0.0
    try:
        while reader.first is None and time.monotonic() - began < REMEASURED_S:
            reader.read(0.02)
            waited = waited_s(process.pid, waited)
            if reader.first is None and process.poll() is not None:
                return time.monotonic() - began - waited
        return (reader.first or time.monotonic()) - began - waited
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.read(0.0, rest=True)
        end_marked(launch.environment[MARK])


def waited_s(pid: int, before: float) -> float:
    """Seconds that a process has waited for a core; `before` once it is gone."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return before


def end_marked(mark: str) -> None:
    """Kills the processes of a case, such as Ray's daemons, which lead sessions of their own."""
    wanted = f"{MARK}={mark}".encode() + b"\0"
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes() + b"\0":
                    os.kill(int(entry.name), signal.SIGKILL)


def ray_sessions(folder: Path) -> set[Path]:
    return set(folder.glob("ray/session_2*")) if folder.is_dir() else set()


def last_line(seen: Seen) -> str:
    lines = [line for line in seen.text.splitlines() if line.strip()]
    return f"its last line is {lines[-1][:120]!r}" if lines else "it has said nothing"


def control_s(count: int = 5) -> float:
    """The median time of an empty Python process, in seconds."""
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        times.append(time.perf_counter() - begin)
    return sorted(times)[count // 2]


@dataclass(frozen=True)
class Case:
    """One input or command, and what must become of it.

    Attributes:
        row: the kind that it stands for; each row of the page of faults has one.
        member: which member of the kind.
        owner: the part of the product that decides.
        act: writes the input, runs the commands, and records faults.
        ray: whether it needs a local Ray.
    """

    row: str
    member: str
    owner: str
    act: Callable[[Stage], None]
    ray: bool = False

    @property
    def name(self) -> str:
        return f"{self.row}.{self.member}"


CASES: dict[str, Case] = {}


def case(row: str, owner: str, ray: bool = False, **members: tuple):
    """Registers a function as a case of a row: once for each member, with the member's arguments."""

    def register(act):
        for member, arguments in (members or {act.__name__: ()}).items():

            def bound(stage, arguments=arguments):
                act(stage, *arguments)

            found = Case(row, member, owner, bound, ray)
            if found.name in CASES:
                raise ValueError(f"{found.name} is there twice")
            CASES[found.name] = found
        return act

    return register
