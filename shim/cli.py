"""``hako``: the command for operators."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from shim.commands.remedies import remedy
from shim.errors import ShimError
from shim.host import releases
from shim.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: Each command with the module that declares it (``add_to``) and runs it (``run``).
COMMANDS = {
    "ps": "ps",
    "inspect": "inspect_sandbox",
    "top": "top",
    "logs": "logs",
    "events": "events",
    "exec": "exec_in_guest",
    "timeline": "timeline",
    "check": "check",
    "collect": "collect",
    "park": "park",
    "unpark": "unpark",
    "monitor": "monitor",
    "metrics": "metrics",
    "config": "configuration",
    "install": "install",
    "uninstall": "uninstall",
    "image": "image",
    "template": "template",
    "version": "show_version",
}
_EXIT_STATUSES = (
    "Exit status: 0 for success or yes, 1 for failure or no, 2 for a wrong command line, "
    "130 for an interruption. `hako exec` ends with the status of its command."
)
_INTERRUPTED = 128 + 2  # as shells count SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the entry point of the console script.

    :param arguments: the command line without the program; by default, that of this process.
    :returns: the exit status: 0 for yes or done, 1 for no or failed, 2 for a wrong command line.
    """
    _open_standard_streams()
    given = sys.argv[1:] if arguments is None else list(arguments)
    # Only the module of the given command is imported.
    wanted = given[:1] if given[:1] and given[0] in COMMANDS else COMMANDS
    chosen, unknown = parser(wanted).parse_known_args(given)
    if unknown:  # argparse itself would show the usage of all commands
        chosen.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        status = _run(chosen)
        sys.stdout.flush()
    except (Refusal, ShimError) as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # as of `hako ps | head -1`
        _drop_output()
        return 0
    except OSError as error:
        _drop_output()
        what = error.filename or "the output"
        rest = remedy(error, "correct that, and run it again")
        return _failed(f"{chosen.command}: {what}: {error.strerror}; {rest}")
    return status


def _open_standard_streams() -> None:
    """Open those that the caller has closed, so that no other file gets their numbers."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest free number
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - kept open
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - as above


def _run(chosen: argparse.Namespace) -> int:
    """Run a command; of the errors of tasks that it runs at once, raise the first."""
    try:
        return int(chosen.run(chosen))
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from group


def run() -> NoReturn:
    """Do the command of this process's command line, and end."""
    status = main()
    releases.leave()  # `hako monitor` may have been the last process of an old release
    sys.exit(status)


def _failed(message: str) -> int:
    """Print the reason in one line; others may have chosen parts of its text."""
    print("".join(mark if mark.isprintable() else " " for mark in message), file=sys.stderr)
    return 1


def _drop_output() -> None:
    """Discard the rest of the output's buffer, without an error."""
    with contextlib.suppress(OSError, ValueError):  # it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser(wanted: Iterable[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Describe the command line.

    :param wanted: the commands that it should have.
    """
    hako = argparse.ArgumentParser(
        prog="hako", description="Containers in their own virtual machines.", epilog=_EXIT_STATUSES
    )
    commands = hako.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in wanted:
        module = importlib.import_module(f"shim.commands.{COMMANDS[name]}")
        module.add_to(commands)
        commands.choices[name].set_defaults(run=module.run)
        _note_parsers(commands.choices[name])
    return hako


def _note_parsers(command: argparse.ArgumentParser) -> None:
    """Let the parsed arguments name the parser of their command, or of the command below it."""
    command.set_defaults(parser=command)
    for action in command._actions:  # noqa: SLF001 - argparse has no other way to its subcommands
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - as above
            for each in action.choices.values():
                _note_parsers(each)


if __name__ == "__main__":
    run()
