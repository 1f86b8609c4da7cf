"""Keeps ConfigMaps, Secrets and projected volumes up to date, with events for programs that watch them.

The kubelet publishes a new version of such a volume by pointing its ``..data`` link to a new directory. A
shared filesystem carries that change into the machine, but no inotify event for it. So the agent copies the
volume to a file system of the guest and looks at the link in the share at intervals. It copies each new
version and publishes it as the kubelet does: containers see all files change at once, and get the events that
they would get on the host.
"""

from __future__ import annotations

import _thread
import errno
import os
import stat
import time

from guest.agent import files, kernel
from guest.agent.console import log
from guest.agent.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_LINK = "..data"
_NEW_LINK = "..data_tmp"
_HIDDEN = ".."
_INTERVAL_S = 2.0
# How long the guest may trust a name that it has looked up in the share (virtiofsd, cache=auto).
_CACHE_S = 1.1
_ATTEMPTS = 5
_CHUNK_BYTES = 1 << 20

_lock = _thread.allocate_lock()
_volumes: set[Volume] = set()
_following = False


def add(source: str, target: str) -> Callable[[], None]:
    """Mount a copy of a volume and keep it up to date; bind other volumes as they are.

    A volume is copied if the kubelet updates it.

    :param source: the volume in the share.
    :param target: where to mount the copy.
    :returns: the function that ends it and unmounts the copy.
    :raises AgentError: if the volume changes faster than it can be copied.
    :raises OSError: if it cannot be read, or the copy cannot be mounted.
    """
    if not os.path.islink(f"{source}/{_LINK}"):
        _bind(source, target)
        return lambda: kernel.unmount(target, flags=kernel.MNT_DETACH)
    files.make_directories(target)
    status = os.stat(source)
    kernel.mount("tmpfs", target, fstype="tmpfs", flags=kernel.MS_NOSUID | kernel.MS_NODEV, data="mode=0755")
    try:
        os.chown(target, status.st_uid, status.st_gid)
        os.chmod(target, status.st_mode & 0o7777)
        volume = Volume(source, target)
        volume.refresh()
    except BaseException:
        kernel.unmount(target, flags=kernel.MNT_DETACH)
        raise
    with _lock:
        _volumes.add(volume)
        _start_following()

    def end() -> None:
        with _lock:
            _volumes.discard(volume)
        with volume.lock:
            kernel.unmount(target, flags=kernel.MNT_DETACH)

    return end


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        files.make_directories(target)
    else:
        files.make_directories(os.path.dirname(target))
        files.create(target, "")
    kernel.mount(source, target, flags=kernel.MS_BIND | kernel.MS_REC)


def _start_following() -> None:
    global _following  # noqa: PLW0603  one thread for all volumes
    if not _following:
        _following = True
        _thread.start_new_thread(_follow, ())


def _follow() -> None:
    """Refresh every volume at intervals, until none is left."""
    global _following  # noqa: PLW0603  as above
    while True:
        time.sleep(_INTERVAL_S)
        with _lock:
            volumes = list(_volumes)
            if not volumes:
                _following = False
                return
        for volume in volumes:
            with volume.lock:
                try:
                    if volume in _volumes:
                        volume.refresh()
                except (OSError, AgentError) as error:
                    # The next round may succeed; until then, the container keeps the old version.
                    log(f"volume: {volume.target}: {error}")


class Volume:
    """A volume and its copy.

    :param source: the directory that the kubelet writes.
    :param target: the directory that containers see.
    """

    def __init__(self, source: str, target: str) -> None:
        self.source = source
        self.target = target
        self.lock = _thread.allocate_lock()
        self._published = ""

    def refresh(self) -> None:
        """Publish the volume's current version, unless it is already published.

        :raises AgentError: if it changes faster than it can be copied.
        :raises OSError: if it cannot be copied.
        """
        for _attempt in range(_ATTEMPTS):
            version = os.readlink(f"{self.source}/{_LINK}")
            if version == self._published:
                return
            if self._copy(version):
                self._publish(version)
                return
        raise AgentError(f"volume: {self.source}: it changes without end; look at the kubelet")

    def _copy(self, version: str) -> bool:
        """Copy a version; tell whether the copy is whole."""
        if not version.startswith(_HIDDEN) or "/" in version or version in {_HIDDEN, _LINK, _NEW_LINK}:
            raise AgentError(f"volume: {self.source}: {_LINK} leads to {version!r}; let the kubelet make it")
        copy = f"{self.target}/{version}"
        files.remove_tree(copy)
        try:
            _copy_tree(f"{self.source}/{version}", copy)
            # A listing is never out of date: if it shows no other version, this one was not being removed.
            hidden = {name for name in os.listdir(self.source) if name.startswith(_HIDDEN)}
            if hidden != {_LINK, version}:
                time.sleep(_CACHE_S)
            if os.readlink(f"{self.source}/{_LINK}") == version:
                return True
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ESTALE}:
                raise
            time.sleep(_CACHE_S)
        files.remove_tree(copy)
        return False

    def _publish(self, version: str) -> None:
        """Point the link to a version that has been copied, then clean up, in the kubelet's order."""
        os.symlink(version, f"{self.target}/{_NEW_LINK}")
        os.rename(f"{self.target}/{_NEW_LINK}", f"{self.target}/{_LINK}")
        self._published = version
        # Taken from the copy: in the share, the links to new files come only after the version.
        wanted = set(os.listdir(f"{self.target}/{version}"))
        present = set(os.listdir(self.target))
        for name in sorted(wanted - present):
            os.symlink(f"{_LINK}/{name}", f"{self.target}/{name}")
        # The old version is removed last, when no name leads to it.
        for name in sorted(present - wanted - {_LINK, version}, key=lambda name: name.startswith(_HIDDEN)):
            if name.startswith(_HIDDEN):
                files.remove_tree(f"{self.target}/{name}")
            else:
                os.unlink(f"{self.target}/{name}")


def _copy_tree(source: str, target: str) -> None:
    """Copy a directory with modes, owners and times."""
    os.mkdir(target, 0o700)
    for name in os.listdir(source):
        old, new = f"{source}/{name}", f"{target}/{name}"
        mode = os.lstat(old).st_mode
        if stat.S_ISLNK(mode):
            os.symlink(os.readlink(old), new)
        elif stat.S_ISDIR(mode):
            _copy_tree(old, new)
        elif stat.S_ISREG(mode):
            _copy_file(old, new)
    status = os.stat(source)
    os.chown(target, status.st_uid, status.st_gid)
    os.chmod(target, status.st_mode & 0o7777)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _copy_file(source: str, target: str) -> None:
    origin = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            status = os.fstat(origin)
            while os.sendfile(copy, origin, None, _CHUNK_BYTES):
                pass
            os.fchown(copy, status.st_uid, status.st_gid)
            os.fchmod(copy, status.st_mode & 0o7777)
            os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
        finally:
            os.close(copy)
    finally:
        os.close(origin)
