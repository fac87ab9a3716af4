"""Hosts on one machine, for tests of `ray up`.

A host has an address on the network 10.77.0.0/24, an sshd, processes, a host name, and empty /home, /root,
/tmp, /run and /dev/shm of its own. The rest of the file system is this machine's. People and Ray log in as
`ubuntu`, as on AWS's images. Everything happens in namespaces that tests/support/alone.sh made, so nothing
stays when the test ends or is killed, and nothing reaches another network.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

NETWORK = "10.77.0."
LAPTOP = NETWORK + "254"  # the test's own address
START_S = 20
HERE = Path(__file__).parent
TOOLS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync"}
USER = "ubuntu"


def why_no_hosts() -> str | None:
    """Why no hosts can be made here; None if they can."""
    if sys.platform != "linux" or os.getuid() != 0:
        return "hosts need Linux and root"
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool, path=_path()) is None]
    if missing:
        return f"hosts need {', '.join(missing)}"
    return None


def is_alone() -> bool:
    """Whether this process is in namespaces of its own (alone.sh)."""
    return "DEIT_RAY_ALONE" in os.environ


def address_of(number: int) -> str:
    return f"{NETWORK}{number}"


class Hosts:
    """Hosts and their network. A number is the last part of a host's address.

    Args:
        folder: for keys, settings and logs.
        shared: folders of this machine that hosts see below /home, /root or /tmp, where theirs are empty.
        environment: of every process that runs on a host, also of those that ssh starts.

    Attributes:
        key: path of the private key that logs in on every host.
    """

    def __init__(self, folder: Path, shared: tuple[Path, ...] = (), environment: dict | None = None):
        self.folder, self.shared = folder, shared
        self.environment = environment or {}
        self.key = folder / "key"
        self.processes: dict[int, subprocess.Popen] = {}

    def __enter__(self) -> "Hosts":
        if not is_alone():
            raise RuntimeError("hosts need namespaces of their own (tests/support/alone.sh)")
        self.folder.mkdir(parents=True, exist_ok=True)
        _keygen(self.key)
        _ip("link", "add", "br0", "type", "bridge")
        _ip("addr", "add", f"{LAPTOP}/24", "dev", "br0")
        _ip("link", "set", "br0", "up")
        return self

    def __exit__(self, *exception) -> None:
        for number in list(self.processes):
            self.stop(number)
        _ip("link", "del", "br0")

    def start(self, *numbers: int) -> None:
        """Starts hosts, and waits until each answers on its SSH port."""
        for number in numbers:
            self.processes[number] = self._start(number)
        deadline = time.monotonic() + START_S
        for number in numbers:
            while not can_connect(address_of(number), 22):
                if time.monotonic() > deadline or self.processes[number].poll() is not None:
                    raise RuntimeError(f"host {number} did not start:\n{self.log(number)}")
                time.sleep(0.05)

    def stop(self, number: int) -> None:
        """Ends a host with all its processes. Its files are lost."""
        process = self.processes.pop(number)
        process.send_signal(signal.SIGKILL)  # of `unshare`, with which the host's process 1 dies
        process.wait()
        deadline = time.monotonic() + START_S
        while f" v{number}@" in _links():
            if time.monotonic() > deadline:
                raise RuntimeError(f"host {number} did not end")
            time.sleep(0.05)

    def cut(self, number: int) -> None:
        """Takes a host off the network; its processes go on."""
        _ip("link", "set", f"v{number}", "down")

    def connect(self, number: int) -> None:
        """Brings a host back that was cut off."""
        _ip("link", "set", f"v{number}", "up")

    def ssh(self, number: int, command: str, user: str = USER, check: bool = True, timeout: float = 60):
        """Runs a shell command on a host; returns subprocess's result with its text output."""
        words = ["ssh", *self.ssh_options(), f"{user}@{address_of(number)}", command]
        return subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=check, timeout=timeout
        )

    def ssh_options(self) -> list[str]:
        """Words of a command line of ssh that logs in on a host."""
        values = {
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
            "ConnectTimeout": "5",
        }
        return ["-i", str(self.key), *(word for item in values.items() for word in ("-o", "=".join(item)))]

    def log(self, number: int) -> str:
        """What a host's sshd has written."""
        return (self._conf(number) / "log").read_text()

    def _conf(self, number: int) -> Path:
        return self.folder / f"h{number}"

    def _start(self, number: int) -> subprocess.Popen:
        conf = self._conf(number)
        self._write_settings(number, conf)
        # always the same hardware address: others remember it
        hardware = f"02:00:0a:4d:00:{number:02x}"
        _ip("link", "add", f"v{number}", "type", "veth", "peer", "name", f"p{number}", "address", hardware)
        _ip("link", "set", f"v{number}", "master", "br0", "up")
        words = ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child=KILL"]
        words += ["--mount-proc", "--", "bash", str(HERE / "host.sh"), str(conf), *map(str, self.shared)]
        with open(conf / "log", "wb") as log:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": _path()},
                start_new_session=True,
            )
        # `unshare` makes its network namespace before it forks
        deadline = time.monotonic() + START_S
        while not (inside := _children(process.pid)):
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"host {number} did not start:\n{self.log(number)}")
            time.sleep(0.01)
        _ip("link", "set", f"p{number}", "name", "eth0", "netns", str(inside[0]))
        return process

    def _write_settings(self, number: int, conf: Path) -> None:
        conf.mkdir(parents=True, exist_ok=True)
        _keygen(conf / "hostkey")
        (conf / "address").write_text(address_of(number))
        (conf / "hosts").write_text(f"127.0.0.1 localhost\n{address_of(number)} h{number}\n")
        (conf / "authorized").write_text((self.folder / "key.pub").read_text())
        for name, line in {
            "passwd": f"{USER}:x:1000:1000::/home/{USER}:/bin/bash",
            "group": f"{USER}:x:1000:",
            "shadow": f"{USER}:*:19000:0:99999:7:::",
        }.items():
            others = [
                other
                for other in Path("/etc", name).read_text().splitlines()
                if other.split(":")[0] != USER and ":1000:" not in other
            ]
            (conf / name).write_text("\n".join([*others, line, ""]))
        values = " ".join(f'{name}="{value}"' for name, value in self.environment.items())
        lines = [
            f"ListenAddress {address_of(number)}",
            "HostKey /run/host/hostkey",
            "AuthorizedKeysFile /run/host/authorized",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "UseDNS no",
            "MaxSessions 100",
            "MaxStartups 100",
            "PidFile none",
            *([f"SetEnv {values}"] if values else []),
        ]
        (conf / "sshd_config").write_text("\n".join([*lines, ""]))


def can_connect(address: str, port: int, timeout_s: float = 1.0) -> bool:
    """Whether something accepts a TCP connection there."""
    try:
        socket.create_connection((address, port), timeout_s).close()
    except OSError:
        return False
    return True


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, env={"PATH": _path()})


def _links() -> str:
    return subprocess.run(
        ["ip", "-o", "link"], check=True, capture_output=True, text=True, env={"PATH": _path()}
    ).stdout


def _keygen(path: Path) -> None:
    if not path.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
