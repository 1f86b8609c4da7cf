"""Completion of ``hako``'s command line for bash, zsh and fish."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scripts.debian.commands import Argument, Command

# The loop finds the command that the words before the cursor lead to.
_BASH = """\
# bash completion for hako; generated from its command line
_hako() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} command=hako word
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$command $word" in
            {commands}) command="$command $word" ;;
        esac
    done
    COMPREPLY=()
    case "$command ${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
    esac
    case "$command" in
{words}
    esac
}}
complete -F _hako hako
"""

_ZSH = """\
#compdef hako
# zsh completion for hako; generated from its command line
local command=hako word
for word in "${{(@)words[2,CURRENT-1]}}"; do
    case "$command $word" in
        {commands}) command="$command $word" ;;
    esac
done
local -a found
case "$command $words[CURRENT-1]" in
{values}
esac
case "$command" in
{words}
esac
"""

_FISH = """\
# fish completion for hako; generated from its command line
function __hako_at
    set -l command hako
    set -l words (commandline -opc)
    for word in $words[2..-1]
        switch "$command $word"
            case {commands}
                set command "$command $word"
        end
    end
    test "$command" = "$argv[1]"
end
complete -c hako -f
"""


def bash(hako: Command) -> str:
    """Write bash's.

    :param hako: the command line.
    """
    values = [f"        {patterns}) {_bash_value(given)}; return ;;" for patterns, given in _values(hako)]
    words = []
    for command in hako.all():
        offered = " ".join([*_names(command), *_flags(command)])
        line = f'mapfile -t COMPREPLY < <(compgen -W {shlex.quote(offered)} -- "$current")'
        if _takes_file(command):
            line += "; compopt -o default"
        words.append(f"        '{' '.join(command.words)}') {line} ;;")
    return _BASH.format(commands=_paths(hako, "|"), values="\n".join(values), words="\n".join(words))


def _values(hako: Command) -> Iterator[tuple[str, Argument]]:
    """List the flags that take a value, as the pattern of a shell's ``case``."""
    for command in hako.all():
        for argument in command.arguments:
            if argument.flags and argument.value:
                yield "|".join(f"'{' '.join(command.words)} {flag}'" for flag in argument.flags), argument


def _bash_value(argument: Argument) -> str:
    if argument.choices:
        words = shlex.quote(" ".join(argument.choices))
        return f'mapfile -t COMPREPLY < <(compgen -W {words} -- "$current")'
    return "compopt -o default" if argument.is_file else ":"


def zsh(hako: Command) -> str:
    """Write zsh's.

    :param hako: the command line.
    """
    values = [f"    {patterns}) {_zsh_value(given)}; return ;;" for patterns, given in _values(hako)]
    words = []
    for command in hako.all():
        offered = [_zsh_pair(each.words[-1], each.summary) for each in command.commands]
        for argument in command.arguments:
            offered += [_zsh_pair(flag, argument.help) for flag in argument.flags]
        positional = [c for each in command.arguments if not each.flags for c in each.choices]
        offered += [_zsh_pair(choice, "") for choice in positional]
        files = "; _files" if _takes_file(command) else ""
        found = " ".join(offered)
        words.append(f"    '{' '.join(command.words)}') found=({found}); _describe hako found{files} ;;")
    return _ZSH.format(commands=_paths(hako, "|"), values="\n".join(values), words="\n".join(words))


def _zsh_pair(name: str, text: str) -> str:
    escaped = text.replace(":", "\\:")
    return shlex.quote(f"{name}:{escaped}" if text else name)


def _zsh_value(argument: Argument) -> str:
    if argument.choices:
        return f"compadd -- {' '.join(map(shlex.quote, argument.choices))}"
    return "_files" if argument.is_file else ":"


def fish(hako: Command) -> str:
    """Write fish's.

    :param hako: the command line.
    """
    lines = [_FISH.format(commands=_paths(hako, " "))]
    for command in hako.all():
        here = f"complete -c hako -n {_fish_quoted('__hako_at ' + shlex.quote(' '.join(command.words)))}"
        lines += [
            f"{here} -a {each.words[-1]} -d {_fish_quoted(each.summary)}\n" for each in command.commands
        ]
        for argument in command.arguments:
            lines.append(f"{here}{_fish_argument(argument)}\n")
    return "".join(lines)


def _fish_argument(argument: Argument) -> str:
    text = f" -d {_fish_quoted(argument.help)}"
    if not argument.flags:
        choices = f" -a {_fish_quoted(' '.join(argument.choices))}{text}" if argument.choices else ""
        return " -F" if argument.is_file else choices or " -f"
    flags = "".join(
        f" -l {flag[2:]}" if flag.startswith("--") else f" -s {flag[1:]}" for flag in argument.flags
    )
    if not argument.value:
        return f"{flags}{text}"
    if argument.choices:
        return f"{flags} -x -a {_fish_quoted(' '.join(argument.choices))}{text}"
    return f"{flags} -r{' -F' if argument.is_file else ' -f'}{text}"


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _names(command: Command) -> list[str]:
    positional = [choice for each in command.arguments if not each.flags for choice in each.choices]
    return [each.words[-1] for each in command.commands] + positional


def _flags(command: Command) -> list[str]:
    return [flag for each in command.arguments for flag in each.flags]


def _takes_file(command: Command) -> bool:
    return any(each.is_file for each in command.arguments if not each.flags)


def _paths(hako: Command, separator: str) -> str:
    return separator.join(f"'{' '.join(each.words)}'" for each in hako.all() if len(each.words) > 1)
