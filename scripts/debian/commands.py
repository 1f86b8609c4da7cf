"""The command line of ``hako`` as data, from which the manual and the completions are written."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What stands for a file in the help.
_FILES = {"FILE", "DIR", "PATH", "PROGRAM"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """An option, or a positional argument.

    :param flags: how the option is written; none if it is positional.
    :param value: what stands for its value in the help; empty if it takes none.
    :param choices: the values that it takes; none if they are not listed.
    :param help: what it does.
    """

    flags: tuple[str, ...]
    value: str
    choices: tuple[str, ...]
    help: str

    @property
    def is_file(self) -> bool:
        """Whether its value is a path."""
        return self.value in _FILES


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command, by the words that lead to it.

    :param words: ``hako`` and the names of the commands.
    :param summary: what it does, in a few words.
    :param help: what it does, in sentences if it has more to say.
    :param usage: its synopsis.
    :param arguments: what may follow it.
    :param commands: the commands below it.
    """

    words: tuple[str, ...]
    summary: str
    help: str
    usage: str
    arguments: tuple[Argument, ...]
    commands: tuple[Command, ...]

    def all(self) -> Iterator[Command]:
        """Return this command and those below it, from the top down."""
        yield self
        for each in self.commands:
            yield from each.all()


def described(parser: argparse.ArgumentParser, *, text: str = "") -> Command:
    """Describe a parser and those below it.

    :param parser: the parser.
    :param text: what it does, in a few words.
    """
    arguments: list[Argument] = []
    commands: list[Command] = []
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to what it was told
        if action.help == argparse.SUPPRESS:
            continue
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - as above
            helps = {each.dest: each.help or "" for each in action._choices_actions}  # noqa: SLF001 - as above
            commands += [
                described(each, text=helps[name]) for name, each in action.choices.items() if name in helps
            ]
            continue
        arguments.append(_argument(action))
    return Command(
        words=tuple(parser.prog.split()),
        summary=text,
        help=parser.description or text,
        usage=" ".join(parser.format_usage().removeprefix("usage: ").split()),
        arguments=tuple(arguments),
        commands=tuple(commands),
    )


def _argument(action: argparse.Action) -> Argument:
    value = ""
    if action.nargs != 0:
        value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return Argument(
        flags=tuple(action.option_strings),
        value=value,
        choices=tuple(str(choice) for choice in action.choices or ()),
        help=(action.help or "") % {"default": action.default, "prog": "hako"} if action.help else "",
    )
