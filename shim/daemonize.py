"""Leave a daemon behind that holds nothing of ``start`` but the socket."""

from __future__ import annotations

import contextlib
import os
import sys

from shim import kernel
from shim.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: Where the daemon finds its listening socket.
LISTENER_DESCRIPTOR = 3
_MAX_OOM_SCORE_ADJ = 1000


class Attributes(Record):
    """What a daemon is given by whoever starts it."""

    #: A little more likely to be killed than containerd, as containerd's shim contract asks.
    oom_score_adj: int | None
    core_scheduling: bool

    @classmethod
    def wanted(cls) -> Attributes:
        """Find out what the caller of this process wants."""
        try:
            with open(f"/proc/{os.getppid()}/oom_score_adj", encoding="ascii") as file:
                score = min(int(file.read()) + 1, _MAX_OOM_SCORE_ADJ)
        except OSError:
            score = None
        return cls(oom_score_adj=score, core_scheduling=bool(os.environ.get("SCHED_CORE")))

    def take(self) -> None:
        """Set them on this process; a privilege or kernel feature that is missing is done without."""
        if self.oom_score_adj is not None:
            with (
                contextlib.suppress(OSError),
                open("/proc/self/oom_score_adj", "w", encoding="ascii") as file,
            ):
                file.write(str(self.oom_score_adj))
        if self.core_scheduling:
            with contextlib.suppress(OSError):
                kernel.create_core_scheduling_cookie()


def open_log(bundle: str) -> int:
    """Open the FIFO that containerd copies to its own log, so that writing never blocks or fails for good.

    Opened for reading too, it has a reader even while containerd is down; what does not fit is dropped.

    :param bundle: the bundle with the FIFO ``log``.
    :returns: a descriptor; of the null device if there is no FIFO.
    """
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(os.path.join(bundle, "log"), flags | os.O_NONBLOCK | os.O_APPEND)
    except OSError:
        return os.open(os.devnull, flags)


def spawn(
    arguments: list[str],
    *,
    listener: int | None,
    error_output: int,
    before_exec: Callable[[int], None],
) -> None:
    """Run this same program again, detached: own session, no input, no output, no descriptor of ours.

    :param arguments: the daemon's command line, without the program.
    :param listener: what becomes descriptor 3.
    :param error_output: what becomes standard error.
    :param before_exec: called with the daemon's pid while it still waits. If this process dies before
        it returns, the daemon dies too, so no daemon runs that ``before_exec`` has not recorded.
    :raises OSError: if there can be no more processes, or from ``before_exec``.
    """
    gate, opener = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(opener)
            if os.read(gate, 1):
                _become(arguments, listener=listener, error_output=error_output)
        finally:
            os._exit(127)
    try:
        os.close(gate)
        before_exec(pid)
        os.write(opener, b"\0")
    finally:
        os.close(opener)


def _become(arguments: list[str], *, listener: int | None, error_output: int) -> None:
    detach(listener=listener, error_output=error_output)
    os.execve(sys.executable, [*program(), *arguments], environment())  # noqa: S606 - no shell is wanted


def environment() -> dict[str, str]:
    """Return the environment of a daemon: this process's, but for what systemd says to its own service."""
    return {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}


def detach(*, listener: int | None, error_output: int) -> None:
    """Give this process a session of its own and leave it no descriptors but these.

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
    """Show up in process lists as other shims do, not as ``python``; the kernel keeps 15 bytes."""
    with open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write("containerd-shim-hako-v2")
