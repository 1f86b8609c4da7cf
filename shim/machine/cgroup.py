"""The cgroup of a sandbox on the host: the use of its machine is counted where containerd wants it counted.

Kubernetes reads a pod's use from the pod's cgroup and limits the pod by it. Only controllers that count are
used here; limits are set in the cgroups above.
"""

from __future__ import annotations

import logging
import posixpath
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shim.host.ledger import Ledger

log = logging.getLogger(__name__)

_COUNTING = frozenset({"memory", "cpu", "cpuacct", "pids", "blkio"})
_MOUNTINFO = Path("/proc/self/mountinfo")


def normal_path(wanted: str) -> str:
    """Find a cgroup's path below the roots of the hierarchies.

    :param wanted: ``linux.cgroupsPath``: a path, or ``slice:prefix:name`` as systemd would be asked.
    :returns: the path without a leading slash; empty if it is a root itself.
    """
    parts = wanted.split(":")
    if len(parts) == 3:
        slice_name, prefix, name = parts
        # systemd.slice(5): dashes in the name of a slice are its place in the tree.
        words = slice_name.removesuffix(".slice").split("-")
        slices = [f"{'-'.join(words[:end])}.slice" for end in range(1, len(words) + 1) if words[0]]
        wanted = "/".join([*slices, f"{prefix}-{name}.scope" if prefix else f"{name}.scope"])
    return posixpath.normpath(f"/{wanted}").strip("/")


def counting_roots(mountinfo: str) -> list[Path]:
    """Find the hierarchies that count: those of version 1 with such controllers, or else that of version 2.

    :param mountinfo: as in proc(5).
    """
    first, second = [], []
    for line in mountinfo.splitlines():
        fields = line.split()
        separator = fields.index("-")
        point, kind, options = fields[4], fields[separator + 1], fields[separator + 3]
        if kind == "cgroup" and _COUNTING.intersection(options.split(",")):
            first.append(Path(point))
        elif kind == "cgroup2":
            second.append(Path(point))
    return first or second[:1]


class HostCgroup:
    """The cgroup of one sandbox, in each hierarchy that counts.

    :param directories: existing ones.
    """

    def __init__(self, directories: list[Path]) -> None:
        self._directories = directories

    @classmethod
    def make(cls, wanted: str, *, ledger: Ledger) -> HostCgroup:
        """Make the cgroup; on a host where that is impossible, the sandbox has none.

        :param wanted: ``linux.cgroupsPath``; empty for none.
        :param ledger: where it is written down.
        """
        path = normal_path(wanted)
        made = []
        for root in counting_roots(_MOUNTINFO.read_text(encoding="utf-8")) if path else []:
            directory = root / path
            try:
                directory.parent.mkdir(parents=True, exist_ok=True)
                if not directory.exists():
                    ledger.cgroup(str(directory))
                    directory.mkdir()
            except OSError as error:
                log.warning("cgroup: %s: %s; what the machine uses is not counted there", directory, error)
                continue
            made.append(directory)
        return cls(made)

    def add(self, pid: int) -> None:
        """Count a process and its future children from now on."""
        for directory in self._directories:
            try:
                (directory / "cgroup.procs").write_text(str(pid), encoding="ascii")
            except OSError as error:
                log.warning("cgroup: %s: process %d: %s; it is not counted there", directory, pid, error)
