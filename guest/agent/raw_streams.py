"""Raw streams: a vsock connection for each standard stream of a process, instead of requests.

The host connects to one port before it creates the process, and names its connections by the ports they
come from (Kata's passthrough-fd streams; reference, section 2.7). Off unless the kernel's command line has
the port.
"""

from __future__ import annotations

import _thread
import os

from guest.agent.console import log
from guest.agent.errors import AgentError, Cancelled
from guest.agent.ttrpc import Call
from guest.agent.vsock import Listener
from proto.extensions import RAW_STREAMS_PARAMETER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from guest.agent.process import Process
    from guest.agent.streams import ProcessOutput
    from guest.agent.wire import Message

_CLAIM_TIMEOUT_S = 0.3
"""How much later than the request the connection may arrive; Kata's agent has the same limit."""
_READ_BYTES = 1 << 16

_lock = _thread.allocate_lock()
_arrived: dict[int, int] = {}
_awaited: dict[int, _thread.LockType] = {}


def listen(command_line: str) -> None:
    """Accept connections if the host has asked for raw streams.

    :param command_line: the kernel's.
    :raises OSError: if the port is taken.
    :raises ValueError: if the port is not a number.
    """
    for parameter in command_line.split():
        if parameter.startswith(RAW_STREAMS_PARAMETER):
            listener = Listener(int(parameter.removeprefix(RAW_STREAMS_PARAMETER)), command_line)
            _thread.start_new_thread(_accept, (listener,))


def _accept(listener: Listener) -> None:
    while True:
        fd, port = listener.accept()
        arrive(port, fd)


def arrive(port: int, fd: int) -> None:
    """Keep a connection until a process claims it.

    :param port: the port it comes from.
    :param fd: its descriptor, owned from now on.
    """
    with _lock:
        _arrived[port] = fd
        gate = _awaited.pop(port, None)
    if gate is not None:
        gate.release()


def claim(port: int) -> int:
    """Take a connection.

    :param port: the port it comes from.
    :returns: its descriptor, the caller's to close.
    :raises AgentError: if there is none.
    """
    with _lock:
        if port in _arrived:
            return _arrived.pop(port)
        gate = _awaited[port] = _thread.allocate_lock()
        gate.acquire()
    gate.acquire(timeout=_CLAIM_TIMEOUT_S)
    with _lock:
        _awaited.pop(port, None)
        if port in _arrived:
            return _arrived.pop(port)
    raise AgentError(f"stdio: port {port}: no connection comes from it; connect before the request")


class Claims:
    """The connections that one request names; unclaimed ones are closed in the end.

    :param request: one with ``stdin_port``, ``stdout_port`` and ``stderr_port``; 0 stands for none.
    :raises AgentError: if one of them has not come.
    """

    def __init__(self, request: Message) -> None:
        self._fds: dict[str, int] = {}
        try:
            for name in ("stdin", "stdout", "stderr"):
                port = getattr(request, f"{name}_port")
                if port:
                    self._fds[name] = claim(port)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._close()

    def _close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def attach(self, process: Process, *, ended: Callable[[], None]) -> None:
        """Carry a process's streams over the connections, each in its own thread.

        :param process: the process.
        :param ended: called whenever an output is at its end.
        """
        outputs = {"stdout": process.streams.stdout, "stderr": process.streams.stderr}
        for name, output in outputs.items():
            if name in self._fds and output is not None:
                _thread.start_new_thread(_carry_output, (self._fds.pop(name), output, process, ended))
        if "stdin" in self._fds:
            _thread.start_new_thread(_carry_input, (self._fds.pop("stdin"), process))


def _carry_output(fd: int, output: ProcessOutput, process: Process, ended: Callable[[], None]) -> None:
    call = Call(fd, 0)  # the host sends no bytes here, so readable means closed
    try:
        while data := process.read(output, _READ_BYTES, call):
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        ended()
    except (Cancelled, OSError) as error:
        log(f"stdio: the host has left an output: {error}")
    finally:
        os.close(fd)


def _carry_input(fd: int, process: Process) -> None:
    call = Call(process.end.fd, 0)  # stop waiting once the process has ended
    try:
        while data := os.read(fd, _READ_BYTES):
            process.streams.stdin.write(data, process.end, call)
    except (AgentError, Cancelled, OSError):
        pass  # the process has ended or stopped reading: the rest of its input is dropped
    finally:
        os.close(fd)
        process.end_input()
