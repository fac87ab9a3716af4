"""Why MLflow does not take a delivery: one sentence from the exceptions of its many layers."""

import contextlib
import re
import socket
from collections.abc import Iterator

import requests
import sqlalchemy.exc

from deit_ray.errors import UnavailableError, UserError, explain_os_error, lines_of
from deit_ray.tracking.address import shown

STATUS = re.compile(r"(?:failed with error code|too many|HTTP status code|^) ?(\d{3})\b")
LOGIN = (
    "it asks for a login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
)
FORBIDDEN = "its login may not do that: ask its administrator for the right to write this experiment"
NO_MLFLOW = "what answers there is no MLflow server: correct tracking.uri"
MISSING = "it has no such page: what answers there is no MLflow server, or tracking.uri lacks its path"
CHARS = 200


@contextlib.contextmanager
def naming_server(uri: str) -> Iterator[None]:
    """Names MLflow's address, and the reason, in the message if a request of it fails.

    Raises:
        UnavailableError: the request failed for another reason than a `UserError`, which is passed on.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # MLflow and its clients raise many
        raise UnavailableError(f"MLflow at {shown(uri)}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """Why a request failed, in one sentence without names of Python classes."""
    chain = list(causes(error))
    for kind, explain in KINDS:
        for cause in chain:
            if isinstance(cause, kind) and (reason := explain(cause)):
                return reason
    lines = lines_of(str(chain[-1]))
    return lines[0][:CHARS] if lines else "it does not answer"


def causes(error: BaseException):
    """An exception and what led to it, the first cause last. MLflow wraps a refused connection six times."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an error of MLflow or requests; None if it has none."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and (found := STATUS.search(str(error))):
        status = int(found[1])
    return status


def _by_status(error: BaseException) -> str | None:
    status = status_of(error)
    if status in (401, 407):
        return LOGIN if status == 401 else "the proxy on the way asks for a login: see https_proxy"
    if status == 403:
        return FORBIDDEN
    if status in (404, 405):
        return MISSING
    if status is not None and status >= 500:
        return f"it answers that it failed (HTTP status {status}): see its log"
    if "not in a valid JSON format" in str(error):
        return NO_MLFLOW
    return None


def _of_system(error: OSError) -> str | None:
    if isinstance(error, socket.gaierror):
        return "there is no such host: correct tracking.uri"
    return explain_os_error(error) if error.errno else None


KINDS = (
    (UserError, str),
    (sqlalchemy.exc.DBAPIError, lambda error: f"its database cannot be used: {error.orig}"),
    (
        requests.exceptions.ProxyError,
        lambda error: "the proxy refuses: see http_proxy and no_proxy",
    ),
    (
        requests.exceptions.SSLError,
        lambda error: "its certificate is not trusted: set MLFLOW_TRACKING_SERVER_CERT_PATH to its file",
    ),
    (OSError, _of_system),
    (requests.exceptions.Timeout, lambda error: "no answer in time"),
    (requests.exceptions.ConnectionError, lambda error: None),
    (Exception, _by_status),
)
