"""Ray jobs from a laptop, through a tunnel to the head: submitted by the plain `ray job submit`, followed."""

import asyncio
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from deit_ray.cluster import surroundings
from deit_ray.errors import UnavailableError, UserError, first_line, lines_of

PORT = 8265  # of the head's dashboard, which takes jobs
OTHER_RAY = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_JOB_HEADERS")
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")


def job_command(port: int, job: str, entrypoint: list[str], working_dir: str | None) -> list[str]:
    """The words of the `ray job submit` that starts a job.

    Args:
        port: of this machine that leads to the head's dashboard.
        job: its submission id.
        entrypoint: the words of the command that the head runs.
        working_dir: folder here that the job takes along.
    """
    folder = [] if working_dir is None else ["--working-dir", working_dir]
    address = f"http://127.0.0.1:{port}"
    options = ["--address", address, "--submission-id", job, *folder, "--no-wait"]
    return ["ray", "job", "submit", *options, "--", *entrypoint]


def submit(words: list[str], token: str) -> None:
    """Runs a `ray job submit`.

    Args:
        words: see `job_command`.
        token: the cluster's; only the environment of the process has it.

    Raises:
        UserError: ray is not installed here, or the head refuses the job.
    """
    beside = Path(sys.executable).with_name(words[0])
    program = str(beside) if beside.exists() else shutil.which(words[0])
    if program is None:
        raise UserError("--cluster: the program ray is not installed on this machine; pip install -e .")
    surroundings.go_direct()
    environment = {name: value for name, value in os.environ.items() if name not in OTHER_RAY}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    done = subprocess.run(
        [program, *words[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise UserError(f"the cluster refuses the job: {_reason(done.stdout)}")


def _reason(printed: str) -> str:
    """The last line of what `ray job submit` prints, without the name of an exception."""
    last = (lines_of(printed) or ["no reason given"])[-1]
    return re.sub(r"^[\w.]*(Error|Exception): ", "", last).rstrip(".")


class Job:
    """A job that was submitted.

    Args:
        port: of this machine that leads to the head's dashboard.
        name: the job's submission id.
        token: the cluster's.

    Raises:
        UnavailableError: the head does not answer.
    """

    def __init__(self, port: int, name: str, token: str):
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient  # takes a second

        surroundings.go_direct()
        for variable in OTHER_RAY:  # they go before the address
            os.environ.pop(variable, None)
        logging.getLogger(JobSubmissionClient.__module__).setLevel(logging.CRITICAL)
        self.name = name
        try:
            self.client = JobSubmissionClient(
                f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {token}"}
            )
        except (AuthenticationError, ConnectionError, RuntimeError, OSError) as error:
            raise UnavailableError(f"the head's dashboard gives no answer: {first_line(error)}") from error

    def follow(self, skip: int, show: Callable[[str], None]) -> None:
        """Shows the job's log until the job has ended.

        Args:
            skip: number of characters at the beginning that are not shown: those of an earlier connection.
            show: called with each new part of the log.

        Raises:
            UnavailableError: the connection is lost.
        """
        import aiohttp

        async def read() -> None:
            seen = 0
            async for text in self.client.tail_job_logs(self.name):
                before, seen = seen, seen + len(text)
                if seen > skip:
                    show(text[max(0, skip - before) :])

        try:
            asyncio.run(read())
            while self.status() not in TERMINAL:
                time.sleep(1)
        except (aiohttp.ClientError, ConnectionError, OSError, RuntimeError) as error:
            raise UnavailableError(f"the connection to the job {self.name} is lost") from error

    def is_known(self) -> bool:
        """Whether the head knows the job; it knows none from before a restart of Ray."""
        try:
            self.status()
        except RuntimeError as error:
            if "status code 404" in str(error):
                return False
            raise UnavailableError(f"the head's dashboard gives no answer: {first_line(error)}") from error
        return True

    def status(self) -> str:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
        return str(self.client.get_job_status(self.name).value)

    def reason(self) -> str:
        """Why the job has failed, in one line: what its log says, or else what Ray says."""
        info = self.client.get_job_info(self.name)
        if info.driver_exit_code is not None:  # Ray's message then repeats the log
            return "its log above says why"
        return (lines_of(info.message or "") or ["Ray gives no reason"])[0]
