"""A user's home directory, from the list of users that the container has."""

from __future__ import annotations

import os

from guest.agent import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

_DIRECTORY, _LIST = "/etc", "/etc/passwd"
_MOST_BYTES = 1 << 20
_NAME = "HOME="
_UNKNOWN = "/"
_UID, _HOME = 2, 5
"""Fields of a line, see passwd(5)."""


def give_home(process: dict[str, Any], *, root: str, mounts: Iterable[dict[str, Any]] = ()) -> None:
    """Set ``HOME`` unless it is set, as runc does: crun sets none for a user who is not in the list.

    :param process: the ``process`` object of the runtime specification.
    :param root: the root directory of the container.
    :param mounts: the mounts that are still to come there.
    """
    env = process["env"]
    if any(entry.startswith(_NAME) and entry != _NAME for entry in env):
        return
    home = _home_of(process["user"]["uid"], _list(root, mounts))
    process["env"] = [*(entry for entry in env if entry != _NAME), f"{_NAME}{home}"]


def _list(root: str, mounts: Iterable[dict[str, Any]]) -> bytes:
    """Read the list of users; empty if there is none."""
    path = _LIST
    for mount in mounts:
        destination, source = mount["destination"].rstrip("/"), mount.get("source", "")
        if destination == _DIRECTORY:
            root, path = source, _LIST.removeprefix(_DIRECTORY)
        elif destination == _LIST:
            root, name = os.path.split(source)
            path = f"/{name}"
    try:
        fd = kernel.open_in(root, path)
    except OSError:
        return b""
    try:
        parts, left = [], _MOST_BYTES
        while left and (part := os.read(fd, left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
    except OSError:
        return b""  # a directory, or a FIFO
    finally:
        os.close(fd)


def _home_of(uid: int, users: bytes) -> str:
    """Find a user as runc does: a field that is missing or not a number counts as 0, so it may match root."""
    number = b"%d" % uid
    for raw in users.split(b"\n"):
        line = raw.strip()
        if line and (not uid or number in line):
            fields = [*line.split(b":"), *[b""] * _HOME]
            if _number(fields[_UID]) == uid:
                return fields[_HOME].decode(errors="replace")
    return _UNKNOWN


def _number(field: bytes) -> int:
    try:
        return int(field)
    except ValueError:
        return 0
