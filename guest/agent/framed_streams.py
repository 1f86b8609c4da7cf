"""Long streams: a standard stream moves from requests to its own vsock connection.

The host begins a connection with a frame that names the stream, and the agent accepts it with an empty one.
The bytes between travel in frames. An empty frame is the end, and the side that reads it closes first. So the
channel needs neither half-closed connections nor delivery after a close.
"""

from __future__ import annotations

import _thread
import os
import select
import struct

from guest.agent.console import log
from guest.agent.errors import AgentError
from guest.agent.ttrpc import Call
from guest.agent.vsock import Listener
from proto.extensions import FRAMED_STREAM_PORT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from guest.agent.container import Container
    from guest.agent.process import Process
    from guest.agent.streams import ProcessOutput

_WORD = struct.Struct(">I")
_EMPTY = _WORD.pack(0)
_MAX_NAME = 1 << 12
_NAME_TIMEOUT_MS = 5000
_BUFFER_BYTES = 1 << 18
"""The size of a frame with its header: four of vsock's largest packets, so that none is nearly empty."""


def listen(find: Callable[[str], Container], command_line: str) -> None:
    """Accept connections, each served by a thread.

    :param find: finds a container by its id.
    :param command_line: the kernel's.
    :raises OSError: if the port is taken.
    """
    _thread.start_new_thread(_accept, (Listener(FRAMED_STREAM_PORT, command_line), find))


def _accept(listener: Listener, find: Callable[[str], Container]) -> None:
    while True:
        fd, _port = listener.accept()
        _thread.start_new_thread(serve, (fd, find))


def serve(fd: int, find: Callable[[str], Container]) -> None:
    """Carry the stream that a connection names, to its end.

    :param fd: the connection, owned from now on.
    :param find: finds a container by its id, or raises AgentError.
    """
    try:
        name, container_id, exec_id = _read_name(fd)
        container = find(container_id)
        process = container.process(exec_id)
        streams = process.streams
        output = {"stdout": streams.stdout, "stderr": streams.stderr}.get(name)
        _write(fd, memoryview(_EMPTY))
        if name == "stdin":
            _carry_input(fd, process)
        elif output is not None:
            _carry_output(fd, output, process, ended=lambda: container.forget_if_done(exec_id))
    except (AgentError, OSError, ValueError) as error:
        log(f"stdio: a connection ends: {error}")
    finally:
        os.close(fd)


def _read_name(fd: int) -> list[str]:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(_NAME_TIMEOUT_MS):
        raise TimeoutError("the host does not say which stream it is for")
    size = _read_word(fd)
    if size > _MAX_NAME:
        raise ValueError(f"a name of {size} bytes")
    names = _read(fd, size).decode().split("\0")
    if len(names) != 3 or names[0] not in {"stdin", "stdout", "stderr"}:
        raise ValueError(f"{names} names no stream")
    return names


def _read_word(fd: int) -> int:
    word: int = _WORD.unpack(_read(fd, _WORD.size))[0]
    return word


def _read(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = os.read(fd, size - len(data))
        if not part:
            raise BrokenPipeError("the host has closed it")
        data += part
    return data


def _write(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]


def _carry_output(fd: int, output: ProcessOutput, process: Process, *, ended: Callable[[], None]) -> None:
    call = Call(fd, 0)  # the host sends no more bytes, so readable means closed
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    room = buffer[_WORD.size :]
    while size := output.read_into(room, process.end, call):
        _WORD.pack_into(buffer, 0, size)
        _write(fd, buffer[: _WORD.size + size])
    ended()
    _write(fd, memoryview(_EMPTY))
    while os.read(fd, 1):  # until the host has closed it
        pass


def _carry_input(fd: int, process: Process) -> None:
    call = Call(process.end.fd, 0)  # stop waiting once the process has ended
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    try:
        while left := _read_word(fd):
            while left:
                size = os.readv(fd, [buffer[:left]])
                if not size:
                    raise BrokenPipeError("the host has closed it amid a frame")
                process.streams.stdin.write(buffer[:size], process.end, call)
                left -= size
    finally:
        process.end_input()
