"""What Ray takes from its surroundings: proxies, folders, a token, an address. Checked before Ray starts.

This file does not import Ray, so that a mistake in the surroundings is answered early.
"""

import os
import secrets
import socket
import tempfile
from collections.abc import Container, Iterable
from pathlib import Path
from urllib.parse import urlsplit

from deit_ray.errors import UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
# A socket's path has at most 107 bytes. Below its base folder Ray needs 68 of them:
# /ray/session_2026-11-27_22-29-27_601136_4194304/sockets/plasma_store
LONGEST_BASE = 107 - 68
FALLBACKS = ("/tmp", "/var/tmp", "/dev/shm")
LEAST_BYTES = 32 << 20  # free space for Ray's logs and sockets
ANSWER_S = 5.0
PORTS = 50  # that are tried
BOOTSTRAP = "~/ray_bootstrap_config.yaml"  # `ray up` leaves the cluster's description there, on the head node


def go_direct(hosts: Iterable[str] = ()) -> None:
    """Has this process, and the processes that it starts, reach loopback and some hosts without a proxy.

    What the person has set in no_proxy stays. Nothing changes if no proxy is set.
    """
    if not any(os.environ.get(name) or os.environ.get(name.upper()) for name in PROXIES):
        return
    set_by_person = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    known = [entry.strip() for entry in set_by_person.split(",") if entry.strip()]
    new = [host for host in dict.fromkeys([*LOOPBACK, *hosts]) if host and host not in known]
    # libraries read one or the other, and prefer different ones
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(known + new)


def on_head() -> Path | None:
    """The cluster's description if this machine is the head node of a cluster that `ray up` made."""
    path = Path(os.path.expanduser(BOOTSTRAP))  # without a home folder it stays as it is
    return path if path.is_file() else None


def base_folder() -> tuple[str, str | None]:
    """The folder below which a local Ray can keep its files, and why it is not the one that Ray would take.

    Raises:
        UserError: no folder for temporary files can be used.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), None)
    wanted = os.environ[name] if name else FALLBACKS[0]
    reasons = {}
    for folder in dict.fromkeys([wanted, *FALLBACKS]):
        reason = _why_not(folder)
        if reason is None:
            why = f"{name or 'the default'} {wanted} {reasons[wanted]}" if reasons else None
            return folder, why
        reasons[folder] = reason
    found = "; ".join(f"{folder} {reason}" for folder, reason in reasons.items())
    raise UserError(
        f"no folder for temporary files can be used: {found}; make room in one of them, or set TMPDIR to a "
        f"folder with a path of at most {LONGEST_BASE} bytes"
    )


def _why_not(folder: str) -> str | None:
    """Why Ray cannot keep its files below a folder; None if it can."""
    if len(os.fsencode(os.path.abspath(folder))) > LONGEST_BASE:
        return f"has a path of more than {LONGEST_BASE} bytes, too long for Ray's sockets"
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        space = os.statvfs(folder)
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    if space.f_bavail * space.f_frsize < LEAST_BYTES:
        return f"has less than {LEAST_BYTES >> 20} MB of free space"
    return None


def bring_token() -> None:
    """Makes a token for a local Ray in the environment if Ray could not keep one in the home folder.

    Ray's token authentication stays on; by default Ray keeps its token in ~/.ray/auth_token.
    """
    is_set = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if is_set or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    home = os.path.expanduser("~")
    folder = os.path.join(home, ".ray")
    if os.access(os.path.join(folder, "auth_token"), os.R_OK):
        return
    try:
        if not os.path.isdir(folder):
            os.mkdir(folder)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def check_address(address: str) -> str:
    """Refuses a cluster's address at which nothing can be; returns its host.

    Args:
        address: host:port of a cluster.

    Raises:
        UserError: the address has another form, its host is unknown, or nothing listens there.
    """
    allowed = 'allowed are HOST:PORT, where PORT is usually 6379, "auto" and "local"'
    if "://" in address:
        raise UserError(
            f"Ray: {address} is an address of another kind; {allowed}; start this command on a machine of "
            "the cluster, or set --address or RAY_ADDRESS to the address that `ray status` shows"
        )
    try:
        parsed = urlsplit(f"//{address}")
        host, port = parsed.hostname, parsed.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise UserError(f"Ray: {address} is not an address; {allowed}; see --address and RAY_ADDRESS")
    try:
        socket.create_connection((host, port), ANSWER_S).close()
    except socket.gaierror:
        raise UserError(f"Ray: {address}: there is no host {host}; see --address and RAY_ADDRESS") from None
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else (error.strerror or "no answer").lower()
        raise UserError(silent(address, why)) from None
    return host


def silent(address: str, why: str) -> str:
    """The message that no Ray answers at an address."""
    return (
        f"Ray: no cluster answers at {address} ({why}); start it, correct --address or RAY_ADDRESS, or use "
        "--address local for a Ray on this machine"
    )


def free_port(wanted: int, taken: Container[int] = ()) -> int:
    """The port on loopback that is wanted, or the next one that nothing listens on.

    Args:
        taken: ports that are not free either.

    Raises:
        UserError: none of the next ports can be used.
    """
    for port in range(wanted, min(wanted + PORTS, 65536)):
        if port in taken:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:  # in use, or not allowed to this person
                continue
            return port
    raise UserError(
        f"--port {wanted}: neither it nor one of the next {PORTS} ports can be used; name another"
    )
