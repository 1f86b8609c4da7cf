"""The cgroup of a sandbox on the host: its machine is counted and limited there, as containerd asks.

Kubernetes reads a pod's usage from the pod's cgroup, and limits the pod by it. The limits here are wider:
they prevent a machine whose processes were taken over from using up the host, even without other limits.
"""

from __future__ import annotations

import contextlib
import logging
import posixpath
from pathlib import Path
from typing import TYPE_CHECKING

from shim.machine import device_access

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shim.host.ledger import Ledger

log = logging.getLogger(__name__)

_USED = frozenset({"memory", "cpu", "cpuacct", "pids", "blkio", "devices"})
_BOUNDING = ("memory", "pids")
_MOUNTINFO = Path("/proc/self/mountinfo")

OVERHEAD_BYTES = 1 << 30
"""The memory that the machine's processes may use beside the guest's. Idle, they use a tenth of it; the rest
is for translated code, for files that the share's server has open, and for the host's cache of files."""

_PART_FOR_OPEN_FILES = 4
"""A quarter of the guest's memory in addition, for files that are open in the guest. Its kernel opens at most
one for each 10 KiB of its memory, and the host's kernel needs 2.4 KiB for each (ext4, Linux 6.18)."""

MOST_TASKS = 2048
"""Threads of all its processes: one for each vCPU, up to 64 for each kind of I/O, and some more."""

_MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes")
_SWAP_LIMITS = {"memory.swap.max": 1, "memory.memsw.limit_in_bytes": 2}
"""Each limit as a multiple of the limit of memory: version 1 limits memory and swap together."""
_TASK_LIMITS = ("pids.max",)


def normal_path(wanted: str) -> str:
    """Find a cgroup's path below the roots of the hierarchies.

    :param wanted: ``linux.cgroupsPath``: a path, or ``slice:prefix:name`` for systemd.
    :returns: the path without a leading slash; empty for the root itself.
    """
    parts = wanted.split(":")
    if len(parts) == 3:
        slice_name, prefix, name = parts
        # systemd.slice(5): dashes in the name of a slice separate levels of the tree.
        words = slice_name.removesuffix(".slice").split("-")
        slices = [f"{'-'.join(words[:end])}.slice" for end in range(1, len(words) + 1) if words[0]]
        wanted = "/".join([*slices, f"{prefix}-{name}.scope" if prefix else f"{name}.scope"])
    return posixpath.normpath(f"/{wanted}").strip("/")


def counting_roots(mountinfo: str) -> list[Path]:
    """Find the hierarchies that count or limit: those of version 1 with such controllers, else version 2.

    :param mountinfo: as in proc(5).
    """
    first, second = _hierarchies(mountinfo)
    return [*first] or second[:1]


def missing_controllers(mountinfo: str) -> list[str]:
    """List the controllers for limiting a machine that this host lacks.

    :param mountinfo: as in proc(5).
    :raises OSError: if the hierarchy of version 2 cannot be read.
    """
    first, second = _hierarchies(mountinfo)
    found = set().union(*first.values())
    if not first and second:
        found = set((second[0] / "cgroup.controllers").read_text(encoding="ascii").split())
    return [name for name in _BOUNDING if name not in found]


def _hierarchies(mountinfo: str) -> tuple[dict[Path, set[str]], list[Path]]:
    """Find the hierarchies of version 1 that are used here, with their controllers, and of version 2."""
    first, second = {}, []
    for line in mountinfo.splitlines():
        fields = line.split()
        separator = fields.index("-")
        point, kind, options = fields[4], fields[separator + 1], fields[separator + 3]
        controllers = set(options.split(","))
        if kind == "cgroup" and controllers & _USED:
            first[Path(point)] = controllers
        elif kind == "cgroup2":
            second.append(Path(point))
    return first, second


def memory_bound(machine_bytes: int) -> int:
    """Return how much memory the processes of a machine may use, in bytes.

    :param machine_bytes: the guest's memory.
    """
    return machine_bytes + machine_bytes // _PART_FOR_OPEN_FILES + OVERHEAD_BYTES


class HostCgroup:
    """The cgroup of one sandbox, in each hierarchy that counts or limits.

    :param directories: its directories, which were made for the sandbox.
    """

    def __init__(self, directories: list[Path]) -> None:
        self._directories = directories
        self._device_access = [device_access.DeviceAccess(directory) for directory in directories]
        self._limits_devices = False
        self._memory_bound = 0
        self.problem = ""
        """Why its processes are not limited; empty if they are."""

    @classmethod
    def make(cls, wanted: str, *, name: str, ledger: Ledger) -> HostCgroup:
        """Make the cgroup; if the host cannot, the sandbox has none.

        A cgroup that exists may have other processes and keeps its limits. The sandbox gets one below it,
        so both limits apply.

        :param wanted: ``linux.cgroupsPath``.
        :param name: its name below the root if the wanted path is empty, or below a cgroup that exists.
        :param ledger: where it is recorded.
        """
        path = normal_path(wanted)
        made = []
        for root in counting_roots(_MOUNTINFO.read_text(encoding="utf-8")):
            below = posixpath.join(path, name) if (root / path).exists() else path
            directory = root / below
            try:
                directory.parent.mkdir(parents=True, exist_ok=True)
                _delegate(root, below)
                ledger.cgroup(str(directory))
                directory.mkdir(exist_ok=True)  # one of this name was left behind
            except OSError as error:
                log.warning("cgroup: %s: %s; what the machine uses is not counted there", directory, error)
                continue
            made.append(directory)
        cgroup = cls(made)
        if not made:
            cgroup._warn(f"{path or name}: it could not be made")
        cgroup._limit(_TASK_LIMITS, MOST_TASKS)
        return cgroup

    def add(self, pid: int) -> None:
        """Count and limit a process and its future children from now on."""
        for directory in self._directories:
            try:
                (directory / "cgroup.procs").write_text(str(pid), encoding="ascii")
            except ProcessLookupError:  # it has ended
                continue
            except OSError as error:
                self._warn(f"{directory}: process {pid}: {error.strerror}")

    def limit_memory(self, machine_bytes: int) -> None:
        """Limit the memory of its processes, and their swap.

        :param machine_bytes: the guest's memory, now or soon.
        """
        before, self._memory_bound = self._memory_bound, memory_bound(machine_bytes)
        # Version 1 refuses a limit of memory that exceeds the one of memory and swap.
        if 0 < before < self._memory_bound:
            self._limit_swap()
        self._limit(_MEMORY_LIMITS, self._memory_bound)
        self._limit_swap()

    def _limit_swap(self) -> None:
        for name, times in _SWAP_LIMITS.items():  # hosts without swap may lack the file
            self._write(self._files((name,)), times * self._memory_bound)

    def limit_devices(self, allowed: Iterable[device_access.Number]) -> None:
        """Let its processes open only some devices.

        :param allowed: the character devices.
        """
        allowed = tuple(allowed)
        self._limits_devices = True
        try:
            can = [access.allow(allowed) for access in self._device_access]
        except OSError as error:
            self._warn(f"{error.filename or self._directories[0]}: devices: {error.strerror}")
        else:
            if self._directories and not any(can):
                self._warn(f"{self._directories[0]}: the host has no devices controller there")

    def allow_devices(self, more: Iterable[device_access.Number]) -> None:
        """Let its processes open more devices, if these are limited.

        :param more: the character devices.
        """
        if self._limits_devices:
            self.limit_devices(more)

    def _limit(self, names: tuple[str, ...], value: int) -> None:
        files = self._files(names)
        self._write(files, value)
        if self._directories and not files:
            controller = names[0].partition(".")[0]
            self._warn(
                f"{self._directories[0]}: no {controller} controller there: the host lacks it, or a cgroup "
                "above has processes"
            )

    def _files(self, names: tuple[str, ...]) -> list[Path]:
        files = [directory / name for directory in self._directories for name in names]
        return [file for file in files if file.exists()]

    def _write(self, files: list[Path], value: int) -> None:
        for file in files:
            try:
                file.write_text(f"{value}", encoding="ascii")
            except OSError as error:
                self._warn(f"{file}: {error.strerror}")

    def _warn(self, problem: str) -> None:
        if not self.problem:  # one warning is enough
            log.warning("cgroup: %s; what the machine uses is not bounded there", problem)
            self.problem = problem


def _delegate(root: Path, path: str) -> None:
    """Enable version 2's controllers for a cgroup that is about to be made, in every cgroup above it."""
    parent = root
    for name in (".", *path.split("/")[:-1]):
        parent /= name
        for controller in ("memory", "pids"):
            # Not in version 1, nor if the parent has processes; missing controllers are reported later.
            with contextlib.suppress(OSError):
                (parent / "cgroup.subtree_control").write_text(f"+{controller}", encoding="ascii")
