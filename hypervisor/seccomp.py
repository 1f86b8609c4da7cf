"""The filter that refuses system calls of a confined process, as a program for the kernel (seccomp(2)).

It refuses calls that make or enter namespaces, mount, make or reach other processes, load kernel code or
change the user. A call that is newer than this list fails as "not implemented".
"""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass

_NEWEST = 462
"""The last system call that was considered, of Linux 6.10."""

# fmt: off
_REFUSED = {
    # Mounts, and the files of others.
    "mount": 165, "umount2": 166, "pivot_root": 155, "move_mount": 429, "open_tree": 428, "fsopen": 430,
    "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442, "open_by_handle_at": 304,
    "quotactl": 179, "quotactl_fd": 443, "swapon": 167, "swapoff": 168, "fanotify_init": 300,
    "statmount": 457, "listmount": 458,
    # Namespaces; clone(2) and unshare(2) are handled below.
    "setns": 308,
    # Other processes; clone(2) is handled below.
    "fork": 57, "vfork": 58, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
    "pidfd_getfd": 438, "pidfd_open": 434, "pidfd_send_signal": 424, "process_madvise": 440,
    "process_mrelease": 448, "move_pages": 279, "migrate_pages": 256,
    # Parts of the kernel that are large, young, or run code that they are given.
    "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426,
    "io_uring_register": 427, "keyctl": 250, "add_key": 248, "request_key": 249, "memfd_secret": 447,
    "init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246, "kexec_file_load": 320,
    "lookup_dcookie": 212, "modify_ldt": 154, "iopl": 172, "ioperm": 173,
    # The machine as a whole.
    "reboot": 169, "sethostname": 170, "setdomainname": 171, "settimeofday": 164, "clock_settime": 227,
    "clock_adjtime": 305, "adjtimex": 159, "acct": 163, "syslog": 103, "vhangup": 153, "personality": 135,
    # What all processes of a host share, or all of one user, who may be root: requests, disks, watches.
    "io_setup": 206, "sync": 162, "inotify_init": 253, "inotify_init1": 294,
    # Obsolete.
    "uselib": 134, "ustat": 136, "sysfs": 139, "_sysctl": 156, "create_module": 174, "get_kernel_syms": 177,
    "query_module": 178, "nfsservctl": 180,
}
_IDENTITY = {
    "setuid": 105, "setgid": 106, "setreuid": 113, "setregid": 114, "setresuid": 117, "setresgid": 119,
    "setgroups": 116, "setfsuid": 122, "setfsgid": 123, "capset": 126, "chroot": 161, "mknod": 133,
    "mknodat": 259,
}
# fmt: on
_CLONE, _CLONE3, _UNSHARE, _SOCKET, _SOCKETPAIR, _PRCTL = 56, 435, 272, 41, 53, 157

_OF_OTHERS = {"socket": _SOCKET, "socketpair": _SOCKETPAIR, "connect": 42}
"""Refused to a process that may act as other users: as root, it could speak to any socket in the share."""

_PR_SET_PDEATHSIG = 1

_WITH_HUGE_PAGES = {9: (3, 0x4_0000), 319: (1, 0x4)}
"""mmap(2) and memfd_create(2): the argument and its flag for the huge pages that a host has set aside. No
cgroup for memory counts them."""

_NEW_NAMESPACES = 0x7E02_0080
"""``CLONE_NEW*`` of clone(2): mount, cgroup, UTS, IPC, user, pid, network and time namespaces."""

_CLONE_FS, _CLONE_FILES, _CLONE_THREAD = 0x200, 0x400, 0x10000
_AF_UNIX = 1

_ARCHITECTURE = 0xC000003E  # AUDIT_ARCH_X86_64 of linux/audit.h

# Of linux/filter.h, linux/bpf_common.h and linux/seccomp.h.
_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NUMBER, _ARCH, _ARGUMENTS, _ARGUMENT_SIZE = 0, 4, 16, 8
_KILL_PROCESS, _ERRNO, _ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000


@dataclass(frozen=True, slots=True)
class Filter:
    """A program for the kernel.

    :param code: its instructions, ``struct sock_filter`` each.
    """

    code: bytes

    @property
    def length(self) -> int:
        """The number of its instructions."""
        return len(self.code) // _INSTRUCTION.size


_INSTRUCTION = struct.Struct("=HBBI")


def refused_calls(*, changes_identity: bool) -> dict[str, int]:
    """List the system calls that a confined process is always refused, with their numbers by name.

    :param changes_identity: whether it may act as other users, and make device nodes, but no sockets.
    """
    return {**_REFUSED, **(_OF_OTHERS if changes_identity else _IDENTITY)}


def confining(*, changes_identity: bool, huge_pages: bool = False) -> Filter:
    """Build the filter for a process that a guest talks to.

    :param changes_identity: whether it may act as other users, and make device nodes.
    :param huge_pages: whether it may use those that the host has set aside.
    :raises NotImplementedError: on another architecture than x86-64.
    """
    if platform.machine() != "x86_64":
        raise NotImplementedError(f"no seccomp filter for {platform.machine()}")
    refuse = _ERRNO | errno.EPERM
    absent = _ERRNO | errno.ENOSYS
    program = [
        # The numbers of the x32 ABI are greater than the newest, too.
        *_instructions((_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, _ARCHITECTURE), (_RETURN, 0, 0, _KILL_PROCESS)),
        *_instructions((_LOAD, 0, 0, _NUMBER), (_GREATER, 0, 1, _NEWEST), (_RETURN, 0, 0, absent)),
    ]
    for number in sorted(refused_calls(changes_identity=changes_identity).values()):
        program += _instructions((_EQUAL, 0, 1, number), (_RETURN, 0, 0, refuse))
    # Its flags lie in memory that a filter cannot read; programs then use clone(2).
    program += _instructions((_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, absent))
    for number in (_SOCKET, _SOCKETPAIR):
        program += _if_call(number, (_EQUAL, 1, 0, _AF_UNIX), (_RETURN, 0, 0, refuse))
    # Threads only: each process may open as many files as the limit says, and the host has a limit, too.
    program += _if_call(
        _CLONE, (_ANY_BIT, 1, 0, _NEW_NAMESPACES), (_ANY_BIT, 1, 0, _CLONE_THREAD), (_RETURN, 0, 0, refuse)
    )
    # A process cannot choose to outlive its shim.
    program += _if_call(_PRCTL, (_EQUAL, 0, 1, _PR_SET_PDEATHSIG), (_RETURN, 0, 0, refuse))
    for number, (argument, flag) in ({} if huge_pages else _WITH_HUGE_PAGES).items():
        program += _if_call(number, (_ANY_BIT, 0, 1, flag), (_RETURN, 0, 0, refuse), argument=argument)
    others = 0xFFFF_FFFF & ~(_CLONE_FS | _CLONE_FILES)
    program += _if_call(_UNSHARE, (_ANY_BIT, 0, 1, others), (_RETURN, 0, 0, refuse))
    program += _instructions((_RETURN, 0, 0, _ALLOW))
    return Filter(b"".join(program))


def _if_call(number: int, *steps: tuple[int, int, int, int], argument: int = 0) -> list[bytes]:
    """Check the lower half of a call's argument; values that are not refused are allowed."""
    offset = _ARGUMENTS + argument * _ARGUMENT_SIZE
    body = _instructions((_LOAD, 0, 0, offset), *steps, (_RETURN, 0, 0, _ALLOW))
    return [*_instructions((_EQUAL, 0, len(body), number)), *body]


def _instructions(*instructions: tuple[int, int, int, int]) -> list[bytes]:
    return [_INSTRUCTION.pack(*instruction) for instruction in instructions]
