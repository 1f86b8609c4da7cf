"""Manual pages, in the language of ``man 7 man``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scripts.debian.commands import Argument, Command

_HEAD = '.TH {name} {section} "" "Hako {version}" "{volume}"\n'
_FILES = """\
.SH FILES
.TP
.I /etc/hako/config.toml
The configuration; every key may be left out.
.B hako config explain
lists the keys.
.TP
.I /etc/hako/config.d/*.toml
Further files, read in the order of their names.
.TP
.I /var/lib/hako/guest
The kernel and the initial file system of the virtual machines.
.TP
.I /var/log/hako
The reasons why sandboxes failed.
"""
_STATUS = """\
.SH EXIT STATUS
0 means yes or done, 1 no or failed, 2 a wrong command line, and 130 an interruption.
.B hako exec
ends with the status of its command.
"""

_SHIM = """\
.SH NAME
containerd-shim-hako-v2 \\- run containers and pods in their own virtual machines
.SH SYNOPSIS
.B containerd-shim-hako-v2
.RB [ \\-v ]
.RB [ \\-info ]
.RI [ flags ]
.RB [ start | delete ]
.SH DESCRIPTION
containerd runs this program for containers whose runtime is
.BR io.containerd.hako.v2 .
Each sandbox, which is a container or a pod, gets its own small QEMU virtual machine.
The program is not meant to be started by hand, except for
.BR \\-v ,
which prints the version.
.PP
.B hako check
says whether this host can run sandboxes, and
.B hako install
tells containerd of the runtime.
"""


def hako(command: Command, *, version: str) -> str:
    """Write the page of ``hako``.

    :param command: the command line.
    :param version: Hako's.
    """
    text = _HEAD.format(name="HAKO", section=1, version=version, volume="User Commands")
    text += f".SH NAME\nhako \\- {_escaped(command.help).rstrip('.').lower()}\n"
    text += ".SH SYNOPSIS\n.B hako\n.I COMMAND\n[\n.I ARGUMENTS\n]\n.SH COMMANDS\n"
    for each in command.all():
        if each.commands or each is command:
            continue
        text += f".SS {_escaped(' '.join(each.words))}\n{_sentence(each.help)}\n.PP\n{_escaped(each.usage)}\n"
        text += "".join(_argument(argument) for argument in each.arguments if "--help" not in argument.flags)
    return text + _STATUS + _FILES + ".SH SEE ALSO\n.BR containerd-shim-hako-v2 (8)\n"


def shim(*, version: str) -> str:
    """Write the page of the shim.

    :param version: Hako's.
    """
    head = _HEAD.format(
        name="CONTAINERD-SHIM-HAKO-V2", section=8, version=version, volume="System Administration"
    )
    return f"{head}{_SHIM}{_FILES}.SH SEE ALSO\n.BR hako (1)\n"


def _argument(argument: Argument) -> str:
    value = f" \\fI{_escaped(argument.value)}\\fR" if argument.value else ""
    names = ", ".join(f"\\fB{_escaped(flag)}\\fR{value}" for flag in argument.flags) or value.strip()
    return f".TP\n{names}\n{_sentence(argument.help)}\n"


def _sentence(text: str) -> str:
    if not text:
        return ""
    return _escaped(f"{text[0].upper()}{text[1:]}{'' if text.endswith('.') else '.'}")


def _escaped(text: str) -> str:
    """Keep backslashes, hyphens and leading dots what they are."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped[:1] in {".", "'"} else escaped
