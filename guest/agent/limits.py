"""Limits that the kernel derives from its memory at boot, adjusted to the memory that it has now.

A kernel that has booted with little memory keeps its small limits when it gets more. The formulas come from
Linux 6.1 and 6.12, and the sizes of structures from x86-64. A limit is only raised, never lowered: a limit
reserves nothing, and lowering it could only break a running program. The thresholds of TCP's and UDP's memory
are also lowered, because they say how much of the memory these may use.

Values that a container's specification or a user of sysctl(8) has set are left alone.
"""

from __future__ import annotations

import _thread
import os

from guest.agent import files
from guest.agent.console import log
from proto.extensions import AT_LEAST_ANNOTATION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_ROOT = "/proc/sys"
_CONNTRACK = f"{_ROOT}/net/netfilter/nf_conntrack"

# systemd and its sysctl.d raise these on every ordinary host, however much memory it has.
_OF_ANY_HOST = {"kernel/pid_max": "4194304", "fs/file-max": "9223372036854775807"}

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
_PAGE = 4 * _KIB
_STACK = 16 * _KIB  # of a thread in the kernel
_INODE = 632  # of the virtual file system; a watch keeps one and, as a rough guess, as much again
_INOTIFY_WATCH = 80 + 2 * _INODE
_FANOTIFY_MARK = 2 * _INODE
_EPOLL_WATCH = 184
_INET_PEER = 192
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
_SHRINKING = ("net/ipv4/tcp_mem", "net/ipv4/udp_mem")

_lock = _thread.allocate_lock()
_boot: dict[str, tuple[int, ...]] = {}
_known: dict[str, tuple[int, ...]] = {}
"""The value at boot and the last value set here, of each limit that is still adjusted, by path."""
_kept: set[str] = set()


def derived(memory: int) -> dict[str, tuple[int, ...]]:
    """Compute the limits that the kernel would have chosen.

    :param memory: in bytes.
    :returns: value by name below ``/proc/sys``; 0 asks for nothing.
    """
    threads = memory // (8 * _STACK)
    # One for each 128 KiB; a hash table's size is a power of two, and TCP's is at most half a million.
    connections = min(1 << max(memory // (128 * _KIB) - 1, 0).bit_length(), 1 << 19)
    tcp = max(memory // _PAGE // 16, 128)
    udp = max(memory // _PAGE // 8, 128)
    return {
        "kernel/threads-max": (threads,),
        **{f"user/max_{kind}_namespaces": (threads // 2,) for kind in _NAMESPACES},
        "fs/inotify/max_user_watches": (_clamp(memory // 100 // _INOTIFY_WATCH, 1 << 13, 1 << 20),),
        "fs/fanotify/max_user_marks": (_clamp(memory // 100 // _FANOTIFY_MARK, 1 << 13, 1 << 20),),
        "fs/epoll/max_user_watches": (memory // 25 // _EPOLL_WATCH,),
        "net/ipv4/inet_peer_threshold": (_clamp(memory // 100 // _INET_PEER, 1 << 12, (1 << 16) + 128),),
        "net/ipv4/tcp_mem": (tcp // 4 * 3, tcp, tcp // 4 * 3 * 2),
        "net/ipv4/udp_mem": (udp // 4 * 3, udp, udp // 4 * 3 * 2),
        "net/ipv4/tcp_rmem": (0, 0, min(memory // 128, 6 * _MIB)),
        "net/ipv4/tcp_wmem": (0, 0, min(memory // 128, 4 * _MIB)),
        "net/ipv4/tcp_max_orphans": (connections // 2,),
        "net/ipv4/tcp_max_tw_buckets": (connections // 2,),
        "net/ipv4/tcp_max_syn_backlog": (max(connections // 128, 128),),
    }


def tracked_connections(memory: int) -> int:
    """Compute how many connections netfilter would track.

    :param memory: in bytes.
    """
    if memory > 4 * _GIB:
        return 1 << 18
    return 1 << 16 if memory > _GIB else max(memory // 16384 // 8, 1 << 10)


def prepare() -> None:
    """Raise the limits that every host raises, and record the kernel's choices before they change."""
    for name, most in _OF_ANY_HOST.items():
        _write(f"{_ROOT}/{name}", most)
    for name in derived(0):
        value = _read(f"{_ROOT}/{name}")
        if value is not None:
            _boot[name] = _known[name] = value


def follow() -> None:
    """Adjust every limit to the current memory; if the kernel refuses one, that is logged."""
    memory = os.sysconf("SC_PHYS_PAGES") * _PAGE
    with _lock:
        for name, wanted in derived(memory).items():
            _raise(name, wanted)
        _raise_tracked(tracked_connections(memory))


def accept(annotations: dict[str, str]) -> None:
    """Raise the limits that the host's administrator has raised.

    :param annotations: of a container; a host that knows this agent sends its limits among them.
    """
    told = {key: value for key, value in annotations.items() if key.startswith(AT_LEAST_ANNOTATION)}
    with _lock:
        for key, value in told.items():
            name = key.removeprefix(AT_LEAST_ANNOTATION).replace(".", "/")
            path = f"{_ROOT}/{name}"
            least = _read(path)
            if path not in _kept and least is not None and value.isdigit() and least < (int(value),):
                _write(path, value)
                if _known.get(name) == least:
                    _known[name] = (int(value),)


def leave(paths: Iterable[str]) -> None:
    """Never change some limits again, because their values were set on purpose.

    :param paths: their files.
    """
    with _lock:
        _kept.update(paths)
        for path in _kept:
            _known.pop(path.removeprefix(f"{_ROOT}/"), None)


def _raise(name: str, wanted: tuple[int, ...]) -> None:
    known = _known.get(name)
    if known is None:
        return
    least = _boot[name] if name in _SHRINKING else known
    value = tuple(map(max, least, wanted))
    if value == known:
        return
    path = f"{_ROOT}/{name}"
    if _read(path) == known:
        _write(path, " ".join(map(str, value)))
        _known[name] = value
    else:
        # A program has set it, so its value stays.
        del _known[name]


def _raise_tracked(wanted: int) -> None:
    """Raise the number of connections that netfilter tracks, if its module is loaded.

    The kernel chooses as many connections as buckets; any other number was set on purpose.
    """
    most, buckets = f"{_CONNTRACK}_max", f"{_CONNTRACK}_buckets"
    value = None if _kept.intersection((most, buckets)) else _read(most)
    if value is not None and value == _read(buckets) and value[0] < wanted:
        _write(buckets, str(wanted))
        _write(most, str(wanted))


def _read(path: str) -> tuple[int, ...] | None:
    try:
        return tuple(int(number) for number in files.read(path).split())
    except FileNotFoundError:
        return None


def _write(path: str, value: str) -> None:
    try:
        files.write(path, value)
    except OSError as error:
        log(f"limits: {path}: {value}: {error.strerror}")


def _clamp(value: int, least: int, most: int) -> int:
    return min(max(value, least), most)
