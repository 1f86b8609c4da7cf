"""A record of everything that a sandbox makes on the host, written first, so that any process can undo it.

The sandbox's mounts are not in it: they are in the shim's own mount namespace, and end with the shim.

The ledger is a file to which JSON lines are appended. A line records a thing, or that its maker has undone
it, or that a container was added or removed. A crash may tear the last line. It is skipped, because nothing
is made before its line is complete. If a pod runs for months and its containers change, a new file with the
lines that still matter replaces the old one; therefore lines are written under a lock, if it is free soon.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import time

from shim.host import file_lock, host_process, kernel
from shim.host.host_process import HostProcess
from shim.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

#: The name of the sandbox's daemon among the processes.
SHIM_PROCESS = "shim"
_NAME = "ledger"
_LONG_BYTES = 1 << 16
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
_CGROUP_EMPTY_S, _CGROUP_RETRY_S = 1.0, 0.005
_LOCK_S = 0.1
_PID_MAX = 1 << 22  # PID_MAX_LIMIT of the kernel, see proc(5)
_REDIRECTION = re.compile(r"(/.*) ([0-9]{1,10}) ([0-9]{1,9})", re.DOTALL)


class LedgerEntry(Record):
    """A thing that exists, or may exist, on the host."""

    number: int
    #: ``process``, ``directory``, ``file`` (sockets too), ``redirection`` or ``cgroup``.
    kind: str
    #: Path of the thing; of a redirection path and inode of its namespace and the interface; or the name of
    #: the process.
    name: str
    pid: int
    start_time: int


class Ledger:
    """The ledger of one sandbox, open for appending.

    :param state_directory: the state directory of the sandbox.
    :param create: make the file; only ``start`` does, so that nothing revives a deleted sandbox.
    :raises FileNotFoundError: if there is no ledger and ``create`` is not set.
    """

    def __init__(self, state_directory: str, *, create: bool = False) -> None:
        self._directory = _without_links(state_directory)
        self._path = os.path.join(self._directory, _NAME)
        self._descriptor = os.open(self._path, _FLAGS | (os.O_CREAT if create else 0), 0o600)
        self._next = 1 + max((line["number"] for line in self._lines() if "kind" in line), default=0)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")

    def process(self, pid: int, *, name: str) -> int:
        """Record a process right after it was started.

        :param pid: its id; the caller has not reaped it yet.
        :param name: its name in messages.
        :returns: the number of the entry, for ``undone``.
        :raises ProcessLookupError: if there is no such process.
        """
        process = host_process.identify(pid)
        return self._record("process", name, pid=pid, start_time=process.start_time)

    def directory(self, path: str) -> int:
        """Record a directory that is about to be made; undoing removes it with everything in it."""
        return self._record("directory", _without_links(path))

    def file(self, path: str) -> int:
        """Record a file, socket, FIFO or link that is about to be made."""
        return self._record("file", _without_links(path))

    def redirection(self, path: str, *, namespace: int, interface: int) -> int:
        """Record that the packets of an interface are about to be redirected to a machine.

        :param path: of its network namespace.
        :param namespace: the inode number of that.
        :param interface: its index there.
        """
        return self._record("redirection", f"{os.path.abspath(path)} {namespace} {interface}")

    def cgroup(self, path: str) -> int:
        """Record a cgroup's directory that is about to be made; undoing removes it once it is empty."""
        return self._record("cgroup", path)

    def undone(self, number: int) -> None:
        """Say that the maker of an entry has undone it.

        :param number: what recording it returned.
        """
        self._append({"undone": number})

    def created(self, container: str) -> None:
        """Record that a container will be in the sandbox, so that ``delete`` of another spares it."""
        self._append({"created": container})

    def deleted(self, container: str) -> None:
        """Record that a container is gone, or that containerd is done with it."""
        self._append({"deleted": container})
        if os.fstat(self._descriptor).st_size > _LONG_BYTES:
            self._shorten()

    def entries(self) -> list[LedgerEntry]:
        """List the entries that have not been undone, oldest first."""
        return _entries(self._lines())

    def shims(self) -> list[HostProcess]:
        """Identify the sandbox's daemon, if it has been started."""
        return _shims(self._lines())

    def containers(self) -> set[str]:
        """Name the containers that are in the sandbox."""
        containers: set[str] = set()
        for line in self._lines():
            if "created" in line:
                containers.add(line["created"])
            elif "deleted" in line:
                containers.discard(line["deleted"])
        return containers

    def undo_all(self, *, deadline_s: float) -> list[str]:
        """Undo everything: first processes, then the newest entries first, last the state directory.

        The calling process is left alone. Nothing is removed while a process runs that could put symbolic
        links in the way. Failed entries stay in the ledger, and the next attempt continues with them.

        :param deadline_s: how long to wait for all processes together to die.
        :returns: what could not be undone and why, one line each.
        """
        entries = self.entries()
        processes = {
            HostProcess(pid=entry.pid, start_time=entry.start_time): entry.name
            for entry in entries
            if entry.kind == "process" and entry.pid != os.getpid()
        }
        failures = [
            f"process {process.pid} ({processes[process]}): it outlived SIGKILL by {deadline_s:g} s; "
            f"see /proc/{process.pid}/stack"
            for process in host_process.end(processes, number=signal.SIGKILL, timeout_s=deadline_s)
        ]
        if failures:
            return failures
        things = [(entry.kind, entry.name) for entry in reversed(entries) if entry.kind != "process"]
        for kind, name in (*things, ("directory", self._directory)):
            if failures and name == self._directory:
                break
            try:
                _undo(kind, name)
            except OSError as error:
                failures.append(f"{kind} {name}: {error.strerror}; remove it by hand")
        return failures

    def close(self) -> None:
        """Close the file; the ledger stays on disk."""
        os.close(self._descriptor)

    def _record(self, kind: str, name: str, *, pid: int = 0, start_time: int = 0) -> int:
        number = self._next
        self._next += 1
        entry = LedgerEntry(number=number, kind=kind, name=name, pid=pid, start_time=start_time)
        self._append(entry.as_dict())
        return number

    def _append(self, line: dict[str, object]) -> None:
        """Add a line, even if a process that shortens the file hangs.

        Then this process writes, and looks whether the file has been replaced. The other one replaces it, and
        looks for lines in the old one. So the line is in the new one, perhaps twice, which means the same.
        """
        text = json.dumps(line).encode() + b"\n"
        with self._locked(fcntl.LOCK_SH) as is_locked:
            os.write(self._descriptor, text)
            while not is_locked and self._reopen():
                os.write(self._descriptor, text)

    def _shorten(self) -> None:
        """Remove undone entries and ended containers; do it later if the file is in use."""
        with self._locked(fcntl.LOCK_EX) as is_locked:
            if not is_locked:
                return
            size = os.fstat(self._descriptor).st_size
            lines: list[dict[str, object]] = [entry.as_dict() for entry in self.entries()]
            lines += ({"created": container} for container in sorted(self.containers()))
            new = f"{self._path}.new"
            descriptor = os.open(new, _FLAGS | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                os.write(descriptor, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
                os.rename(new, self._path)
                added = os.fstat(self._descriptor).st_size - size
                os.write(descriptor, os.pread(self._descriptor, added, size))
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def _locked(self, kind: int) -> Iterator[bool]:
        """Lock the file that has the name now, for a block; it may have been replaced.

        Other processes hold it only for one write, unless they are stopped. The event loop waits here, so it
        does not wait for stopped ones. The block is told whether it has the lock.
        """
        is_locked = file_lock.take(self._descriptor, kind, timeout_s=_LOCK_S)
        while self._reopen():
            is_locked = file_lock.take(self._descriptor, kind, timeout_s=_LOCK_S)
        try:
            yield is_locked
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _reopen(self) -> bool:
        """Open the file that has the name now; tell whether it is another one."""
        with contextlib.suppress(FileNotFoundError):  # undone, and no longer read
            if not os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):
                current = os.open(self._path, _FLAGS)
                os.close(self._descriptor)
                self._descriptor = current
                return True
        return False

    def _lines(self) -> list[dict[str, Any]]:
        return _decoded(os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0))


def shims_in(state_directory: str) -> list[HostProcess]:
    """Identify the daemon of a sandbox, if it has been started; the ledger is only read.

    :param state_directory: the state directory of the sandbox.
    :raises OSError: if it has no ledger.
    """
    with open(os.path.join(state_directory, _NAME), "rb") as file:
        return _shims(_decoded(file.read()))


def _decoded(content: bytes) -> list[dict[str, Any]]:
    lines = []
    for text in content.splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if _is_whole(line):
            lines.append(line)
    return lines


def _entries(lines: list[dict[str, Any]]) -> list[LedgerEntry]:
    entries: dict[int, LedgerEntry] = {}
    for line in lines:
        if "kind" in line:
            entries[line["number"]] = LedgerEntry(**line)
        elif "undone" in line:
            entries.pop(line["undone"], None)
    return list(entries.values())


def _shims(lines: list[dict[str, Any]]) -> list[HostProcess]:
    return [
        HostProcess(pid=entry.pid, start_time=entry.start_time)
        for entry in _entries(lines)
        if entry.kind == "process" and entry.name == SHIM_PROCESS
    ]


def _is_whole(line: Any) -> bool:
    """Tell whether a line has the form that this class writes; a damaged one may be any JSON."""
    if not isinstance(line, dict):
        return False
    if len(line) == 1:
        ((key, value),) = line.items()
        return (key == "undone" and type(value) is int) or (
            key in {"created", "deleted"} and isinstance(value, str)
        )
    if set(line) != set(LedgerEntry.fields()):
        return False
    numbers = (line["number"], line["pid"], line["start_time"])
    if not all(type(number) is int and number >= 0 for number in numbers) or line["pid"] > _PID_MAX:
        return False
    kind, name = line["kind"], line["name"]
    if not isinstance(name, str) or "\0" in name:
        return False
    return (
        kind == "process"
        or (kind in {"directory", "file", "cgroup"} and name.startswith("/"))
        or (kind == "redirection" and _REDIRECTION.fullmatch(name) is not None)
    )


def _without_links(path: str) -> str:
    directory, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(directory), name)


def _undo(kind: str, name: str) -> None:
    if kind == "redirection":
        from shim.host.ingress import remove_ingress_in  # noqa: PLC0415 - few sandboxes have one

        path, namespace, interface = name.rsplit(" ", 2)
        remove_ingress_in(path, number=int(namespace), index=int(interface))
        return
    if _without_links(name) != name:
        # A guest can write below shared directories; its links must not lead us elsewhere.
        raise OSError(errno.ELOOP, "a symbolic link is now part of the path")
    try:
        if kind == "directory":
            # Files in mounts below a directory are not ours to remove.
            kernel.detach_mounts(name)
            _remove_tree(name)
        elif kind == "file":
            os.unlink(name)
        elif kind == "cgroup":
            _remove_cgroup(name)
    except FileNotFoundError:
        return


def _remove_cgroup(path: str) -> None:
    """Remove a cgroup; after a process's end, the kernel may still count it there for a moment.

    Version 1 has no event for an empty cgroup.
    """
    give_up_at = time.monotonic() + _CGROUP_EMPTY_S
    while True:
        try:
            os.rmdir(path)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > give_up_at:
                raise
            time.sleep(_CGROUP_RETRY_S)
        else:
            return


def _remove_tree(path: str) -> None:
    if os.path.islink(path):
        os.unlink(path)
        return
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _remove_tree(entry.path)
            else:
                os.unlink(entry.path)
    os.rmdir(path)
