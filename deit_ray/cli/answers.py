"""Runs a command, and turns whatever ends it early into one message and an exit status.

| ended by | exit status |
| --- | --- |
| a mistake, a fault of the machine or the network, a check that does not hold | 1 |
| an unknown command or option, a value of the wrong type | 2 |
| Ctrl-C, SIGTERM, a closed terminal | 130, 143, 129 |
"""

import os
import sys
import tempfile
import traceback

import typer
from typer.core import TyperGroup

from deit_ray.cluster.signals import Received, handling_signals, interruption_of
from deit_ray.errors import Interrupted, UnexpectedError, UserError, explain_os_error
from deit_ray.terminal.console import Console


def run(command: TyperGroup) -> None:
    """Runs the command line, and ends this process; --verbose shows the traceback of an error.

    Typer's own way to run a command would hide what an interruption has kept.
    """
    with handling_signals() as received:
        try:
            status = _status_of(command, received)
        except KeyboardInterrupt:  # it came while an earlier end was said
            status = received.exit_status
    sys.exit(status)


def _status_of(command: TyperGroup, received: Received) -> int:
    """Runs a command, says what ended it early, and returns the exit status."""
    verbose = any(word in sys.argv[1:] for word in ("--verbose", "-v"))
    console = Console()
    try:
        with command.make_context("deit-ray", sys.argv[1:]) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, Interrupted) as error:
        message = interruption_of(error) or "interrupted, before there was anything to keep"
        console.err.print(f"\n{message}", style="yellow", markup=False)
        return received.exit_status
    except Exception as error:
        if verbose:
            raise
        console.err.print(f"error: {message_of(error)}", style="red", markup=False)
        return getattr(error, "exit_code", 1)
    return 0


def message_of(error: Exception) -> str:
    """The message for a person: what was wrong, and what can be done; never a name of a Python class."""
    if isinstance(error, UserError):
        is_fault = isinstance(error, UnexpectedError)
        return f"{error}\n{_where_details_are(error)}" if is_fault else str(error)
    if hasattr(error, "format_message"):  # an error of typer: a wrong command, option or value
        return _with_value(error)
    if isinstance(error, OSError):
        return explain_os_error(error)
    if isinstance(error, MemoryError):
        return "memory ran out; end other programs, or use a machine with more of it"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return (
            f"the package {error.name.partition('.')[0]} is missing; install deit_ray again: pip install -e ."
        )
    return f"this should not have happened; {_where_details_are(error)}"


def _with_value(error: Exception) -> str:
    """The message of an error of typer, with the value that pydantic has refused."""
    message, refused = error.format_message(), getattr(error.__context__, "errors", None)
    values = [found["input"] for found in refused()] if refused else []
    if len(values) != 1 or not isinstance(values[0], str) or values[0] in message:
        return message
    return f"{message}, not {values[0]}"


def _where_details_are(error: BaseException) -> str:
    """Keeps the traceback of an error in a file, and says where: nobody likes to repeat a long command."""
    text = f"{' '.join(['deit-ray', *sys.argv[1:]])}\n{''.join(traceback.format_exception(error))}"
    try:
        number, path = tempfile.mkstemp(prefix="deit_ray-error-", suffix=".txt", text=True)
        with os.fdopen(number, "w") as file:
            file.write(text)
    except OSError:
        return "repeat the command with --verbose, and report what it prints"
    return f"please report it, with the details in {path}"
