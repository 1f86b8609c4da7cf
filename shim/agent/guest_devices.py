"""The device files that the guest's own kernel serves, with the numbers that every Linux uses.

Some need a module, which the guest's kernel loads when the file is first opened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_MEMORY, _TERMINAL, _LOOP, _MISCELLANEOUS = 1, 5, 7, 10  # Documentation/admin-guide/devices.txt
_LOOP_CONTROL = (_MISCELLANEOUS, 237)
_DISK_GROUP = 6
_LOOPS = 8  # the number of loop devices that a kernel makes when the module is loaded

# The devices of a privileged container, by path: minor number, mode and group, as on an ordinary host.
_MODULES_NODES = {
    "/dev/autofs": (235, 0o644, 0),
    "/dev/btrfs-control": (234, 0o660, _DISK_GROUP),
    "/dev/cuse": (203, 0o600, 0),
    "/dev/fuse": (229, 0o666, 0),
    "/dev/loop-control": (237, 0o660, _DISK_GROUP),
    "/dev/mapper/control": (236, 0o600, 0),
    "/dev/net/tun": (200, 0o666, 0),
    "/dev/uhid": (239, 0o600, 0),
    "/dev/vhost-net": (238, 0o600, 0),
    "/dev/vhost-vsock": (241, 0o600, 0),
}
_CHARACTER_DEVICES = frozenset(
    {(_MEMORY, minor) for minor in (3, 5, 7, 8, 9, 11)}
    | {(_TERMINAL, minor) for minor in (0, 1, 2)}
    | {(_MISCELLANEOUS, minor) for minor, _mode, _group in _MODULES_NODES.values()}
)


def allows_everything(rules: Iterable[Mapping[str, Any]]) -> bool:
    """Tell whether a container is privileged: it may use every device, and lists all of the host's."""
    return any(
        rule.get("allow")
        and rule.get("major") is None
        and rule.get("type") in {None, "", "a"}
        and "w" in (rule.get("access") or "rwm")
        for rule in rules
    )


def is_of_the_guest(device: Mapping[str, Any], linux: Mapping[str, Any]) -> bool:
    """Tell whether the guest has a device, so that the host's is not needed.

    :param device: an entry of ``linux.devices`` of a specification.
    :param linux: the ``linux`` object that it is in. A loop device is the host's, unless the container is
        privileged or also has ``/dev/loop-control``, with which it makes its own loop devices.
    """
    kind = device.get("type") or ""
    if kind == "b":
        return device.get("major") == _LOOP and (_is_privileged(linux) or _controls_loops(linux))
    return kind == "p" or (kind in {"c", "u"} and _number(device) in _CHARACTER_DEVICES)


def offered(linux: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the devices that a privileged container has without naming them; none for others.

    :param linux: the ``linux`` object of a specification. A container with a user namespace gets none either:
        no user in it could own them.
    """
    kinds = {each.get("type") for each in linux.get("namespaces") or []}
    if not _is_privileged(linux) or "user" in kinds:
        return []
    named = {device.get("path") for device in linux.get("devices") or []}
    nodes = [
        {"path": path, "type": "c", "major": _MISCELLANEOUS, "minor": minor, "fileMode": mode, "gid": group}
        for path, (minor, mode, group) in _MODULES_NODES.items()
    ]
    nodes += [
        {
            "path": f"/dev/loop{minor}",
            "type": "b",
            "major": _LOOP,
            "minor": minor,
            "fileMode": 0o660,
            "gid": _DISK_GROUP,
        }
        for minor in range(_LOOPS)
    ]
    return [node for node in nodes if node["path"] not in named]


def _is_privileged(linux: Mapping[str, Any]) -> bool:
    return allows_everything((linux.get("resources") or {}).get("devices") or [])


def _controls_loops(linux: Mapping[str, Any]) -> bool:
    return any(_number(device) == _LOOP_CONTROL for device in linux.get("devices") or [])


def _number(device: Mapping[str, Any]) -> tuple[int, int]:
    return device.get("major") or 0, device.get("minor") or 0
