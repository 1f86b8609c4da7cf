"""Devices of the host's that a container is given: where the guest has them, and under which numbers."""

from __future__ import annotations

import os

from guest.agent import uevent
from guest.agent.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from guest.agent.wire import Message

    Number = tuple[int, int]


def find(devices: Iterable[Message]) -> dict[str, Number]:
    """Wait for the disks that a request names.

    :param devices: grpc.Device messages.
    :returns: the guest's major and minor number by path in the container.
    :raises AgentError: if a device is of another kind, or does not appear in time.
    """
    numbers = {}
    for device in devices:
        match device.type:
            case "blk":
                node = uevent.disk(device.id)
            case "mmioblk":
                node = uevent.disk(device.vm_path)
            case _:
                raise AgentError(
                    f"device: {device.container_path}: no driver {device.type}; use blk or mmioblk"
                )
        number = os.stat(node).st_rdev
        numbers[device.container_path] = os.major(number), os.minor(number)
    return numbers


def renumber(linux: dict[str, Any], numbers: dict[str, Number]) -> None:
    """Give devices the guest's numbers instead of the host's, in the list and in the rules of access.

    :param linux: the ``linux`` object of a specification, which is changed.
    :param numbers: what :func:`find` returned.
    :raises AgentError: if a device is not in the list.
    """
    listed = {device["path"]: device for device in linux.get("devices", [])}
    rules = linux.get("resources", {}).get("devices", [])
    # All at once: the guest's number of one disk may be the host's of another.
    changed: list[tuple[dict[str, Any], Number]] = []
    for path, number in numbers.items():
        if path not in listed:
            raise AgentError(f"device: {path}: not among the specification's devices; list it there")
        device = listed[path]
        # The rules come without the numbers that are 0, see oci.
        own = [
            rule
            for rule in rules
            if rule["type"] == device["type"]
            and (rule.get("major", 0), rule.get("minor", 0)) == (device["major"], device["minor"])
        ]
        if rules and not own:
            own = [{"allow": True, "type": "b", "access": "rwm"}]
            rules.extend(own)
        changed += [(entry, number) for entry in (device, *own)]
    for entry, (major, minor) in changed:
        entry["major"], entry["minor"] = major, minor
