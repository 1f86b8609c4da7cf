"""The releases of Hako that its Debian package keeps side by side, each in its own directory.

An upgrade leaves the directory of the old release to the processes that run from it, so that their files do
not change. So does the removal of the package. The last of these processes removes the directory: each looks
for others when it ends. Because a process can be killed, ``delete`` and a new zygote look, too.

A sandbox also needs the guest's modules, and writes logs until its end. So if the package is purged while
sandboxes run, it leaves a list of the directories that the last process removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import time

from shim import zygote_protocol
from shim.host import file_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

CURRENT = "current"
"""The link to the release for new processes."""

PURGED = "purged"
"""The list of directories that go with the last process, one a line: the package has been purged."""
_PRISTINE = "package"  # dpkg's own files, from which releases are made
_PACKAGES = "packages"
#: The command line of a ``start`` or a ``delete`` does not name its release.
_PROGRAM = b"/containerd-shim-hako-v2"
_INTERPRETER = b"python"
#: containerd ends a ``start`` or a ``delete`` that takes longer.
_SHORT_S = 10.0
#: The holder of the lock ends soon, but may have to remove a release first.
_LOCK_S = 10.0


def root() -> str | None:
    """Return the directory of all releases; None if this process does not run from a package."""
    # The interpreter finds them by a link.
    packages = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    return os.path.dirname(os.path.dirname(packages)) if os.path.basename(packages) == _PACKAGES else None


def leave(*, lock_s: float = _LOCK_S) -> None:
    """Remove the old releases from which no other process runs; this process must end afterwards.

    It holds a lock until its end, so of two processes that end at once, the second does not find the first.
    After the removal of the package, the last process leaves nothing behind. What a purge would have removed
    goes, too.

    :param lock_s: how long to wait for others that end, in seconds.
    """
    directory = root()
    if directory is not None and _old(directory):
        _lock(directory, timeout_s=lock_s)
        prune(directory, wait_s=0.0)
        if not os.path.exists(directory):
            remove_shared()


def remove_shared() -> None:
    """Remove what sandboxes share on this host, such as zygotes and turns, unless there is a sandbox."""
    shared = os.path.dirname(zygote_protocol.ZYGOTE_DIRECTORY)
    with contextlib.suppress(OSError):
        if not any(os.path.exists(os.path.join(shared, name, "sandbox.json")) for name in os.listdir(shared)):
            import shutil  # noqa: PLC0415 - few ends of shims need it

            shutil.rmtree(shared)


def prune(root: str, *, wait_s: float = _SHORT_S) -> list[str]:
    """Remove the releases from which no other process runs, except the current one.

    :param root: the directory of all releases. It is removed as well if nothing is left in it.
    :param wait_s: how long to wait for processes that began before the current release was, and that do not
        show which one they run from, in seconds. If one is left, nothing is removed.
    :returns: the names of those removed.
    """
    if not _old(root) or not _are_gone(_unnamed(root), wait_s):
        return []
    used = {name for _, name, _ in _running(root)}
    removed = [name for name in _old(root) if name not in used]
    import shutil  # noqa: PLC0415 - few ends of shims need it

    for name in removed:
        shutil.rmtree(os.path.join(root, name), ignore_errors=True)
    for directory in _purged(root):
        shutil.rmtree(directory, ignore_errors=True)
    with contextlib.suppress(OSError):  # a release is left, or dpkg's files are
        os.rmdir(root)
    return removed


def _purged(root: str) -> list[str]:
    """Take the list of directories that a purge has left to the last process, if nothing else is left."""
    path = os.path.join(root, PURGED)
    try:
        if os.listdir(root) != [PURGED]:
            return []
        with open(path, encoding="utf-8") as file:
            found = file.read().splitlines()
        os.unlink(path)
    except FileNotFoundError:  # another process is the last, too
        return []
    return [each for each in found if os.path.isabs(each)]


def _old(root: str) -> list[str]:
    try:
        return sorted(set(os.listdir(root)) - {_current(root), CURRENT, PURGED, _PRISTINE})
    except FileNotFoundError:
        return []


def _lock(root: str, *, timeout_s: float) -> None:
    """Lock the directory of releases until this process ends, unless another holds the lock for long."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        file_lock.take(descriptor, timeout_s=timeout_s)


def retire_zygotes(root: str, *, also_current: bool = False) -> None:
    """End the zygotes of releases; a request that one of their forks serves is not disturbed.

    :param root: the directory of all releases.
    :param also_current: whether the zygotes of the current one also end.
    """
    current = _current(root)
    found = {
        pid: name
        for pid, name, words in _running(root)
        if b"-zygote" in words and (also_current or name != current)
    }
    for pid in found:
        if _parent(pid) not in found:  # a fork that waits ends with its zygote
            _end(pid)


def remove_dead_sockets(directory: str) -> None:
    """Remove what zygotes left that have ended.

    :param directory: of the zygotes' sockets.
    """
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(directory)):
            path = os.path.join(directory, name)
            if path.endswith(".lock"):
                _remove_if_dead(path)


def _remove_if_dead(path: str) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
            os.unlink(path.removesuffix(".lock"))
        finally:
            os.close(lock)


def _current(root: str) -> str | None:
    try:
        return os.path.basename(os.readlink(os.path.join(root, CURRENT)))
    except OSError:
        return None


def _running(root: str) -> Iterator[tuple[int, str, list[bytes]]]:
    """Return the other processes that run from a release: pid, name of the release, command line.

    The first word of the command line tells the release, because its own interpreter runs every process
    except ``start`` and ``delete``.
    """
    prefix = os.fsencode(root) + b"/"
    for pid, words in _processes():
        if words[0].startswith(prefix):
            yield pid, os.fsdecode(words[0].removeprefix(prefix).partition(b"/")[0]), words


def _unnamed(root: str) -> list[int]:
    """Return the processes that may run from an old release, but whose command lines do not tell."""
    try:
        switched_at = os.lstat(os.path.join(root, CURRENT)).st_mtime
    except FileNotFoundError:  # the package has been removed
        switched_at = time.time()
    prefix = os.fsencode(root) + b"/"
    return [
        pid
        for pid, words in _processes()
        if not words[0].startswith(prefix)
        and os.path.basename(words[0]).startswith(_INTERPRETER)
        and any(_is_of(prefix, pid, word) for word in words[1:3] if word.endswith(_PROGRAM))
        and _began_at(pid) <= switched_at
    ]


def _is_of(prefix: bytes, pid: int, program: bytes) -> bool:
    """Tell whether a process's program is of a release, or was before the package was removed."""
    if os.path.realpath(program).startswith(prefix):
        return True
    return not os.path.exists(program) and not _is_elsewhere(pid, program)


def _is_elsewhere(pid: int, program: bytes) -> bool:
    """Tell whether a process has its program in a root directory of its own, as in a container."""
    own_root = b"/proc/%d/root" % pid
    try:
        return not os.path.samefile(own_root, "/") and os.path.lexists(own_root + program)
    except OSError:  # it has ended
        return False


def _processes() -> Iterator[tuple[int, list[bytes]]]:
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
                yield int(name), words


def _fields(pid: int) -> list[bytes]:
    """Return the fields of /proc/[pid]/stat after the program's name: proc(5)."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()


def _parent(pid: int) -> int:
    try:
        return int(_fields(pid)[1])
    except OSError:
        return 0


def _began_at(pid: int) -> float:
    """Return when a process began, in seconds since the epoch; long ago if it has ended."""
    try:
        since_boot_s = int(_fields(pid)[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot_s


def _are_gone(pids: list[int], wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return False
        finally:
            os.close(descriptor)
    return True


def _end(pid: int) -> None:
    """End a process, and wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll(_SHORT_S * 1000)
        finally:
            os.close(descriptor)
