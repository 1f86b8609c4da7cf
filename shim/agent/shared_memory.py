"""A pod's shared memory: the container manager makes a tmpfs on the host, and the guest uses its own instead.

A mount is the pod's shared memory because of its source, not its destination: a volume at ``/dev/shm`` is an
ordinary volume.
"""

from __future__ import annotations

import os
import posixpath
import re
from typing import TYPE_CHECKING, Any

from shim.agent.guest_paths import SHM_BYTES, SHM_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Collection

DESTINATION = "/dev/shm"  # noqa: S108 - a path in the container

# Managers make one here for the sandbox or container that the path names: containerd's CRI; Docker; nerdctl,
# below its namespace; Podman and CRI-O.
_PLACES = re.compile(
    r"(/sandboxes/(?P<cri>[^/]+)"
    r"|/containers/(?P<docker>[^/]+)/mounts"
    r"|/containers/[^/]+/(?P<nerdctl>[^/]+)"
    r"|/(?P<podman>[^/]+)/userdata)/shm$"
)
_KERNELS_OWN = ("noexec", "nosuid", "nodev")  # all of them mount it with these options


def source_of(sandbox_id: str) -> str:
    """Return the source that containerd's CRI gives the shared memory of a sandbox."""
    return f"/sandboxes/{sandbox_id}/shm"


def is_bind(entry: dict[str, Any]) -> bool:
    """Tell whether a mount of a specification is a bind mount; its options or its type say so."""
    return entry.get("type") == "bind" or not {"bind", "rbind"}.isdisjoint(entry.get("options") or [])


def is_pods(entry: dict[str, Any], *, ids: Collection[str], shares_hosts_ipc: bool) -> bool:
    """Tell whether a mount is the pod's shared memory.

    :param entry: an element of the specification's ``mounts``.
    :param ids: of the container and of its sandbox.
    :param shares_hosts_ipc: whether the container has the host's IPC namespace. Then a manager gives it the
        host's shared memory, too; the guest has its own of both.
    :raises KeyError: if it has no destination.
    """
    if not is_bind(entry) or posixpath.normpath(entry["destination"]) != DESTINATION:
        return False
    source = posixpath.normpath(entry.get("source") or "")
    if source == DESTINATION:
        return shares_hosts_ipc
    place = _PLACES.search(source)
    return place is not None and not set(ids).isdisjoint(place.groupdict().values())


def in_guest(entry: dict[str, Any]) -> dict[str, Any]:
    """Replace the source of the pod's shared memory by its path in the guest.

    :param entry: the mount.
    :returns: the mount to send. It names the options of the file system, because a bind with other
        options would lose them.
    """
    options = [option for option in entry.get("options") or [] if option not in {"bind", "rbind"}]
    return {
        **entry,
        "type": "bind",
        "source": SHM_DIRECTORY,
        "options": ["rbind", *_KERNELS_OWN, *options],
    }


def shares_hosts_ipc(spec: dict[str, Any]) -> bool:
    """Tell whether a container has the IPC namespace of the host.

    :param spec: the decoded ``config.json``.
    :raises AttributeError, TypeError: if it is malformed.
    """
    namespaces = (spec.get("linux") or {}).get("namespaces") or []
    return all(namespace.get("type") != "ipc" for namespace in namespaces)


def size_of(spec: dict[str, Any], *, container_id: str) -> int:
    """Read the size of the shared memory that a manager made on the host for a sandbox.

    :param spec: the specification of the sandbox's first container, decoded and maybe malformed.
    :param container_id: its id, which is also the sandbox's.
    :returns: how much it holds at most, in bytes; runc's size if there is none.
    """
    try:
        for entry in spec.get("mounts") or []:
            if is_pods(entry, ids={container_id}, shares_hosts_ipc=shares_hosts_ipc(spec)):
                return _size_of_mount(entry["source"])
    except (AttributeError, KeyError, TypeError, ValueError):  # Create will report it
        pass
    return SHM_BYTES


def _size_of_mount(path: str) -> int:
    try:
        if os.path.ismount(path):  # otherwise it would be the size of the host's disk
            status = os.statvfs(path)
            return status.f_blocks * status.f_frsize or SHM_BYTES
    except OSError:  # the container's creation will report it
        pass
    return SHM_BYTES
