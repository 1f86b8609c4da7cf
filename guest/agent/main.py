"""Process 1: boot, serve, reap."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what the signal module wraps in enums
import sys
import time

from guest.agent import (
    boot,
    files,
    framed_streams,
    raw_streams,
    reaper,
    serial,
    tables,
    template,
    timeline,
    vsock,
)
from guest.agent.console import log
from guest.agent.errors import NotFound
from guest.agent.sandbox import Sandbox
from guest.agent.service import Service
from guest.agent.ttrpc import Server
from guest.agent.wire import Codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sys import UnraisableHookArgs
    from types import TracebackType


_CONSOLE_DELAY_S = 0.5


def main() -> None:
    """Run the agent; this never returns. Any error here ends process 1, and with it the machine."""
    sys.excepthook = _report_crash
    sys.unraisablehook = _report_lost_thread
    timeline.lap("interpreter")
    boot.prepare()
    timeline.lap("console, cgroups, loopback")
    # Blocked before any thread starts, so that only the loop below receives them.
    _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGCHLD, _signal.SIGIO})
    codec = Codec(tables.MESSAGES)
    sandbox = Sandbox()
    server = Server(codec, methods=tables.METHODS, handlers=Service(sandbox, codec).handlers())
    command_line = files.read("/proc/cmdline")
    vsock.listen(server, command_line)
    serial.listen(server)
    framed_streams.listen(lambda container_id: sandbox.container(container_id, NotFound), command_line)
    raw_streams.listen(command_line)
    timeline.lap("services")
    template.prepare(command_line)
    log("serving")
    while True:
        if _signal.sigwait({_signal.SIGCHLD, _signal.SIGIO}) == _signal.SIGIO:
            serial.port_changed()
        else:
            reaper.collect()


def _report_lost_thread(lost: UnraisableHookArgs) -> None:
    log(f"thread: {lost.exc_type.__name__}: {lost.exc_value}")


def _report_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Put the cause into the kernel log, and so on the console, before the kernel's panic."""
    where = "start"
    while trace is not None:
        where, trace = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}", trace.tb_next
    # The console comes up a moment after its driver is loaded, and does not show earlier output.
    time.sleep(_CONSOLE_DELAY_S)
    log(f"crash at {where}: {kind.__name__}: {error}")
