"""Storages: mounts and files that a request needs in the guest before it can continue."""

from __future__ import annotations

import errno
import os
import time

from guest.agent import binds, files, kernel, modules, uevent, watch
from guest.agent.console import log
from guest.agent.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from guest.agent.wire import Message

# Option to (bits to set, bits to clear), as mount(8) names them.
_FLAGS = {
    "async": (0, kernel.MS_SYNCHRONOUS),
    "atime": (0, kernel.MS_NOATIME),
    "bind": (kernel.MS_BIND, 0),
    "defaults": (0, 0),
    "dev": (0, kernel.MS_NODEV),
    "diratime": (0, kernel.MS_NODIRATIME),
    "dirsync": (kernel.MS_DIRSYNC, 0),
    "exec": (0, kernel.MS_NOEXEC),
    "lazytime": (kernel.MS_LAZYTIME, 0),
    "noatime": (kernel.MS_NOATIME, 0),
    "nodev": (kernel.MS_NODEV, 0),
    "nodiratime": (kernel.MS_NODIRATIME, 0),
    "noexec": (kernel.MS_NOEXEC, 0),
    "nosuid": (kernel.MS_NOSUID, 0),
    "rbind": (kernel.MS_BIND | kernel.MS_REC, 0),
    "relatime": (kernel.MS_RELATIME, 0),
    "remount": (kernel.MS_REMOUNT, 0),
    "ro": (kernel.MS_RDONLY, 0),
    "rw": (0, kernel.MS_RDONLY),
    "strictatime": (kernel.MS_STRICTATIME, 0),
    "suid": (0, kernel.MS_NOSUID),
    "sync": (kernel.MS_SYNCHRONOUS, 0),
}
# For programs that read fstab, not for the kernel; see fstab(5) and mount(8).
_NOT_FOR_THE_KERNEL = frozenset(
    {"_netdev", "auto", "group", "noauto", "nofail", "nouser", "owner", "user", "users"}
)
_SHARED = "virtiofs"
_OWNER = "fsgid="
_SETGID = 0o2000
_GROUP_ON_MISMATCH = 1
_CLOSING_TIMEOUT_S, _CLOSING_INTERVAL_S = 3.0, 0.005

DRIVERS = ("virtio-fs", "blk", "mmioblk", "ephemeral", "local", "overlayfs", "bind", "watchable-bind")


def split_options(options: Iterable[str]) -> tuple[int, str]:
    """Split mount options into flags and the filesystem's own options.

    :param options: single options.
    :returns: MS_* bits, and the rest joined by commas.
    """
    flags, data = 0, []
    for option in options:
        if option in _FLAGS:
            added, cleared = _FLAGS[option]
            flags = (flags | added) & ~cleared
        elif option and option not in _NOT_FOR_THE_KERNEL and not option.lower().startswith("x-"):
            data.append(option)
    return flags, ",".join(data)


def add(storage: Message) -> Callable[[], None] | None:
    """Mount or make one storage.

    :param storage: grpc.Storage.
    :returns: the function that unmounts it; None if it belongs to the sandbox and ends with it.
    :raises AgentError: if the driver is unknown, or a disk does not appear.
    :raises OSError: if the kernel refuses.
    """
    undo = _make(storage)
    if storage.fs_group is not None:
        try:
            _give_to_group(storage)
        except OSError:
            if undo is not None:
                undo()
            raise
    return undo


def _make(storage: Message) -> Callable[[], None] | None:
    match storage.driver:
        case "bind" if storage.source.startswith(f"{binds.SHARE}/"):
            return binds.add(storage.source, storage.mount_point, storage.options)
        case "virtio-fs" | "overlayfs":
            _mount(storage, storage.source)
            return lambda: kernel.unmount(storage.mount_point, flags=kernel.MNT_DETACH)
        case "bind":
            # A container may have put a link into the path, and the link may lead anywhere in the machine.
            source = files.open_path(storage.source)
            try:
                _mount(storage, f"/proc/self/fd/{source}")
            finally:
                os.close(source)
            return lambda: kernel.unmount(storage.mount_point, flags=kernel.MNT_DETACH)
        case "blk" | "mmioblk":
            node = uevent.disk(storage.source)
            _mount(storage, node)
            return lambda: _unmount_disk(storage.mount_point, node)
        case "watchable-bind":
            return watch.add(storage.source, storage.mount_point)
        case "ephemeral":
            _mount(storage, storage.source)
            _own(storage.mount_point, storage.options)
        case "local":
            _make_local(storage.mount_point, storage.options)
        case _:
            raise AgentError(
                f"storage: {storage.mount_point}: no driver {storage.driver}; use {', '.join(DRIVERS)}"
            )
    return None


def resize(storage: Message) -> None:
    """Mount an ephemeral storage, or remount it with other options, such as a size; without any, do nothing.

    :param storage: grpc.Storage.
    :raises AgentError: if it has another driver.
    :raises OSError: if the kernel refuses.
    """
    if storage.driver != "ephemeral":
        raise AgentError(f"storage: {storage.mount_point}: {storage.driver} cannot be changed; use ephemeral")
    files.make_directories(storage.mount_point)
    if storage.options:
        _mount(storage, storage.source)


def _mount(storage: Message, source: str) -> None:
    target, options = storage.mount_point, [one for one in storage.options if not one.startswith(_OWNER)]
    if storage.driver == "bind":
        options.append("bind")
    if storage.driver == "bind" and not os.path.isdir(source):
        files.make_directories(os.path.dirname(target))
        if not files.exists(target):
            files.create(target, "")
    else:
        files.make_directories(target)
    flags, data = split_options(options)
    try:
        kernel.mount(source, target, fstype=storage.fstype, flags=flags, data=data)
    except OSError as error:
        if error.errno == errno.EINVAL and storage.fstype == _SHARED:
            # In a machine made from a template, it is plugged a moment before the agent is reached.
            _await_share(source, target, flags=flags, data=data)
        # The filesystem is unknown until its module is loaded.
        elif error.errno == errno.ENODEV and modules.load(storage.fstype):
            kernel.mount(source, target, fstype=storage.fstype, flags=flags, data=data)
        else:
            raise
    if flags & kernel.MS_BIND and flags & ~(kernel.MS_BIND | kernel.MS_REC):
        # A bind mount gets its other flags only by a remount; see mount(2).
        kernel.mount("", target, flags=flags & ~kernel.MS_REC | kernel.MS_REMOUNT)


def _await_share(source: str, target: str, *, flags: int, data: str) -> None:
    """Mount a share as soon as its device appears: before that, the kernel does not know the tag."""

    def look() -> bool | None:
        try:
            kernel.mount(source, target, fstype=_SHARED, flags=flags, data=data)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return None
        return True

    uevent.wait_for(look, what=f"storage: {target}: share {source}")


def _unmount_disk(mount_point: str, node: str) -> None:
    """Unmount a disk, and wait until the kernel has closed it, because it may be unplugged right after."""
    try:
        kernel.sync_filesystem(mount_point)
    except OSError as error:
        # Unwritten data of a removed disk is lost.
        log(f"storage: {mount_point}: {error}")
    try:
        kernel.unmount(mount_point)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        kernel.unmount(mount_point, flags=kernel.MNT_DETACH)
    deadline = time.monotonic() + _CLOSING_TIMEOUT_S
    # The mounts of containers that have just ended disappear a moment later, without an event.
    while _is_in_use(node):
        if time.monotonic() > deadline:
            log(f"storage: {mount_point}: {node} is still in use; unplugging it may lose data")
            return
        time.sleep(_CLOSING_INTERVAL_S)


def _is_in_use(node: str) -> bool:
    """Tell whether a disk is mounted anywhere, see O_EXCL in open(2)."""
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _make_local(path: str, options: list[str]) -> None:
    files.make_directories(path)
    for option in options:
        if option.startswith("mode="):
            os.chmod(path, int(option.removeprefix("mode="), 8))
    _own(path, options)


def _own(path: str, options: list[str]) -> None:
    for option in options:
        if option.startswith(_OWNER):
            os.chown(path, -1, int(option.removeprefix(_OWNER)))
            os.chmod(path, os.stat(path).st_mode & 0o7777 | _SETGID)


def _give_to_group(storage: Message) -> None:
    """Give a volume to a group as Kubernetes' fsGroup does; links are left alone."""
    group, root = storage.fs_group.group_id, storage.mount_point
    if storage.fs_group.group_change_policy == _GROUP_ON_MISMATCH:
        status = os.stat(root)
        if status.st_gid == group and status.st_mode & _SETGID:
            return
    for directory, _names, plain in os.walk(root):
        for path in (directory, *(f"{directory}/{name}" for name in plain)):
            status = os.lstat(path)
            if status.st_mode & 0o170000 == 0o120000:
                continue
            os.chown(path, -1, group)
            more = 0o2070 if path == directory else 0o060 | (status.st_mode >> 3 & 0o010)
            os.chmod(path, status.st_mode & 0o7777 | more)
