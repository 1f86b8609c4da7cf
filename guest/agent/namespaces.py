"""Namespaces that the containers of the sandbox share, each pinned by a file that stands for it."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what the signal module wraps in enums
import _socket
import _thread
import os

from guest.agent import files, kernel, reaper
from guest.agent.console import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_DIRECTORY = "/run/sandbox-ns"
_NOBODY = 65534
_ALL_DESCRIPTORS = 1 << 30


def share_ipc() -> str:
    """Make the IPC namespace.

    :returns: the file that stands for it.
    :raises OSError: if the kernel refuses.
    """
    return _make("ipc", lambda: kernel.unshare(kernel.CLONE_NEWIPC))


def share_uts(hostname: str) -> str:
    """Make the UTS namespace.

    :param hostname: the name of its host; empty for the machine's own.
    :returns: the file that stands for it.
    :raises OSError: if the kernel refuses.
    """

    def unshare() -> None:
        kernel.unshare(kernel.CLONE_NEWUTS)
        if hostname:
            _socket.sethostname(hostname)

    return _make("uts", unshare)


def share_pid() -> str:
    """Make the PID namespace, with a process 1 that outlives every container.

    :returns: the file that stands for it.
    :raises OSError: if the kernel refuses.
    """
    return _make("pid", lambda: kernel.unshare(kernel.CLONE_NEWPID), first_process=_pause)


def _make(kind: str, unshare: Callable[[], None], *, first_process: Callable[[], None] | None = None) -> str:
    """Make a namespace on a thread of its own, which ends with that, and pin it with a bind mount."""
    path = f"{_DIRECTORY}/{kind}"
    files.make_directories(_DIRECTORY)
    files.create(path, "")
    failures: list[OSError] = []
    done = _thread.allocate_lock()
    done.acquire()

    def make() -> None:
        try:
            unshare()
            if first_process is None:
                kernel.mount(
                    f"/proc/self/task/{_thread.get_native_id()}/ns/{kind}", path, flags=kernel.MS_BIND
                )
            else:
                child = _fork(first_process)
                kernel.mount(f"/proc/{child}/ns/{kind}", path, flags=kernel.MS_BIND)
        except OSError as error:
            failures.append(error)
        done.release()

    _thread.start_new_thread(make, ())
    done.acquire()
    if failures:
        raise failures[0]
    return path


def _fork(child: Callable[[], None]) -> int:
    with reaper.Launch() as launch:
        pid = os.fork()
        if pid == 0:
            try:
                child()
            except OSError as error:
                log(f"sandbox: process 1 of the containers: {error}")
            os._exit(1)
        launch.watch(pid)
    return pid


def _pause() -> None:
    """Do what a pod's pause container does: be process 1, take over orphans, never end.

    Containers see this process and its ``/proc`` entry, so it gives up everything they have no right to.
    """
    files.write("/proc/self/comm", "pause")
    # Its end would be that of every container.
    files.write("/proc/self/oom_score_adj", "-1000")
    # Ends of orphans are not even recorded then, see sigaction(2).
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("tmpfs", "/mnt", fstype="tmpfs", flags=kernel.MS_RDONLY)
    os.chdir("/mnt")
    kernel.mount(".", "/", flags=kernel.MS_MOVE)
    os.chroot(".")
    os.chdir("/")
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    os.closerange(0, _ALL_DESCRIPTORS)
    while True:
        _signal.pause()
