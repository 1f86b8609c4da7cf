"""Probe the rights of a confined process: runs in its place, and prints the findings as JSON.

    confined_probe.py HOST_PID ABSTRACT_SOCKET PATH...

It has only the standard library, because it sees no other.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import socket
import sys
from pathlib import Path


def names(directory: str) -> list[str]:
    return [path.name for path in Path(directory).iterdir()]


libc = ctypes.CDLL(None, use_errno=True)
pid, abstract, *paths = sys.argv[1:]
host_pid = int(pid)

CALLS = {
    "ptrace": (101, 16, host_pid, 0, 0),
    "pidfd_open": (434, host_pid, 0),
    "pidfd_getfd": (438, 0, 0, 0),
    "process_vm_readv": (310, host_pid, 0, 0, 0, 0, 0),
    "kcmp": (312, host_pid, 1, 0, 0, 0),
    "mount": (165, b"proc", b"/proc", b"proc", 0, 0),
    "umount2": (166, b"/proc", 2),
    "fsopen": (430, b"proc", 0),
    "open_tree": (428, -100, b"/", 1),
    "move_mount": (429, 0, b"", -100, b"/", 4),
    "pivot_root": (155, b".", b"."),
    "setns": (308, 0, 0),
    "bpf": (321, 0, 0, 0),
    "perf_event_open": (298, 0, 0, 0, 0, 0),
    "userfaultfd": (323, 0),
    "io_uring_setup": (425, 8, 0),
    "keyctl": (250, 0, 0),
    "open_by_handle_at": (304, -100, 0, 0),
    **{
        f"unshare {name}": (272, flag)
        for name, flag in {
            "user": 0x10000000,
            "mount": 0x20000,
            "pid": 0x20000000,
            "network": 0x40000000,
            "ipc": 0x8000000,
            "uts": 0x4000000,
            "cgroup": 0x2000000,
            "time": 0x80,
        }.items()
    },
    "fork": (57,),
    "clone": (56, 17, 0, 0, 0, 0),
    "clone user": (56, 0x10000000 | 17, 0, 0, 0, 0),
    "clone3": (435, 0, 0),
    "io_setup": (206, 1, 0),
    "sync": (162,),
    "inotify_init1": (294, 0),
    "mmap of huge pages": (9, 0, 1 << 21, 3, 0x40022, -1, 0),
    "memfd of huge pages": (319, b"huge", 4),
    "kill": (62, host_pid, 0),
    "death signal": (157, 1, 0, 0, 0, 0),
    "x32 getpid": (0x40000000 | 39,),
}
FAMILIES = {"unix": 1, "inet": 2, "inet6": 10, "netlink": 16, "packet": 17, "vsock": 40}


def outcome(result: int) -> str:
    return "done" if result >= 0 else errno.errorcode[ctypes.get_errno()]


def status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def read(path: str) -> str:
    try:
        return str(len(Path(path).read_bytes()))
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def reach_abstract_socket() -> str:
    try:
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(f"\0{abstract}")
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def families() -> dict[str, str]:
    found = {}
    for name, number in FAMILIES.items():
        try:
            socket.socket(number, socket.SOCK_RAW if name == "packet" else socket.SOCK_STREAM).close()
            found[name] = "done"
        except OSError as error:
            found[name] = errno.errorcode[error.errno or 0]
    return found


def unwritable(directory: str) -> str:
    try:
        Path(directory, "probe").touch()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def writable_below_proc() -> list[str]:
    """List the kernel's files that can be opened for writing, as root if this process may become root."""
    libc.syscall(117, 0, 0, 0)  # setresuid
    found = []
    for directory, _names, files in os.walk("/proc"):
        for path in (Path(directory, name) for name in files):
            with contextlib.suppress(OSError):
                if not path.is_symlink():
                    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY))
                    found.append(str(path))
    return found


roots = ["", *(f"/proc/{one}/root" for one in names("/proc") if one.isdigit())]
attempts = {}
for name, arguments in CALLS.items():
    ctypes.set_errno(0)
    attempts[name] = outcome(
        libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    )
network = []
with contextlib.suppress(OSError):
    network = [line.partition(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
json.dump(
    {
        "status": status(),
        "pid": os.getpid(),
        "processes": [one for one in names("/proc") if one.isdigit()],
        "root": sorted(names("/")),
        "read": {path: sorted({read(root + path) for root in roots}) for path in paths},
        "calls": attempts,
        "families": families(),
        "abstract": reach_abstract_socket(),
        "interfaces": network,
        "writes": {one: unwritable(one) for one in ("/", "/usr", "/proc", "/dev", "/etc")},
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "signals": resource.getrlimit(resource.RLIMIT_SIGPENDING),
        "messages": resource.getrlimit(resource.RLIMIT_MSGQUEUE),
        "writable": writable_below_proc(),
        "descriptors": sorted(int(one) for one in names("/proc/self/fd")),
    },
    sys.stdout,
)
