"""PCI devices of the host that the guest drives: their driver, and the device nodes that it makes.

There is no udev here: this module finds the driver of a device by its modalias, as udev would. The container
is then given every node below the device in sysfs.
"""

from __future__ import annotations

import os
import time

from guest.agent import files, modules, uevent
from guest.agent.console import log
from guest.agent.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

DRIVER_TIMEOUT_S = 10.0
"""How long a driver may take for its first look at a device."""

NODES_TIMEOUT_S = 10.0
_SETTLED_S = 0.2
_MODE = 0o660
_STORAGE, _NETWORK, _BRIDGE = 0x01, 0x02, 0x06
"""Base classes of the PCI Code and ID Assignment Specification."""


def nodes(path: str) -> list[dict[str, Any]]:
    """Load a device's driver, and wait for the device nodes that it makes.

    :param path: its PCI path.
    :returns: the nodes, as ``linux.devices`` of a specification has them; none of a device without a driver.
    :raises AgentError: if the device does not appear in time.
    :raises InvalidArgument: if the path is none.
    """
    directory = uevent.wait_for(lambda: _complete(path), what=f"PCI device: {path}")
    if not _is_driven(directory):
        modules.load_for(files.read(f"{directory}/modalias").strip())
        if not _comes(lambda: _is_driven(directory), DRIVER_TIMEOUT_S):
            log(f"PCI device: {path}: no driver of this guest takes it")
            return []
    kind = int(files.read(f"{directory}/class"), 16) >> 16
    if kind in {_NETWORK, _BRIDGE}:
        return []
    wanted = {"b"} if kind == _STORAGE else {"b", "c"}
    if not _comes(lambda: any(each["type"] in wanted for each in _below(directory)), NODES_TIMEOUT_S):
        log(f"PCI device: {path}: its driver makes no node")
    return _settled(directory)


def _complete(path: str) -> str | None:
    """Find a device's directory in sysfs once it has its attributes, which appear later."""
    directory = uevent.pci_directory(path)
    return directory if directory and files.exists(f"{directory}/modalias") else None


def _is_driven(directory: str) -> bool:
    return files.exists(f"{directory}/driver")


def _comes(condition: Callable[[], bool], timeout_s: float) -> bool:
    try:
        return uevent.wait_for(lambda: condition() or None, what="", timeout_s=timeout_s)
    except AgentError:
        return False


def _settled(directory: str) -> list[dict[str, Any]]:
    """Wait until no more nodes appear; those of a disk appear one by one, its partitions last."""
    found = list(_below(directory))
    while True:
        time.sleep(_SETTLED_S)
        more = list(_below(directory))
        if more == found:
            return found
        found = more


def _below(directory: str) -> Iterator[dict[str, Any]]:
    for place, _, names in sorted(os.walk(directory)):
        if "dev" not in names:
            continue
        try:
            number = files.read(f"{place}/dev").strip()
            properties = dict(line.partition("=")[::2] for line in files.read(f"{place}/uevent").splitlines())
            is_disk = os.readlink(f"{place}/subsystem").endswith("/block")
        except OSError:  # it goes
            continue
        if "DEVNAME" in properties:
            major, minor = number.split(":")
            yield {
                "path": f"/dev/{properties['DEVNAME']}",
                "type": "b" if is_disk else "c",
                "major": int(major),
                "minor": int(minor),
                "fileMode": _MODE,
                "uid": 0,
                "gid": 0,
            }
