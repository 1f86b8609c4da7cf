"""Which storages are mounted, and for how many containers."""

from __future__ import annotations

import _thread

from guest.agent import storage
from guest.agent.console import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from guest.agent.wire import Message


class _Mount:
    """One mount point with its users."""

    __slots__ = ("gate", "made", "undo", "users")

    def __init__(self) -> None:
        # Held while mounting and unmounting, so that other users wait only for that.
        self.gate = _thread.allocate_lock()
        self.made = False
        self.undo: Callable[[], None] | None = None
        self.users = 0


class Mounts:
    """The storages of the sandbox; one that several containers use is mounted once."""

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._mounts: dict[str, _Mount] = {}

    def hold(self, storages: Iterable[Message]) -> list[str]:
        """Mount storages in their order; one that is mounted already is shared.

        :param storages: grpc.Storage messages.
        :returns: the mount points to give back with :meth:`release`.
        :raises AgentError: if a driver is unknown, or a disk does not appear.
        :raises OSError: if a mount fails; those before it are undone.
        """
        held: list[str] = []
        try:
            for one in storages:
                self._hold(one)
                held.append(_key(one))
        except BaseException:
            self.release(held)
            raise
        return held

    def _hold(self, one: Message) -> None:
        with self._lock:
            mount = self._mounts.setdefault(_key(one), _Mount())
            mount.users += 1
        try:
            with mount.gate:
                if not mount.made:
                    mount.undo = storage.add(one)
                    mount.made = True
                    if one.shared or mount.undo is None:
                        # The sandbox is a user too, so a container's end never unmounts it.
                        with self._lock:
                            mount.users += 1
        except BaseException:
            self._leave(_key(one), mount)
            raise

    def release(self, mount_points: list[str]) -> None:
        """Give storages back; the last user unmounts. A failure is only logged: no caller can do more.

        :param mount_points: what :meth:`hold` returned.
        """
        for mount_point in reversed(mount_points):
            with self._lock:
                mount = self._mounts[mount_point]
            with mount.gate:
                if mount.users == 1:
                    self._unmount(mount_point, mount)
                self._leave(mount_point, mount)

    def _leave(self, mount_point: str, mount: _Mount) -> None:
        with self._lock:
            mount.users -= 1
            # A new user waits at the gate now, and will mount it again.
            if not mount.users:
                del self._mounts[mount_point]

    @staticmethod
    def _unmount(mount_point: str, mount: _Mount) -> None:
        mount.made = False
        if mount.undo is None:
            return
        try:
            mount.undo()
        except OSError as error:
            log(f"storage: {mount_point}: {error}")

    def release_all(self) -> None:
        """Unmount everything, the latest first, even if it is in use: the machine is being switched off."""
        with self._lock:
            mounts = list(self._mounts.items())
        for mount_point, mount in reversed(mounts):
            with mount.gate:
                if mount.made:
                    self._unmount(mount_point, mount)


def _key(one: Message) -> str:
    path: str = one.mount_point
    return path.rstrip("/")
