"""The file beside containerd's main file that adds Hako."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shim.commands import containerd_config
from shim.refusal import Refusal

MAIN = Path("/etc/containerd/config.toml")
"""containerd's main file."""
NAME = "conf.d/hako.toml"
"""Beside the main file."""
HANDLER = "hako"

_MARK = "# Written by `hako install`"
_DIGEST = "# The lines above have the SHA-256 "
_MADE = "# The directory was made for this file."

_HEAD = """\
{mark} for containerd {version}, which reads it if {main} says, before its first table:
#     imports = ["{directory}/*.toml"]
# containerd must find containerd-shim-hako-v2 in its PATH.
"""

_CARRIED = "# What containerd has by {main} and by default; run `hako install` again after a change there."

_RUNTIME = """
[plugins."{plugin}".containerd.runtimes.{handler}]
runtime_type = "io.containerd.hako.v2"
# The devices of the host are not in the machine.
privileged_without_host_devices = true
# What a pod may ask of Hako.
pod_annotations = ["io.hako.*", "io.katacontainers.*"]
"""

_SANDBOXER = """\
# "shim" makes pods without a pause container; "podsandbox" is what every containerd does.
sandboxer = "podsandbox"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format of containerd's configuration.

    :param number: its version.
    :param plugin: the plugin that has the handlers.
    """

    number: int
    plugin: str


SECOND = Format(number=2, plugin="io.containerd.grpc.v1.cri")
THIRD = Format(number=3, plugin="io.containerd.cri.v1.runtime")


def native_format(version: str) -> Format:
    """Return the newest format of a containerd, in which it prints its configuration.

    :param version: containerd's, such as ``1.7.24``.
    :raises Refusal: if Hako does not work with it.
    """
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    if not (major.isdigit() and minor.isdigit()) or (int(major), int(minor)) < (1, 6):
        raise Refusal(f"install: containerd {version}: not supported; install containerd 1.6 or later")
    return SECOND if int(major) == 1 else THIRD


def candidates(
    version: str, main: Path, *, document: dict[str, Any], handlers: dict[str, Any], is_directory_made: bool
) -> list[str]:
    """Write the texts that may add Hako to containerd and change nothing else, the likeliest one first.

    In containerd 1, an imported file replaces all that the main file says of a plugin. containerd 2 merges
    them, if both have the same format. Both forget their own handler, runc, where a file names one.

    :param version: containerd's.
    :param main: its main file.
    :param document: what that says.
    :param handlers: those that containerd has, by name.
    :param is_directory_made: whether the file's directory is there for it alone.
    :raises Refusal: if Hako does not work with that containerd.
    """
    others = {name: each for name, each in handlers.items() if name != HANDLER}
    said = {each: containerd_config.said_of(document, each.plugin) for each in (SECOND, THIRD)}
    if native_format(version) == SECOND:
        table = said[SECOND].get("containerd", {})
        runtimes = {**others, **table.get("runtimes", {})}
        found = [(SECOND, {**said[SECOND], "containerd": {**table, "runtimes": runtimes}})]
    else:
        formats = (SECOND, THIRD) if document.get("version") == SECOND.number else (THIRD, SECOND)
        are_named = any(each.get("containerd", {}).get("runtimes") for each in said.values())
        with_handlers: dict[str, Any] = {"containerd": {"runtimes": others}} if others else {}
        carried = ({}, with_handlers) if are_named else (with_handlers, {})
        found = [(each, more) for each in formats for more in carried]
    texts = [
        render(version, main=main, format=each, carried=more, is_directory_made=is_directory_made)
        for each, more in found
    ]
    return list(dict.fromkeys(texts))


def render(
    version: str,
    *,
    main: Path = MAIN,
    format: Format | None = None,  # noqa: A002 - the field's word
    carried: dict[str, Any] | None = None,
    is_directory_made: bool = False,
) -> str:
    """Write one text.

    :param version: containerd's, such as ``1.7.24``.
    :param main: its main file.
    :param format: of the text; by default the newest that this containerd has.
    :param carried: its other settings of the plugin.
    :param is_directory_made: whether the file's directory was made only for it.
    :returns: TOML with comments that say where it belongs.
    :raises Refusal: if Hako does not work with that containerd.
    """
    native = native_format(version)
    chosen = format or native
    text = _HEAD.format(mark=_MARK, version=version, main=main, directory=(main.parent / NAME).parent)
    if is_directory_made:
        text += f"{_MADE}\n"
    text += f"version = {chosen.number}\n"
    if carried:
        lines = containerd_config.tables(("plugins", chosen.plugin), _without_own(carried))
        text += "\n".join(["", _CARRIED.format(main=main), *lines, ""])
    text += _RUNTIME.format(plugin=chosen.plugin, handler=HANDLER)
    if native == THIRD:
        text += _SANDBOXER
    return f"{text}{_DIGEST}{_digest(text)}.\n"


def _without_own(carried: dict[str, Any]) -> dict[str, Any]:
    table = carried.get("containerd", {})
    runtimes = {name: each for name, each in table.get("runtimes", {}).items() if name != HANDLER}
    return {**carried, "containerd": {**table, "runtimes": runtimes}}


def is_own(text: str) -> bool:
    """Tell whether ``hako install``, of any release, has written a file."""
    return text.startswith(_MARK)


def is_changed(text: str) -> bool:
    """Tell whether a file of ``hako install`` has been changed by hand."""
    lines, found, digest = text.rpartition(_DIGEST)
    return bool(found) and digest != f"{_digest(lines)}.\n"


def is_directory_made(text: str) -> bool:
    """Tell whether the directory was made only for this file."""
    return f"\n{_MADE}\n" in text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def remedy(main: Path, document: dict[str, Any], *, version: str) -> str:
    """Describe the line by which the main file imports the drop-in.

    :param main: the main file.
    :param document: its content.
    :param version: containerd's.
    """
    own = f"{(main.parent / NAME).parent}/*.toml"
    imports = document.get("imports", [])
    line = f"`imports = [{', '.join(containerd_config.value(each) for each in [*imports, own])}]`"
    if not main.exists():
        return f"make that file of the lines `version = {native_format(version).number}` and {line}"
    if imports:
        return f"replace its `imports` with {line}"
    return f"put the line {line} before its first table"
