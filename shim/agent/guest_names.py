"""The names that a container has in the guest, all made from its id.

A guest has its own names beside those of its containers: Kata's agent keeps ``sandbox`` and ``shared`` in
the directory with one subdirectory for each container, and ``watchable`` in the share. It also refuses an id
of a single character. containerd allows all of these as ids. So every container gets a longer name in the
guest, with a suffix that no name of the guest's own has.
"""

from __future__ import annotations

_LABEL_BYTES = 64  # well below the 255 of a file name
_MARK = "-"  # containerd's ids cannot end with it, but the agent's can


def agent_id(container_id: str) -> str:
    """Return a container's name at the agent; different ids have different names.

    :param container_id: containerd's id.
    :returns: a name of at least two characters, all of which Kata's agent allows.
    """
    return f"{container_id}{_MARK}"


def container_id(agent_id: str) -> str:
    """Return the id of a container that the agent names.

    :param agent_id: what :func:`agent_id` returned.
    """
    return agent_id.removesuffix(_MARK)


def rootfs_of(agent_id: str) -> str:
    """Return the directory in the guest where a container's root file system is mounted from a disk."""
    return f"/run/kata-containers/{agent_id}/rootfs"


def volume_in_share(number: int, label: str) -> str:
    """Name a volume in the share; the name differs from those of containers and of the guest's own files.

    :param number: the volume's unique number.
    :param label: describes the entry to a reader of the share; it may be cut short.
    """
    return f"+{number}-{label.encode()[:_LABEL_BYTES].decode(errors='ignore')}"  # no id has a plus sign
