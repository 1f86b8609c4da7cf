"""Starts a daemon that keeps only the socket of ``start``."""

from __future__ import annotations

import contextlib
import os
import sys

from shim.host import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class MakeShim(Protocol):
        """The function by which ``start`` makes a shim: see :func:`spawn`."""

        def __call__(  # noqa: D102 - as above
            self,
            directory: str,
            arguments: list[str],
            /,
            *,
            error_output: int,
            listener: int | None,
            register: Callable[[int], None],
        ) -> None: ...


#: The descriptor of the daemon's listening socket.
LISTENER_DESCRIPTOR = 3
#: The line that the daemon writes to standard error when its gRPC socket is ready.
READY = b"\0"
_MAX_OOM_SCORE_ADJ = 1000


def take_attributes(*, of: int) -> None:
    """Give this process a shim's kernel settings; a missing privilege or kernel feature is ignored.

    :param of: the process that runs ``start``: the shim is a little more likely to be killed for memory, as
        containerd's shim contract asks.
    """
    with contextlib.suppress(OSError):
        with open(f"/proc/{of}/oom_score_adj", encoding="ascii") as file:
            score = min(int(file.read()) + 1, _MAX_OOM_SCORE_ADJ)
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(score))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, of))
    if os.environ.get("SCHED_CORE"):
        with contextlib.suppress(OSError):
            kernel.create_core_scheduling_cookie()


def open_log(bundle: str) -> int:
    """Open the FIFO that containerd copies to its own log, so that writing never blocks or fails permanently.

    Opened for reading, too, it has a reader even while containerd is down; output that does not fit is
    dropped.

    :param bundle: the bundle with the FIFO ``log``.
    :returns: a descriptor; of the null device if there is no FIFO.
    """
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(os.path.join(bundle, "log"), flags | os.O_NONBLOCK | os.O_APPEND)
    except OSError:
        return os.open(os.devnull, flags)


def spawn(
    _directory: str,
    arguments: list[str],
    *,
    error_output: int,
    listener: int | None,
    register: Callable[[int], None],
) -> None:
    """Run this program again as a detached shim: with its own session, and without input and our descriptors.

    :param _directory: its sandbox's state directory, which its command line also names.
    :param arguments: the shim's command line, without the program.
    :param error_output: what becomes standard error.
    :param listener: what becomes descriptor 3.
    :param register: called with the shim's pid while it still waits. If this process dies before it returns,
        the shim dies too, so no shim runs that was not recorded.
    :raises OSError: if the process limit is reached, or from ``register``.
    """
    take_attributes(of=os.getppid())  # the shim inherits them
    fork(lambda: execute(arguments, error_output=error_output, listener=listener), before=register)


def fork(become: Callable[[], None], *, before: Callable[[int], None]) -> None:
    """Fork a child that does not return.

    :param become: what.
    :param before: called in this process with the child's pid while the child waits; the child ends if this
        process dies before it returns.
    :raises OSError: if the process limit is reached, or from ``before``.
    """
    gate, opener = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(opener)
            if os.read(gate, 1):
                become()
        finally:
            os._exit(127)
    try:
        os.close(gate)
        before(pid)
        os.write(opener, b"\0")
    finally:
        os.close(opener)


def execute(arguments: list[str], *, error_output: int, listener: int | None) -> None:
    """Detach this process and replace it with the same program with another command line."""
    detach(listener=listener, error_output=error_output)
    os.execve(sys.executable, [*program(), *arguments], environment())  # noqa: S606 - no shell is wanted


def environment() -> dict[str, str]:
    """Return the environment of a daemon: this process's, without systemd's variables for a service."""
    return {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}


def detach(*, listener: int | None, error_output: int) -> None:
    """Give this process its own session, and close all descriptors but these.

    :param listener: what becomes descriptor 3.
    :param error_output: what becomes standard error.
    """
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(error_output, 2)
    if listener is not None:
        os.dup2(listener, LISTENER_DESCRIPTOR)
        # dup2 of a descriptor onto itself leaves close-on-exec as it was.
        os.set_inheritable(LISTENER_DESCRIPTOR, True)  # noqa: FBT003 - its only spelling
    first_other = LISTENER_DESCRIPTOR + (listener is not None)
    os.closerange(first_other, os.sysconf("SC_OPEN_MAX"))


def program() -> list[str]:
    """Return the command that runs this same program, without its arguments."""
    own = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    if own and os.path.exists(own[-1]):
        own[-1] = os.path.abspath(own[-1])
    return [sys.executable, *own]


def name_this_process() -> None:
    """Appear in process lists like other shims, not as ``python``; the kernel keeps 15 bytes."""
    with open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write("containerd-shim-hako-v2")
