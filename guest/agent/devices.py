"""The host's devices that a container gets: their paths and numbers in the guest."""

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


def find(devices: Iterable[Message]) -> tuple[dict[str, Number], list[dict[str, Any]]]:
    """Wait for the disks and the PCI devices that a request names.

    :param devices: grpc.Device messages.
    :returns: the guest's major and minor number of each disk, by path in the container; and the nodes of the
        PCI devices, as ``linux.devices`` of a specification has them.
    :raises AgentError: if a device is of another kind, or does not appear in time.
    """
    numbers: dict[str, Number] = {}
    nodes: list[dict[str, Any]] = []
    for device in devices:
        match device.type:
            case "blk":
                node = uevent.disk(device.id)
            case "mmioblk":
                node = uevent.disk(device.vm_path)
            case "vfio-pci-gk":
                from guest.agent import passthrough  # noqa: PLC0415 - few containers have one

                for option in device.options:  # the host's address, an equals sign, and the PCI path here
                    nodes += passthrough.nodes(option.partition("=")[2])
                continue
            case _:
                raise AgentError(
                    f"device: {device.container_path}: no driver {device.type}; "
                    "use blk, mmioblk or vfio-pci-gk"
                )
        number = os.stat(node).st_rdev
        numbers[device.container_path] = os.major(number), os.minor(number)
    return numbers, nodes


def add(linux: dict[str, Any], nodes: list[dict[str, Any]]) -> None:
    """Give a container device nodes that the host does not have, and access to them.

    :param linux: the ``linux`` object of a specification, which is changed; devices that it names keep their
        settings.
    :param nodes: as :func:`find` returns them.
    """
    named = {device["path"] for device in linux.get("devices", [])}
    for node in nodes:
        if node["path"] not in named:
            linux.setdefault("devices", []).append(node)
            rule = {key: node[key] for key in ("type", "major", "minor")}
            rules = linux.setdefault("resources", {}).setdefault("devices", [])
            if rules:  # without any, everything is allowed
                rules.append({"allow": True, "access": "rwm", **rule})


def renumber(linux: dict[str, Any], numbers: dict[str, Number]) -> None:
    """Give devices the guest's numbers instead of the host's, in the list and in the rules of access.

    :param linux: the ``linux`` object of a specification, which is changed.
    :param numbers: what :func:`find` returned.
    :raises AgentError: if a device is not in the list.
    """
    listed = {device["path"]: device for device in linux.get("devices", [])}
    rules = linux.get("resources", {}).get("devices", [])
    # All at once: one disk's number in the guest may be another disk's number on the host.
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
