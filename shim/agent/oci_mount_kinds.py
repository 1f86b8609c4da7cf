"""Which side mounts a file system: the guest, or the host on its behalf.

runc passes every type except binds to mount(2). For a virtual machine, the type decides the side. A file
system that exists only in a kernel is mounted in the guest. One on disks or directories of the host is
mounted on the host and shared, because the guest would look for these among its own.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from shim.agent.shared_memory import is_bind
from shim.errors import InvalidArgument
from shim.host.mounts import is_flag

_OF_THE_KERNEL = frozenset(
    {
        "binder",
        "binfmt_misc",
        "bpf",
        "cgroup",
        "cgroup2",
        "configfs",
        "debugfs",
        "devpts",
        "devtmpfs",
        "efivarfs",
        "fusectl",
        "hugetlbfs",
        "mqueue",
        "proc",
        "pstore",
        "ramfs",
        "resctrl",
        "rpc_pipefs",
        "securityfs",
        "selinuxfs",
        "smackfs",
        "sysfs",
        "tmpfs",
        "tracefs",
    }
)
_GIVE_AS_BIND = "mount it on the host and give it as a bind"
_NETWORK = f"it is served over a network, which the guest cannot do for a container; {_GIVE_AS_BIND}"
_SERVED = f"it is served by a process or a device, and the container has neither here; {_GIVE_AS_BIND}"
_REFUSED = {
    **dict.fromkeys(("afs", "ceph", "cifs", "lustre", "nfs", "nfs4", "smb3"), _NETWORK),
    **dict.fromkeys(("9p", "autofs", "fuse", "fuseblk", "virtiofs"), _SERVED),
}
_LOOP = "it is for mount(8); attach the file to a loop device and name that"
# Options that a bind mount may have itself.
_OF_A_BIND = frozenset({"ro", "rw"}) | {
    f"{no}{what}"
    for no in ("", "no")
    for what in ("suid", "dev", "exec", "symfollow", "atime", "diratime", "relatime", "strictatime")
}
_PROPAGATION = frozenset(
    f"{recursive}{kind}" for recursive in ("", "r") for kind in ("private", "shared", "slave", "unbindable")
)
_RECURSIVE = {"rro": "ro", "rnosuid": "nosuid", "rnodev": "nodev", "rnoexec": "noexec"}
# For programs that read fstab, not for the kernel; see fstab(5) and mount(8).
_FOR_PROGRAMS = frozenset(
    {"_netdev", "auto", "noauto", "nofail", "user", "nouser", "users", "owner", "group"}
)


class OfTheGuest(dict[str, Any]):
    """An element of a specification's ``mounts`` whose source is already a path in the guest.

    :param part_of: the mount that the guest makes first, if the source is only a part of that mount.
    """

    def __init__(self, entry: dict[str, Any], *, part_of: str = "") -> None:
        super().__init__(entry)
        self.part_of = part_of


class Kind(enum.Enum):
    """The side that provides a mount."""

    BIND = "of the host's files"
    GUEST = "by the guest"
    HOST = "by the host, and shared"


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A file system that the host mounts for a container.

    :param destination: its path in the container.
    :param fstype: its type.
    :param source: its source: a path, or just a name.
    :param flags: the options that mount(2) has flags for.
    :param data: the file system's own options.
    :param bind_options: the options of the container's bind mount of it.
    """

    destination: str
    fstype: str
    source: str
    flags: tuple[str, ...]
    data: tuple[str, ...]
    bind_options: tuple[str, ...]


def kind_of(entry: dict[str, Any]) -> Kind:
    """Tell which side provides a mount.

    :param entry: an element of the specification's ``mounts``.
    :raises InvalidArgument: if neither side can; the message says why.
    """
    fstype, options = entry.get("type") or "", entry.get("options") or []
    if isinstance(entry, OfTheGuest):
        return Kind.GUEST
    if is_bind(entry):
        return Kind.BIND
    # The file system of a remount is already in the container.
    if fstype in _OF_THE_KERNEL or "remount" in options:
        return Kind.GUEST
    if not fstype:
        raise _refused(entry, "it has no type; name one, or make it a bind")
    why = _REFUSED.get(fstype.partition(".")[0])
    if why:
        raise _refused(entry, f"{fstype}: {why}")
    if "loop" in options:
        raise _refused(entry, f"{fstype}: option loop: {_LOOP}")
    return Kind.HOST


def file_system_of(entry: dict[str, Any]) -> FileSystem:
    """Describe a mount that the host provides.

    :param entry: an element of the specification's ``mounts`` of that kind.
    :raises KeyError: if it has no destination.
    :raises AttributeError, TypeError: if it is malformed.
    """
    source = entry.get("source") or ""
    if not isinstance(source, str):
        raise TypeError(f"mounts: {entry['destination']!r}: source {source!r} is not a string")
    options = [
        _RECURSIVE.get(option, option)
        for option in entry.get("options") or []
        if option and option not in _FOR_PROGRAMS and not option.lower().startswith("x-")
    ]
    flags = tuple(option for option in options if is_flag(option))
    propagation = tuple(option for option in options if option in _PROPAGATION)
    return FileSystem(
        destination=entry["destination"],
        fstype=entry["type"],
        source=source,
        flags=flags,
        data=tuple(option for option in options if option not in {*flags, *propagation}),
        bind_options=("rbind", *(flag for flag in flags if flag in _OF_A_BIND), *propagation),
    )


def split_layers(value: str) -> list[tuple[str, str]]:
    """Split overlayfs' option ``lowerdir`` at its colons.

    :param value: the value, in which a backslash makes the next character an ordinary one.
    :returns: for each layer, the separator before it (two colons announce a data-only layer) and its path.
    """
    layers: list[tuple[str, str]] = []
    separator, path = "", ""
    characters = iter(value)
    for character in characters:
        if character == "\\":
            path += next(characters, "")
        elif character != ":":
            path += character
        elif path:
            layers.append((separator, path))
            separator, path = ":", ""
        else:
            separator += ":"
    layers.append((separator, path))
    return layers


def unescaped(value: str) -> str:
    """Remove the backslashes that escape characters of an option."""
    characters = iter(value)
    return "".join(next(characters, "") if one == "\\" else one for one in characters)


def describe(entry: FileSystem) -> str:
    """Name a mount in an error's message."""
    return f"mounts: {entry.destination!r}: {entry.fstype} of {entry.source!r}"


def _refused(entry: dict[str, Any], why: str) -> InvalidArgument:
    return InvalidArgument(f"mounts: {entry.get('destination')!r}: {why}")
