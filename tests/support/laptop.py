"""The laptop of a person who uses a cluster: a home folder, a shell's environment, and tunnels."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.support import aws
from tests.support.cluster_yaml import ROOT, derive
from tests.support.hosts import Hosts, can_connect

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


PROJECT = ("deit_ray", "experiments", "deploy", "pyproject.toml", "constraints.txt", "README.md")


def documented() -> list[str]:
    """The commands of docs/cluster.md, in their order."""
    lines = (ROOT / "docs" / "cluster.md").read_text().splitlines()
    return [line.strip() for line in lines if line.startswith("    ")]


class Laptop:
    """A laptop with a copy of the project, in whose cluster.yaml the values are filled in.

    Args:
        folder: of its files.
        cloud: AWS.
        hosts: what AWS's machines are.

    Attributes:
        project: the project's folder.
        file: path of its cluster.yaml.
        environment: of its shells.
        typed: the documented commands that were typed.
    """

    def __init__(self, folder: Path, cloud: aws.Aws, hosts: Hosts):
        self.cloud, self.hosts = cloud, hosts
        self.project, self.typed = folder / "project", []
        self.file = self.project / "cluster.yaml"
        home = folder / "home"
        for made in (home / ".ssh", folder / "tmp", self.project):
            made.mkdir(parents=True)
        for name in PROJECT:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.project / name)
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(home),
            "TMPDIR": str(folder / "tmp"),
            "RAY_TMPDIR": str(folder / "tmp"),
            "PYTHONPATH": str(self.project),
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
        self.write(derive())
        (group,) = yaml.safe_load(self.type("python deploy/aws.py cluster.yaml"))["security_group_ids"]
        self.write(derive(group))

    def write(self, config: dict) -> None:
        """Writes cluster.yaml."""
        self.file.write_text(yaml.safe_dump(config, sort_keys=False))

    def type(self, line: str, timeout: float = 240, check: bool = True, **values: str) -> str:
        """Types a command of docs/cluster.md, says yes to questions, and returns what it prints.

        Args:
            values: what a person puts for the words in capitals.
        """
        process = self.begin(line, **values)
        try:
            output = process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{line}: did not end:\n{process.communicate()[0]}") from None
        assert not check or process.returncode == 0, f"{line}: {process.returncode}:\n{output}"
        return output

    def begin(self, line: str, **values: str) -> subprocess.Popen:
        """Types a command of docs/cluster.md, and waits for nothing."""
        assert line in documented(), line
        self.typed.append(line)
        for word, value in values.items():
            assert word in line, word
            line = line.replace(word, value)
        if line.startswith(("ray up", "ray down")):
            line += " -y"  # a person says yes at a terminal
        return subprocess.Popen(
            ["bash", "-c", f"exec {line}"],
            cwd=self.project,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @contextlib.contextmanager
    def pages(self, study: str) -> Iterator[None]:
        """The pages of the head are at their usual ports of the laptop's loopback, MLflow with a study."""
        process = self.begin("deit-ray ui STUDY --cluster cluster.yaml", STUDY=study)
        try:
            deadline = time.monotonic() + START_S
            while not all(can_connect("127.0.0.1", port) for port in (5000, 8080, 8265)):
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    raise AssertionError(f"no pages:\n{process.communicate()[0]}")
                time.sleep(0.1)
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)
