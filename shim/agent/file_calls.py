"""Calls to the guest's agent about file systems and files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty

from proto.kata import agent_pb2, csi_pb2
from shim.errors import DeadlineExceeded, ShimError, Unavailable

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from shim.agent.connection import AgentConnection

COPIED_BYTES = 1 << 20  # in each message; the protocol's messages are below 4 MiB
VOLUMES_TIMEOUT_S = 2.0  # part of a Delete, too


class FileCalls:
    """Calls about the files of one guest.

    :param connection: to the agent.
    """

    def __init__(self, connection: AgentConnection) -> None:
        self._connection = connection

    async def mount_tmpfs(self, mount_point: str, *, options: list[str]) -> None:
        """Mount a tmpfs that lasts as long as the machine.

        :param options: options of mount(8). A stock agent honours those of a storage only in this call.
        """
        storage = agent_pb2.Storage(
            driver="ephemeral", source="tmpfs", fstype="tmpfs", mount_point=mount_point, options=options
        )
        await self._connection.call(
            "UpdateEphemeralMounts", agent_pb2.UpdateEphemeralMountsRequest(storages=[storage]), Empty
        )

    async def has_file(self, path: str) -> bool:
        """Tell whether there is a file or directory in the guest."""
        request = agent_pb2.VolumeStatsRequest(volume_guest_path=path)
        try:
            await self._connection.call("GetVolumeStats", request, csi_pb2.VolumeStatsResponse)
        except (DeadlineExceeded, Unavailable):
            raise
        except ShimError:  # agents answer with different statuses
            return False
        return True

    async def copy_file(self, target: str, *, status: os.stat_result, data: bytes) -> None:
        """Make a file, a symbolic link or a directory.

        :param target: its path in the guest.
        :param status: its type, mode and owners.
        :param data: the file's content, or the link's target.
        """
        for offset in range(0, max(len(data), 1), COPIED_BYTES):
            request = agent_pb2.CopyFileRequest(
                path=target,
                file_size=len(data),
                file_mode=status.st_mode,
                dir_mode=0o755,
                uid=status.st_uid,
                gid=status.st_gid,
                offset=offset,
                data=data[offset : offset + COPIED_BYTES],
            )
            await self._connection.call("CopyFile", request, Empty)

    async def change_volumes(self, storages: Iterable[agent_pb2.Storage]) -> None:
        """Mount volumes that belong to no container, or unmount those that have no source.

        Only Hako's agent can: a stock agent would treat the request as a change of a tmpfs's size.
        """
        request = agent_pb2.UpdateEphemeralMountsRequest(storages=storages)
        await self._connection.call("UpdateEphemeralMounts", request, Empty, timeout_s=VOLUMES_TIMEOUT_S)

    async def resize_volume(self, mount_point: str, *, size_bytes: int) -> None:
        """Grow the file system mounted at a path of the guest to its disk's new size."""
        request = agent_pb2.ResizeVolumeRequest(volume_guest_path=mount_point, size=size_bytes)
        await self._connection.call("ResizeVolume", request, Empty)
