"""The laptop of a person who uses a cluster: a home folder, a shell's environment, and tunnels."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.support import aws
from tests.support.cluster_yaml import ROOT, derive
from tests.support.hosts import USER, Hosts, can_connect

START_S = 30
# A node that dies is noticed after 5 s; with Ray's defaults after a minute.
IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "5",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "AUTOSCALER_NODE_START_WAIT_S": "120",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Laptop:
    """A laptop with cluster.yaml, whose values are filled in, and the key that AWS knows.

    Args:
        folder: of its files.
        cloud: AWS.
        hosts: what AWS's machines are.

    Attributes:
        file: path of its cluster.yaml.
        environment: of its shells.
    """

    def __init__(self, folder: Path, cloud: aws.Aws, hosts: Hosts):
        self.folder, self.cloud, self.hosts = folder, cloud, hosts
        self.file = folder / "cluster.yaml"
        home = folder / "home"
        (home / ".ssh").mkdir(parents=True)
        (folder / "tmp").mkdir()
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(home),
            "TMPDIR": str(folder / "tmp"),
            "RAY_TMPDIR": str(folder / "tmp"),
            "PYTHONPATH": str(ROOT),
            "TERM": "dumb",
            **IMPATIENT,
            **aws.ENVIRONMENT,
        }
        # `ray up` would make the key pair in AWS, whose machines would then know it
        key = home / ".ssh" / f"ray-autoscaler_{aws.REGION}.pem"
        key.write_bytes(hosts.key.read_bytes())
        key.chmod(0o600)
        public = Path(f"{hosts.key}.pub").read_bytes()
        cloud.client("ec2").import_key_pair(KeyName=key.stem, PublicKeyMaterial=public)

    def fill_in(self) -> None:
        """Makes what the account needs, and cluster.yaml."""
        self.file.write_text(yaml.safe_dump(derive(), sort_keys=False))
        printed = self.run("python", "deploy/aws.py", self.file).stdout
        (group,) = yaml.safe_load(printed)["security_group_ids"]
        self.file.write_text(yaml.safe_dump(derive(group), sort_keys=False))

    def run(self, *words, timeout: float = 240, check: bool = True) -> subprocess.CompletedProcess:
        """Runs a command in the project's folder; its output is text."""
        ended = subprocess.run(
            list(map(str, words)),
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if check and ended.returncode:
            raise AssertionError(
                f"{' '.join(map(str, words))}: exit status {ended.returncode}:\n{ended.stdout}"
            )
        return ended

    def ray(self, command: str, *words, **options) -> subprocess.CompletedProcess:
        """Runs a command of Ray's launcher with cluster.yaml."""
        return self.run("ray", command, self.file, *words, **options)

    def head(self) -> str:
        """The address of the head."""
        return self.ray("get-head-ip").stdout.split()[-1]

    @contextlib.contextmanager
    def tunnel(self, head: str, *ports: int) -> Iterator[None]:
        """Ports of the head's loopback, on the laptop's loopback, through SSH."""
        forwards = [word for port in ports for word in ("-L", f"{port}:127.0.0.1:{port}")]
        options = [
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "LogLevel=ERROR",
        ]
        words = ["ssh", "-N", "-i", str(self.hosts.key), *options, *forwards, f"{USER}@{head}"]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, env=self.environment)
        try:
            deadline = time.monotonic() + START_S
            while not all(can_connect("127.0.0.1", port) for port in ports):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"no tunnel to {head}")
                time.sleep(0.1)
            yield
        finally:
            process.kill()
            process.wait()
