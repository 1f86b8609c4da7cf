"""Namespaces that the containers of the sandbox share, each with a file that stands for it."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what the signal module wraps in enums
import _thread
import os

from guest.agent import files, kernel, reaper
from guest.agent.console import log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

IPC = "/proc/1/ns/ipc"
UTS = "/proc/1/ns/uts"
"""These belong to the machine, like its network: making new ones would cost each clone some milliseconds."""

_DIRECTORY = "/run/sandbox-ns"
_NOBODY = 65534
_ALL_DESCRIPTORS = 1 << 30


def share_pid() -> str:
    """Make the PID namespace, with a process 1 that outlives every container.

    :returns: the file that stands for it.
    :raises OSError: if the kernel refuses.
    """
    path = f"{_DIRECTORY}/pid"
    files.make_directories(_DIRECTORY)
    files.create(path, "")
    failures: list[OSError] = []
    done = _thread.allocate_lock()
    done.acquire()

    def make() -> None:
        try:
            kernel.unshare(kernel.CLONE_NEWPID)
            kernel.mount(f"/proc/{_fork(_pause)}/ns/pid", path, flags=kernel.MS_BIND)
        except OSError as error:
            failures.append(error)
        done.release()

    # In its own thread, because all later children of this thread are in that namespace.
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

    Containers see this process and its ``/proc`` entry, so it gives up everything that they must not reach.
    """
    files.write("/proc/self/comm", "pause")
    # Its end would end every container.
    files.write("/proc/self/oom_score_adj", "-1000")
    # The kernel then does not even record exits of orphans; see sigaction(2).
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
