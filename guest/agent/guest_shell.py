"""Processes in the guest itself, for a person who looks for a fault: they belong to no container.

The image has no shell. One program in the directory of modules on the host is also a shell and its tools.
"""

from __future__ import annotations

import _thread
import fcntl
import os
import struct

from guest.agent import files, reaper, streams
from guest.agent.errors import AgentError, NotFound
from guest.agent.process import Process
from guest.agent.runtime import Started
from proto.extensions import GUEST_ID

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.reaper import Exit
    from guest.agent.streams import ProcessStreams
    from guest.agent.wire import Message

_PROGRAM = "/proc/sys/kernel/modprobe"
_SHELL = "sh"
_TIOCSWINSZ = 0x5414
# A session's leader gets the terminal that it opens.
_ON_TERMINAL = 'exec 0<>"$0" 1>&0 2>&0; exec "$@"'
_ON_PIPES = 'exec "$@"'


class GuestProcesses:
    """The processes that run in the guest itself."""

    id = GUEST_ID
    init = None
    shares_pid = False

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._processes: dict[str, Process] = {}

    def execute(self, exec_id: str, message: Message) -> Process:
        """Start a process.

        :param exec_id: its id.
        :param message: grpc.Process.
        :returns: the process.
        :raises AgentError: if the id is taken, or there is no shell.
        """
        program = files.read(_PROGRAM).strip()
        if not files.exists(program):
            raise AgentError("exec: the guest has no shell: its image has no modules on the host; build one")
        command = [*(message.Args or [_SHELL])]
        if message.Env:
            command = ["env", *message.Env, *command]
        with self._lock:
            if exec_id in self._processes:
                raise AgentError(f"exec: {exec_id}: the id exists already; choose another")
            with reaper.Launch() as launch:
                start = _on_terminal if message.Terminal else _on_pipes
                pid, end, its_streams = start(launch, program, command, message)
            process = self._processes[exec_id] = Process(Started(pid, end, its_streams))
        return process

    def process(self, exec_id: str) -> Process:
        """Find a process.

        :param exec_id: its id.
        :returns: the process.
        :raises NotFound: if there is none, or none any more.
        """
        with self._lock:
            process = self._processes.get(exec_id)
        if process is None:
            raise NotFound(f"process: {exec_id}: not in the guest")
        return process

    def forget_if_done(self, exec_id: str) -> None:
        """Forget a process whose status and output have both been taken.

        :param exec_id: its id.
        """
        with self._lock:
            process = self._processes.get(exec_id)
            if process is None or not process.is_done:
                return
            del self._processes[exec_id]
        process.streams.close()


def _on_terminal(
    launch: reaper.Launch, program: str, command: list[str], message: Message
) -> tuple[int, Exit, ProcessStreams]:
    controller, terminal = os.openpty()
    try:
        size = message.ConsoleSize
        if size is not None:
            fcntl.ioctl(terminal, _TIOCSWINSZ, struct.pack("HHHH", size.Height, size.Width, 0, 0))
        argv = [_SHELL, "-c", _ON_TERMINAL, os.ttyname(terminal), *command]
        pid, end = launch.spawn(program, argv, (terminal, terminal, terminal))
    except BaseException:
        os.close(controller)
        raise
    finally:
        os.close(terminal)
    return pid, end, streams.of_terminal(controller)


def _on_pipes(
    launch: reaper.Launch, program: str, command: list[str], _message: Message
) -> tuple[int, Exit, ProcessStreams]:
    pipes = streams.Pipes()
    its_streams = pipes.streams()
    try:
        pid, end = launch.spawn(program, [_SHELL, "-c", _ON_PIPES, _SHELL, *command], pipes.child)
    except BaseException:
        its_streams.close()
        raise
    finally:
        pipes.close_child()
    return pid, end, its_streams


PROCESSES = GuestProcesses()
