"""The rights on the host of each process that a guest talks to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor.interface import Accelerator

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hypervisor.interface import Identity, VmSpec

SHARE = Path("/share")
"""Where the virtio-fs daemon finds the directory that it serves."""

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store")
_LINKS_OF_LIBRARIES = ("/etc/ld.so.cache", "/etc/alternatives")
_PROGRAM_DIRECTORIES = {"bin", "sbin", "libexec"}
_BESIDE_PROGRAMS = ("lib", "lib32", "lib64", "libexec", "share")
_KVM = Path("/dev/kvm")
_NODES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

# Numbers of linux/capability.h.
_CHOWN, _DAC_OVERRIDE, _FOWNER, _FSETID, _SETGID, _SETUID, _SETPCAP = 0, 1, 3, 4, 6, 7, 8
_SYS_CHROOT, _MKNOD, _SETFCAP = 18, 27, 31

FILE_CAPABILITIES = {
    _CHOWN: "a guest's chown(2) of a file",
    _DAC_OVERRIDE: "the guest's kernel has checked the permission already, knowing all of a process's groups",
    _FOWNER: "chmod(2) and times of files that belong to users of the guest",
    _FSETID: "set-group-ID bits of such files stay, where the guest's kernel says that they do",
    _SETGID: "a file that is made gets the group of the guest's process that makes it",
    _SETUID: "and that process's user",
    _MKNOD: "device nodes in a container's root file system, and whiteouts of overlays",
    _SETFCAP: "file capabilities of programs that a container installs",
}
"""The capabilities with which the virtio-fs daemon serves files of all users of the guest, and their uses."""

_ITS_OWN_TO_DROP = frozenset({_SETPCAP, _SYS_CHROOT})
"""With these, the daemon changes its root to its share and empties its bounding set; then it loses them."""

_OCTAL = re.compile(r"\\([0-7]{3})")
"""A blank or the like in the name of a mount point."""

_FILES = 65_536
_FILES_OF_SHARE = 1_048_576


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """What one process may have and do.

    :param identity: its user.
    :param capabilities: what it is started with, by number; its bounding set is the same.
    :param keeps_identity: whether it never acts as another user.
    :param network: the network namespace that it enters, or ``None`` for a new one that is empty.
    :param files: what it sees of the host's files and devices, read-only and under the same paths.
    :param nodes: device nodes of the host that it gets as its own: some hosts let only root open theirs.
    :param share: a directory that it sees as :data:`SHARE`, with what is mounted there later.
    :param open_files: how many files it may have open, if the host lets it.
    :param has_devices: whether it may be given devices of the host: it sees what the host's kernel tells of
        them, can be shown their nodes later, and may pin memory for them.
    :param has_huge_pages: whether it may use those that the host has set aside.
    """

    identity: Identity
    capabilities: frozenset[int] = frozenset()
    keeps_identity: bool = True
    network: Path | None = None
    files: tuple[Path, ...] = ()
    nodes: tuple[Path, ...] = ()
    share: Path | None = None
    open_files: int
    has_devices: bool = False
    has_huge_pages: bool = False


def of_program(program: Path, identity: Identity) -> Confinement:
    """Confine a program that needs nothing but itself.

    :param program: its path.
    :param identity: its user.
    """
    return Confinement(identity=identity, files=_program(program), open_files=_FILES)


def of_qemu(spec: VmSpec, *, boots: bool) -> Confinement | None:
    """Confine QEMU.

    :param spec: its machine.
    :param boots: whether it loads a kernel.
    :returns: ``None`` for a machine that is not confined.
    """
    if spec.jail is None:
        return None
    files = [*_program(spec.qemu)]
    if boots:
        files += [file for file in (spec.kernel, spec.initrd) if file.exists() and not _is_below(file, files)]
    return Confinement(
        identity=spec.jail,
        nodes=(_KVM,) if spec.accelerator is Accelerator.KVM else (),
        network=spec.network_namespace,
        files=tuple(files),
        open_files=_FILES,
        has_devices=spec.root_ports > 0,
        has_huge_pages=spec.huge_pages,
    )


def of_vsock_daemon(spec: VmSpec, daemon: Path) -> Confinement | None:
    """Confine the daemon of the agent's channel.

    :param spec: the machine.
    :param daemon: the program.
    :returns: ``None`` for a machine that is not confined.
    """
    if spec.jail is None:
        return None
    return of_program(daemon, spec.jail)


def of_share_daemon(spec: VmSpec, *, drops_by_itself: bool) -> Confinement | None:
    """Confine the virtio-fs daemon.

    :param spec: the machine.
    :param drops_by_itself: whether the daemon goes into its share and empties its bounding set by itself.
    :returns: ``None`` for a machine that is not confined.
    """
    if spec.jail is None:
        return None
    return Confinement(
        identity=spec.jail,
        capabilities=frozenset(FILE_CAPABILITIES) | (_ITS_OWN_TO_DROP if drops_by_itself else frozenset()),
        keeps_identity=False,
        files=_program(spec.virtiofsd),
        share=spec.share_source,
        open_files=_FILES_OF_SHARE,
    )


def _program(program: Path) -> tuple[Path, ...]:
    """List what a program needs to run: itself, its libraries and its data, and the least of devices."""
    paths = map(Path, (*_SYSTEM, *_LINKS_OF_LIBRARIES, *_NODES))
    found = [path for path in paths if path.is_symlink() or path.exists()]
    own = [program, program.resolve()]
    if own[1].parent.name in _PROGRAM_DIRECTORIES:
        # A program below its own prefix, such as /opt/name, has its libraries and its data there. The prefix
        # may be a home directory or the root, so the rest of it is not shown.
        own += [own[1].parent.parent / name for name in _BESIDE_PROGRAMS]
    own = [one for one in dict.fromkeys(own) if one.exists()]
    # A directory is shown without what is mounted below it, such as /usr/local on a disk of its own.
    mounted = [point for point in mounted_below(found) if any(one.is_relative_to(point) for one in own)]
    return (*found, *mounted, *(one for one in own if not _is_below(one, found)))


def mounted_below(directories: Iterable[Path]) -> list[Path]:
    """List the mount points below some directories, upper ones first; see proc(5)."""
    prefixes = tuple(f"{directory}/" for directory in directories)
    with Path("/proc/self/mountinfo").open(encoding="utf-8", errors="surrogateescape") as file:
        names = {line.split(" ", 5)[4] for line in file}
    found = (name for name in names if name.startswith(prefixes))  # few of a node's hundreds
    return sorted(Path(_OCTAL.sub(lambda digits: chr(int(digits[1], 8)), name)) for name in found)


def _is_below(path: Path, directories: Iterable[Path]) -> bool:
    return any(path.is_relative_to(directory) for directory in directories)
