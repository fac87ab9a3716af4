"""The head of a cluster, from a laptop: commands, tunnels and files through SSH, the only port that is open.

Ray says where the head is (`ray.autoscaler.sdk`). The options of ssh are those of `ray exec`, so whoever can
run that can run this. The cluster's token stays in this process's memory.
"""

import contextlib
import io
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from deit_ray.cluster.description import Description
from deit_ray.errors import Interrupted, UnavailableError, UserError, first_line, lines_of

VENV = "~/venv"  # where cluster.yaml installs this project on every node
TOKEN = "~/.ray/auth_token"
SSH_OPTIONS = {  # as ray/autoscaler/_private/command_runner.py has them
    "StrictHostKeyChecking": "no",  # machines come and go, and addresses return with other keys
    "UserKnownHostsFile": os.devnull,
    "IdentitiesOnly": "yes",
    "ExitOnForwardFailure": "yes",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ConnectTimeout": "15",
    "PasswordAuthentication": "no",
    "LogLevel": "ERROR",
}
NO_CONNECTION = 255  # ssh's own exit status
READY = "deit_ray: ready"
FACTS = f"""
printf 'deit_ray home: %s\\n' "$HOME"
test -x {VENV}/bin/deit-ray && printf 'deit_ray program: yes\\n'
{VENV}/bin/python -m deit_ray.cluster.code
test -r {TOKEN} && printf 'deit_ray token: %s\\n' "$(cat {TOKEN})"
"""


@dataclass(frozen=True)
class Facts:
    """What a laptop needs to know of the head.

    Attributes:
        program: absolute path of deit-ray there.
        code: the hash of its code, see `code.code_hash`; unknown if its version does not print it.
        token: of the cluster; never shown.
    """

    program: str
    code: str
    token: str = field(repr=False)


@dataclass(frozen=True)
class Head:
    """The head of a cluster that is up.

    Attributes:
        address: name or address for SSH.
        key: path of the private key; None for the person's own.
        proxy: ssh's ProxyCommand, if cluster.yaml has one.
    """

    description: Description
    address: str
    key: str | None = None
    proxy: str | None = None

    @property
    def target(self) -> str:
        return f"{self.description.tree['auth']['ssh_user']}@{self.address}"

    def ssh(self, *options: str) -> list[str]:
        """The ssh command with its options, without host and command."""
        known = SSH_OPTIONS | ({"ProxyCommand": self.proxy} if self.proxy else {})
        key = ["-i", self.key] if self.key else []
        return ["ssh", *key, *(word for item in known.items() for word in ("-o", "=".join(item))), *options]

    def facts(self) -> Facts:
        """Asks the head what `Facts` holds, in one connection.

        Raises:
            UserError: deit-ray or the token is missing there.
            UnavailableError: there is no connection.
        """
        done = self._checked(
            subprocess.run(
                [*self.ssh("-T"), self.target, in_shell(FACTS)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
        )
        found = dict(re.findall(r"^deit_ray (\w+): (.*)$", done.stdout, re.MULTILINE))
        code = re.search(r"^deit_ray: the code on \S+ is (\w+)$", done.stdout, re.MULTILINE)
        for name, what in {"program": f"deit-ray in {VENV}", "token": f"token in {TOKEN}"}.items():
            if not found.get(name):
                raise UserError(
                    f"{self.description.path}: the head ({self.target}) has no {what}; its setup has not "
                    f"ended well; run: {self.description.remedy}"
                )
        program = f"{found['home']}{VENV.removeprefix('~')}/bin/deit-ray"
        return Facts(program, code[1] if code else "unknown", found["token"])

    def run(self, *words: str, capture: bool = False) -> subprocess.CompletedProcess:
        """Runs deit-ray on the head with these arguments; what it prints appears here.

        Args:
            capture: keeps what it prints on standard output instead.

        Raises:
            UnavailableError: there is no connection.
        """
        script = f"{_terminal()}{VENV}/bin/deit-ray {shlex.join(words)}"
        return self.run_script(script, capture)

    def run_script(self, script: str, capture: bool = False) -> subprocess.CompletedProcess:
        """Runs shell commands on the head, as `run` does."""
        sys.stdout.flush()
        done = subprocess.run(
            [*self.ssh("-T"), self.target, in_shell(script)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else None,
            text=True,
            check=False,
        )
        return self._checked(done)

    @contextlib.contextmanager
    def tunnel(self, ports: dict[int, int]) -> Iterator[subprocess.Popen]:
        """Forwards ports of loopback here to ports of the head's loopback while the context is entered.

        Args:
            ports: the head's by this machine's.

        Raises:
            UnavailableError: there is no connection, or a port here is in use.
        """
        forwards = [f"-L127.0.0.1:{here}:127.0.0.1:{there}" for here, there in ports.items()]
        process = subprocess.Popen(
            # `cat` ends with this process, however that ends, and ssh with `cat`
            [*self.ssh("-T", *forwards), self.target, f"echo '{READY}'; cat > /dev/null"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal is for this process alone
        )
        try:
            if process.stdout.readline().strip() != READY:
                raise self._silent(process.communicate()[1])
            yield process
        finally:
            process.terminate()
            process.communicate()

    def fetch(self, folder: str, into: str) -> None:
        """Copies the entries of a folder of the head into a folder here, by rsync.

        Raises:
            UserError: rsync is not installed here.
            UnavailableError: the files cannot be copied.
        """
        if shutil.which("rsync") is None:
            raise UserError("--cluster: rsync is not installed on this machine; install it")
        words = ["rsync", "-rt", "--rsh", shlex.join(self.ssh("-T")), f"{self.target}:{folder}/", into]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise UnavailableError(
                f"{self.description.path}: {folder} of the head cannot be copied: {_last_line(done.stderr)}"
            )

    def _checked(self, done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
        if done.returncode == NO_CONNECTION:
            raise self._silent(done.stderr or "")
        if done.returncode < 0:
            raise Interrupted(f"{self.description.path}: the connection to the head was ended")
        return done

    def _silent(self, said: str) -> UnavailableError:
        return UnavailableError(
            f"{self.description.path}: no SSH connection to the head, {self.target} ({_last_line(said)}); "
            "see that port 22 is open to this machine's address, and that auth.ssh_private_key is right"
        )


def find_head(description: Description) -> Head:
    """The head of a cluster that `ray up` has started.

    Raises:
        UserError: ssh is missing here, or the cluster is not up.
    """
    if shutil.which("ssh") is None:
        raise UserError("--cluster: ssh is not installed on this machine; install it (openssh-client)")
    tree, auth = description.tree, description.tree["auth"]
    from ray.autoscaler import sdk  # takes a second

    said = io.StringIO()
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            sdk.configure_logging(log_style="record", color_mode="false", verbosity=0)
            address = sdk.get_head_node_ip(tree)
            key = auth.get("ssh_private_key")
            if key is None and tree["provider"]["type"] != "local":
                key = sdk.bootstrap_config(tree)["auth"].get("ssh_private_key")  # made by `ray up`
    except Exception as error:  # of Ray, or of whatever library its provider uses
        reason = first_line(error)
        if isinstance(error, RuntimeError) and "not found" in reason:
            raise UserError(
                f"{description.path}: the cluster {description.name} is not up; run: {description.remedy}"
            ) from error
        raise UserError(
            f"{description.path}: where the head is cannot be found out: {reason}; see that `ray exec "
            f"{shlex.quote(description.path)} hostname` works"
        ) from error
    return Head(
        description, address, None if key is None else os.path.expanduser(key), auth.get("ssh_proxy_command")
    )


def in_shell(script: str) -> str:
    """A command for ssh that runs a script with the environment of `ray exec`, that of a person's shell.

    An interactive shell without a terminal complains; what the script itself says on standard error stays.
    """
    inner = f"exec 2>&3 3>&-\n{script}"
    return f"bash --login -i -c {shlex.quote('source ~/.bashrc; ' + inner)} 3>&2 2> /dev/null"


def _terminal() -> str:
    """Settings with which a command on the head prints for the terminal here, if there is one."""
    if not sys.stdout.isatty():
        return ""
    width = shutil.get_terminal_size().columns
    return f"TERM={shlex.quote(os.environ.get('TERM', 'xterm'))} COLUMNS={width} FORCE_COLOR=1 "


def _last_line(text: str) -> str:
    return (lines_of(text) or ["no reason given"])[-1].rstrip(".")
