"""The host's files that the containers of one sandbox share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shim.volumes.followed_volumes import FollowedVolumes
from shim.volumes.memory_volumes import MemoryVolumes
from shim.volumes.shared_entries import SharedEntries

if TYPE_CHECKING:
    from shim.machine.machine import Machine
    from shim.sandbox.work import Work


@dataclass(frozen=True, slots=True)
class SharedVolumes:
    """The volumes of one sandbox.

    :param entries: the host's files that the guest can reach.
    :param followed: the volumes that follow the host's mounts.
    :param memory: volumes in memory, which the guest holds.
    """

    entries: SharedEntries
    followed: FollowedVolumes
    memory: MemoryVolumes

    @classmethod
    def of(cls, machine: Machine, *, work: Work) -> SharedVolumes:
        """Make them for a machine, which need not run yet.

        :param machine: the machine whose share they use.
        :param work: runs the task that follows the host's mounts.
        """
        entries = SharedEntries(machine.share, daemons=machine.share_daemons)
        return cls(entries, FollowedVolumes(entries, work=work), MemoryVolumes(entries.writable))
