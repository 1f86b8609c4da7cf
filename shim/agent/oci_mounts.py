"""A container's mounts: the host files that the guest must see, and their paths in the guest."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import Any

from shim.agent import shared_memory
from shim.agent.oci_mount_kinds import OfTheGuest
from shim.errors import InvalidArgument

_BOTH_WAYS = frozenset({"shared", "rshared"})  # mount_namespaces(7): each side sees the other's mounts
_KERNEL_FILE_SYSTEMS = ("/proc", "/sys", "/dev")
# Volumes that the kubelet rewrites while they are in use, and that no container may write. A share carries no
# inotify events for that.
_UPDATED_BY_KUBELET = re.compile(r"/kubernetes\.io~(configmap|secret|projected|downward-api)/[^/]+/?$")


@dataclass(frozen=True, slots=True)
class SharedMount:
    """A bind mount whose source the host must show to the guest.

    :param source: path on the host.
    :param destination: path in the container.
    :param options: as the specification has them.
    :param is_updated: whether the kubelet rewrites it while it is in use: the guest keeps a copy up to date,
        with events for programs that watch it.
    """

    source: str
    destination: str
    options: tuple[str, ...]
    is_updated: bool


def rewrite_mount(entry: dict[str, Any]) -> tuple[dict[str, Any], SharedMount | None]:
    """Replace the source of one mount by its path in the guest.

    :param entry: an element of the specification's ``mounts``.
    :returns: the mount to send; and the source that the host must share for it, if any.
    :raises KeyError: if it has no destination.
    :raises ValueError: if its source or destination is not a possible path.
    :raises InvalidArgument: if the host must see mounts that the container makes below it.
    """
    destination = entry["destination"]
    source = entry.get("source") or ""
    options = entry.get("options") or []
    if isinstance(entry, OfTheGuest) or not shared_memory.is_bind(entry):
        return entry, None
    if _is_of_a_kernel_file_system(source):
        # The host's kernel file systems say nothing about the guest, so the guest's own are bound instead.
        return {**entry, "type": "bind", "source": posixpath.normpath(source)}, None
    for option in options:
        if option in _BOTH_WAYS:
            raise InvalidArgument(
                f"mounts: {destination}: {option} (Bidirectional): a container's mounts stay in its "
                "machine; ask for rslave (HostToContainer)"
            )
    if not source or "\0" in f"{source}{destination}":
        raise ValueError(f"mounts: {destination!r}: no file has the path {source!r}; give another source")
    is_read = not {"ro", "rro"}.isdisjoint(options)
    is_updated = is_read and _UPDATED_BY_KUBELET.search(source) is not None
    return {**entry, "type": "bind"}, SharedMount(source, destination, tuple(options), is_updated)


def _is_of_a_kernel_file_system(path: str) -> bool:
    """Tell whether a path on the host is in /proc, /sys or /dev; /dev/shm counts as an ordinary directory."""
    normal = posixpath.normpath(path)
    if _is_at_or_below(normal, shared_memory.DESTINATION):
        return False
    return any(_is_at_or_below(normal, top) for top in _KERNEL_FILE_SYSTEMS)


def _is_at_or_below(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")
