"""A process's standard streams on the agent's side: three pipes, or one terminal."""

from __future__ import annotations

import _thread
import errno
import fcntl
import os
import struct
import time

from guest.agent.errors import AgentError, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from guest.agent.reaper import Exit
    from guest.agent.ttrpc import Call

    _T = TypeVar("_T", int, bytes)

DRAIN_WINDOW_S = 0.5
"""How long output is read after a process's end while another process still holds its pipe."""
MAX_READ = 1 << 20
_PIPE_SIZE = 1 << 20
_F_SETPIPE_SZ = 1031
_TIOCSWINSZ = 0x5414


class ProcessOutput:
    """The end from which a process's output is read.

    :param fd: a pipe's or terminal's descriptor, owned from now on.
    """

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._lock = _thread.allocate_lock()
        self._readers = 0
        self._closing = False
        self.ended = False

    def read(self, size: int, end: Exit, call: Call) -> bytes:
        """Wait for the first byte, and read everything that is available.

        Output written before the process ended is never lost: only silence ends the stream early, once the
        drain window after the end has passed.

        :param size: the most to return.
        :param end: the end of the process.
        :param call: the request being served.
        :returns: output; empty at the end of the stream.
        :raises Cancelled: if the caller is gone.
        """
        return self._take(lambda: os.read(self._fd, min(size, MAX_READ)), end, call) or b""

    def read_into(self, buffer: memoryview, end: Exit, call: Call) -> int:
        """As :meth:`read`, into a buffer.

        :param buffer: where to put the output.
        :returns: the number of bytes; 0 at the end of the stream.
        """
        return self._take(lambda: os.readv(self._fd, [buffer]), end, call) or 0

    def _take(self, attempt: Callable[[], _T], end: Exit, call: Call) -> _T | None:
        with self._lock:
            if self._closing or self.ended:
                return None
            self._readers += 1
        try:
            taken = self._next(attempt, end, call)
            if not taken:
                self.ended = True
            return taken
        finally:
            with self._lock:
                self._readers -= 1
                last = self._closing and not self._readers
            if last:
                os.close(self._fd)

    def _next(self, attempt: Callable[[], _T], end: Exit, call: Call) -> _T | None:
        while True:
            try:
                return attempt()
            except BlockingIOError:
                pass
            except OSError as error:
                # A terminal whose other end is closed.
                if error.errno == errno.EIO:
                    return None
                raise
            if end.status is None:
                call.wait(readable=(self._fd, end.fd))
            else:
                left = max(0.0, end.at + DRAIN_WINDOW_S - time.monotonic())
                if not call.wait(readable=(self._fd,), timeout_s=left):
                    return None

    def close(self) -> None:
        """Close the descriptor once the last reader has left."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            idle = not self._readers
        if idle:
            os.close(self._fd)


class ProcessInput:
    """The end to which a process's input is written.

    :param fd: a pipe's or terminal's descriptor, owned from now on.
    """

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._lock = _thread.allocate_lock()

    def write(self, data: bytes | memoryview, end: Exit, call: Call) -> None:
        """Write everything, waiting while the process does not read.

        :param data: the input.
        :param end: the end of the process.
        :param call: the request being served.
        :raises AgentError: if the input is closed or the process has ended.
        :raises Cancelled: if the caller is gone.
        """
        with self._lock:
            if self._fd < 0:
                raise AgentError("write: stdin is closed")
            view = memoryview(data)
            while view:
                try:
                    view = view[os.write(self._fd, view) :]
                except BlockingIOError:
                    call.wait(readable=(end.fd,), writable=(self._fd,))
                    if end.status is not None:
                        raise AgentError("write: the process has ended") from None

    def close(self) -> None:
        """Close the input, after a write in progress."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


class ProcessStreams:
    """The streams of one process.

    :param stdin: its input.
    :param stdout: its output; of a terminal, both of its outputs.
    :param stderr: its error output; None on a terminal.
    :param terminal: the terminal's descriptor, or -1; owned from now on.
    """

    def __init__(
        self, *, stdin: ProcessInput, stdout: ProcessOutput, stderr: ProcessOutput | None, terminal: int = -1
    ) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self._terminal = terminal

    @property
    def is_terminal(self) -> bool:
        """Whether the process has a terminal."""
        return self.stderr is None

    @property
    def ended(self) -> bool:
        """Whether every output has been read to its end."""
        return self.stdout.ended and (self.stderr is None or self.stderr.ended)

    def resize(self, rows: int, columns: int) -> None:
        """Set the terminal's size.

        :param rows: its height.
        :param columns: its width.
        :raises Unavailable: if the process has no terminal.
        """
        if self._terminal < 0:
            raise Unavailable("no tty")
        fcntl.ioctl(self._terminal, _TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def close(self) -> None:
        """Close all descriptors."""
        self.stdin.close()
        self.stdout.close()
        if self.stderr is not None:
            self.stderr.close()
        if self._terminal >= 0:
            os.close(self._terminal)
            self._terminal = -1


class Pipes:
    """Three new pipes for a process that is about to start; until then, this holds both of their ends."""

    def __init__(self) -> None:
        self._stdin, self._stdout, self._stderr = os.pipe(), os.pipe(), os.pipe()
        for pair in (self._stdin, self._stdout, self._stderr):
            fcntl.fcntl(pair[1], _F_SETPIPE_SZ, _PIPE_SIZE)

    @property
    def child(self) -> tuple[int, int, int]:
        """The process's ends: 0, 1 and 2."""
        return self._stdin[0], self._stdout[1], self._stderr[1]

    def close_child(self) -> None:
        """Close this process's copies of the ends that the child has inherited."""
        for fd in self.child:
            os.close(fd)

    def streams(self) -> ProcessStreams:
        """Hand the agent's ends over.

        :returns: the streams that own them.
        """
        return ProcessStreams(
            stdin=ProcessInput(self._stdin[1]),
            stdout=ProcessOutput(self._stdout[0]),
            stderr=ProcessOutput(self._stderr[0]),
        )


def of_terminal(fd: int) -> ProcessStreams:
    """Make the streams of a process on a terminal.

    :param fd: the terminal's controlling side; owned from now on.
    :returns: the streams.
    """
    return ProcessStreams(
        stdin=ProcessInput(os.dup(fd)), stdout=ProcessOutput(os.dup(fd)), stderr=None, terminal=fd
    )
