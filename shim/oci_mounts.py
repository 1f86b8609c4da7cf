"""A container's mounts: which files of the host must be shown to the guest, and where it finds them."""

from __future__ import annotations

import hashlib
import posixpath
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shim import shared_memory
from shim.agent import SHARE_DIRECTORY, WATCHABLE_DIRECTORY
from shim.guest_names import volume_in_share

if TYPE_CHECKING:
    from collections.abc import Callable

_FOLLOWING = frozenset({"slave", "rslave", "shared", "rshared"})  # a bind is private unless it says otherwise
_KERNEL_FILE_SYSTEMS = ("/proc", "/sys", "/dev")
_SHOWN_NAME_BYTES = 64  # with the longest id and the digest, well below the 255 of a file name
# The volumes that the kubelet rewrites while they are in use, and never lets a container write; a share
# carries no inotify event for that.
_UPDATED_BY_KUBELET = re.compile(r"/kubernetes\.io~(configmap|secret|projected|downward-api)/[^/]+/?$")


@dataclass(frozen=True, slots=True)
class SharedMount:
    """A bind mount whose source the host must show to the guest.

    :param source: path on the host.
    :param name: name in the share; the guest sees it as ``SHARE_DIRECTORY/name``.
    :param read_only_below: what the host has mounted below it is read-only, too.
    :param follows: what the host mounts below it later is to be seen, too.
    :param copied_to: where the guest keeps a copy up to date, with events for who watches it; or empty.
    """

    source: str
    name: str
    read_only: bool
    read_only_below: bool
    recursive: bool
    follows: bool
    copied_to: str


def rewrite_mount(
    entry: dict[str, Any], *, container_id: str, has_mounts_below: Callable[[str], bool]
) -> tuple[dict[str, Any], SharedMount | None]:
    """Give one mount the source that it has in the guest.

    The option ``ro`` is about the mount itself, ``rro`` about those below it, too, says the runtime
    specification. A guest mounts by itself what is mounted below, as writable as the mount that it comes
    through. So where a volume is to be read-only and what is below it not, the host alone sees to that.

    :param entry: an element of the specification's ``mounts``.
    :param container_id: whose it is, for the name in the share.
    :param has_mounts_below: whether the host has mounted something below a path.
    :returns: the mount to send, and what the host must share for it.
    :raises KeyError: if it has no destination.
    :raises ValueError: if no file can have its source or destination.
    """
    destination = entry["destination"]
    source = entry.get("source") or ""
    options = entry.get("options") or []
    if not shared_memory.is_bind(entry):
        return entry, None
    if _is_of_a_kernel_file_system(source):
        # The host's kernel file systems say nothing about the guest: the guest's own are bound instead.
        return {**entry, "type": "bind", "source": posixpath.normpath(source)}, None
    if not source or "\0" in f"{source}{destination}":
        raise ValueError(f"mounts: {destination!r}: no file has the path {source!r}; give another source")
    # The same destination may be mounted on twice; the digest keeps names apart and short.
    digest = hashlib.sha256(f"{destination}\0{source}".encode()).hexdigest()[:16]
    last = posixpath.basename(destination.rstrip("/")).encode()[:_SHOWN_NAME_BYTES].decode(errors="ignore")
    name = volume_in_share(container_id, f"{digest}-{last or 'root'}")
    read_only = "ro" in options or "rro" in options
    is_updated = read_only and _UPDATED_BY_KUBELET.search(source)
    copied_to = f"{WATCHABLE_DIRECTORY}/{name}" if is_updated else ""
    recursive = "rbind" in options
    writable_below = (
        read_only and recursive and not copied_to and "rro" not in options and has_mounts_below(source)
    )
    share = SharedMount(
        source=source,
        name=name,
        read_only=read_only,
        read_only_below=read_only and not writable_below,
        recursive=recursive,
        follows=not _FOLLOWING.isdisjoint(options),
        copied_to=copied_to,
    )
    shown = {**entry, "type": "bind", "source": share.copied_to or f"{SHARE_DIRECTORY}/{name}"}
    if writable_below:
        shown["options"] = [option for option in options if option != "ro"]
    return shown, share


def _is_of_a_kernel_file_system(path: str) -> bool:
    """Tell whether a path on the host belongs to /proc, /sys or /dev; /dev/shm is an ordinary directory."""
    normal = posixpath.normpath(path)
    if _is_at_or_below(normal, shared_memory.DESTINATION):
        return False
    return any(_is_at_or_below(normal, top) for top in _KERNEL_FILE_SYSTEMS)


def _is_at_or_below(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")
