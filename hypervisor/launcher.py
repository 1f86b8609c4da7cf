"""Starts a process that is confined before its program runs: root, user, limits, system calls.

Between fork(2) and execve(2), the child only makes system calls. A chain of programs could do the same, but
each of them would cost as much as all of the calls.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import select
import signal
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from hypervisor import seccomp
from hypervisor.confinement import SHARE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from hypervisor.confinement import Confinement

FAILED = 125
"""The exit status of a process whose confinement failed; its last line says why."""

_NOT_EXECUTED = 127

MARK = "jail: "
"""The beginning of that line."""

# Of sched.h, sys/mount.h, linux/prctl.h, linux/securebits.h and linux/capability.h.
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWPID, _CLONE_NEWNET = 0x20000, 0x8000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 8, 32, 4096
_MS_REC, _MS_PRIVATE, _MS_SLAVE = 0x4000, 1 << 18, 1 << 19
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 8, 22, 24
_PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS, _PR_SET_THP_DISABLE, _PR_CAP_AMBIENT = 28, 38, 41, 47
_PR_CAP_AMBIENT_RAISE = 2
_SECCOMP_MODE_FILTER = 2
_NO_SETUID_FIXUP = 1 << 2
_CAPABILITY_VERSION = 0x20080522
_CAPABILITIES = 64

_PENDING_SIGNALS = 1024
"""More than a program with a thousand threads has at once."""

_PLACE = b"/sys"
"""Where the new root is built: this directory exists on every host, and nothing below it is needed."""

_libc = ctypes.CDLL(None, use_errno=True)
# Looked up now: the child of a process with threads may not do it.
_prctl, _mount, _unshare, _setns = _libc.prctl, _libc.mount, _libc.unshare, _libc.setns
_syscall, _umount2 = _libc.syscall, _libc.umount2
_SYS_PIVOT_ROOT, _SYS_CAPSET, _SYS_CLOSE_RANGE = 155, 126, 436
_CLOSE_RANGE_CLOEXEC = 4


def launch(
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    output: int,
    inherit: Iterable[int],
    confinement: Confinement,
    huge_pages: bool,
) -> int:
    """Start a program. The kernel kills it when the calling thread ends, which must be the main one.

    A failure in the child is not raised: the child ends with status :data:`FAILED` and a line of output.

    :param argv: the program's absolute path and its arguments.
    :param environment: all of its environment.
    :param output: what it writes its output and its errors to.
    :param inherit: descriptors that it gets under the same numbers; it gets no others but 0 to 2.
    :param confinement: its rights.
    :param huge_pages: whether its memory may be of huge pages, if it asks for them.
    :returns: its process id, as this process knows it.
    :raises OSError: if no process could be made.
    :raises NotImplementedError: if there is no seccomp filter for this machine's architecture.
    """
    calls = seccomp.confining(
        changes_identity=not confinement.keeps_identity, huge_pages=confinement.has_huge_pages
    )
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        # The child would handle a signal as this process does, until its program runs.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            _check(_unshare(_CLONE_NEWPID), "unshare pid")
            try:
                pid = os.fork()
                if pid == 0:
                    child = _Child(
                        argv=tuple(argv),
                        environment=environment,
                        stdio=(null, output, output),
                        inherit=tuple(inherit),
                        confinement=confinement,
                        huge_pages=huge_pages,
                        calls=calls,
                    )
                    child.run()
            finally:
                _check(_setns(own, _CLONE_NEWPID), "setns pid")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    finally:
        os.close(null)
        os.close(own)
    return pid


@dataclass(frozen=True, kw_only=True)
class _Child:
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    stdio: tuple[int, int, int]
    inherit: tuple[int, ...]
    confinement: Confinement
    huge_pages: bool
    calls: seccomp.Filter

    def run(self) -> NoReturn:
        """Become the program; to be called in the new process."""
        try:
            self._prepare()
            self._execute()
        except BaseException as error:  # noqa: BLE001  (nothing of the parent's may run in the child)
            words = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else repr(error)
            os.write(2, f"{MARK}{words}\n".encode())
        finally:
            os._exit(FAILED)

    def _execute(self) -> None:
        try:
            os.execve(self.argv[0], self.argv, self.environment)  # noqa: S606  (the purpose of this function)
        except OSError as error:
            os.write(2, f"{self.argv[0]}: {error.strerror}\n".encode())
            os._exit(_NOT_EXECUTED)

    def _prepare(self) -> None:
        gc.disable()
        os.setsid()
        for number, source in enumerate(self.stdio):
            os.dup2(source, number)
        # This process opens nothing that stays open over execve(2), but may have inherited descriptors.
        _syscall(_SYS_CLOSE_RANGE, 3, ctypes.c_uint(0xFFFFFFFF), _CLOSE_RANGE_CLOEXEC)
        for descriptor in self.inherit:
            os.set_inheritable(descriptor, True)  # noqa: FBT003
        os.umask(0o077)
        if not self.huge_pages:
            _prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
        _enter_namespaces(self.confinement)
        _change_root(self.confinement)
        _limit(self.confinement)
        _become(self.confinement)
        _check(_prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
        # The parent may have died before the signal was requested; then the output has no reader.
        poll = select.poll()
        poll.register(1, 0)
        if poll.poll(0):
            os._exit(FAILED)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _filter(self.calls)


def _enter_namespaces(confinement: Confinement) -> None:
    new = _CLONE_NEWNS | _CLONE_NEWIPC
    if confinement.network is None:
        new |= _CLONE_NEWNET
    else:
        namespace = os.open(confinement.network, os.O_RDONLY | os.O_CLOEXEC)
        _check(_setns(namespace, _CLONE_NEWNET), f"setns {confinement.network}")
        os.close(namespace)
    _check(_unshare(new), "unshare")


def _change_root(confinement: Confinement) -> None:
    # Later mounts in the share must arrive here, and mounts made here must not go back.
    _do_mount(b"none", b"/", b"", _MS_REC | (_MS_PRIVATE if confinement.share is None else _MS_SLAVE))
    flags = _MS_NOSUID | _MS_NODEV
    _do_mount(b"none", _PLACE, b"tmpfs", flags, b"mode=755")
    root = os.fsdecode(_PLACE)
    if confinement.has_devices or confinement.nodes:
        _make_devices(confinement, root)
    for path in confinement.files:
        _show(path, root)
    os.mkdir(f"{root}/proc", 0o755)
    # The kernel lets root write there without a capability, and the virtio-fs daemon may act as root.
    _do_mount(b"proc", os.fsencode(f"{root}/proc"), b"proc", flags | _MS_NOEXEC | _MS_RDONLY)
    if confinement.share is not None:
        os.mkdir(f"{root}{SHARE}", 0o755)
        _do_mount(os.fsencode(confinement.share), os.fsencode(f"{root}{SHARE}"), b"", _MS_BIND | _MS_REC)
    _do_mount(b"none", _PLACE, b"", flags | _MS_REMOUNT | _MS_BIND | _MS_RDONLY)
    os.chdir(root)
    # The old root is stacked on the new one and then unmounted: see pivot_root(2), NOTES.
    _check(_syscall(_SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
    _check(_umount2(b".", _MNT_DETACH), "umount")
    os.chdir("/")


def _make_devices(confinement: Confinement, root: str) -> None:
    os.umask(0o022)
    os.mkdir(f"{root}/dev", 0o755)
    # Only root can make device nodes here, and does so when a device is plugged.
    _do_mount(b"none", os.fsencode(f"{root}/dev"), b"tmpfs", _MS_NOSUID | _MS_NOEXEC, b"mode=755")
    for node in confinement.nodes:
        device = os.stat(node).st_rdev
        os.mknod(f"{root}{node}", stat.S_IFCHR | 0o600, device)
        os.chown(f"{root}{node}", confinement.identity.uid, confinement.identity.gid)
    if confinement.has_devices:
        os.mkdir(f"{root}/sys", 0o755)
        flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_RDONLY
        _do_mount(b"sysfs", os.fsencode(f"{root}/sys"), b"sysfs", flags)
    os.umask(0o077)


def _show(path: Path, root: str) -> None:
    target = f"{root}{path}"
    os.umask(0o022)
    os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
    if os.path.islink(path) and os.path.exists(f"{root}{os.path.realpath(path)}"):
        os.symlink(os.readlink(path), target)
    else:
        if os.path.isdir(path):
            os.makedirs(target, 0o755, exist_ok=True)
        elif not os.path.exists(target):  # otherwise it is in a directory that is shown already
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        _do_mount(os.fsencode(path), os.fsencode(target), b"", _MS_BIND)
        device = 0 if target.startswith(f"{root}/dev/") else _MS_NODEV
        flags = _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | device
        _do_mount(b"none", os.fsencode(target), b"", flags)
    os.umask(0o077)


def _limit(confinement: Confinement) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # All processes of a user share these, and the virtio-fs daemon may act as any user.
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (0, 0))
    _set(resource.RLIMIT_SIGPENDING, _PENDING_SIGNALS)
    _set(resource.RLIMIT_NOFILE, confinement.open_files)
    if confinement.has_devices:
        _set(resource.RLIMIT_MEMLOCK, resource.RLIM_INFINITY)


def _set(limit: int, wanted: int) -> None:
    try:
        resource.setrlimit(limit, (wanted, wanted))
    except (ValueError, OSError):  # this process has a lower limit and may not raise it
        most = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (most, most))


def _become(confinement: Confinement) -> None:
    kept = sum(1 << number for number in confinement.capabilities)
    for number in range(_CAPABILITIES):
        if not kept >> number & 1 and _prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) != 0:
            break  # the kernel has no more capabilities
    if kept:
        _check(_prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0), "keepcaps")
    os.setgroups(())
    uid, gid = confinement.identity.uid, confinement.identity.gid
    os.setresgid(gid, gid, gid)
    if not confinement.keeps_identity:
        # It keeps its capabilities when it becomes another user, who owns the file.
        _check(_prctl(_PR_SET_SECUREBITS, _NO_SETUID_FIXUP, 0, 0, 0), "securebits")
    os.setresuid(uid, uid, uid)
    _set_capabilities(kept)
    for number in confinement.capabilities:
        _check(_prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0), f"capability {number}")


def _set_capabilities(kept: int) -> None:
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    data = struct.pack("=6I", low, low, low, high, high, high)
    _check(_syscall(_SYS_CAPSET, header, data), "capset")


def _filter(calls: seccomp.Filter) -> None:
    _check(_prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    code = ctypes.create_string_buffer(calls.code, len(calls.code))
    # struct sock_fprog
    what = struct.pack("@HP", calls.length, ctypes.addressof(code))
    _check(_prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, what, 0, 0), "seccomp")


def _do_mount(source: bytes, target: bytes, kind: bytes, flags: int, data: bytes | None = None) -> None:
    _check(_mount(source, target, kind, ctypes.c_ulong(flags), data), f"mount {os.fsdecode(target)}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
