"""Uploads to MLflow's store of artifacts, which may fail while MLflow itself answers."""

from collections.abc import Callable

from deit_ray.tracking.reasons import reason_of
from deit_ray.tracking.server import Gone, Refused, Server

ATTEMPTS = 3  # failures in a row of the store of artifacts before no more are sent


class NoArtifacts(Refused):
    """MLflow's store of artifacts does not work; a person has been told."""


class Uploads:
    """Sends artifacts. Once the store of artifacts has failed some times, none is sent any more: points and
    states are delivered nevertheless.

    Args:
        server: the connection to MLflow.
        warn: shows a person a message.

    Attributes:
        failures: how often in a row the store has failed while MLflow answered.
    """

    def __init__(self, server: Server, warn: Callable[[str], None]):
        self.server, self.warn = server, warn
        self.failures = 0

    def send(self, run_id: str, function: Callable, *arguments) -> None:
        """Sends artifacts of a run.

        Args:
            function: uploads them, when it is called with `arguments`.

        Raises:
            NoArtifacts: the store of artifacts does not work.
            Refused: MLflow refuses them, or they cannot be read.
        """
        if self.failures >= ATTEMPTS:
            raise NoArtifacts
        try:
            function(*arguments)
        except (Refused, Gone):
            raise
        except Exception as error:
            if not self.server.is_answering(run_id):
                raise
            self.failures += 1
            if self.failures < ATTEMPTS:
                raise
            self.warn(
                f"MLflow takes no artifacts ({reason_of(error)}); everything else is delivered; once that is "
                "fixed, deit-ray sync delivers them"
            )
            raise NoArtifacts from error
        self.failures = 0
