"""A process's standard streams on the host: the FIFOs that containerd's client made.

Rules that avoid deadlock and loss (containerd's client waits for end of file before it deletes):

* an output FIFO is opened only once a reader is there, so a short-lived process loses nothing;
* the shim also keeps a reading end, so that a client that goes away does not break the pipe;
* both ends are closed as soon as the process's output ends, not at Delete;
* stdin is opened when the process starts: a client can only close its input after Create has returned,
  and ctr before 1.7 never does so if it has copied all input by then;
* the shim keeps a writing end of stdin, so that a client that goes away does not cause an end of file.
  CloseIO closes that end, and the process sees end of file once the client's end is closed, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from shim.errors import DeadlineExceeded, InvalidArgument
from shim.host.answering import all_answer
from shim.sandbox.log_driver import SCHEMES, LogDriver

if TYPE_CHECKING:
    from collections.abc import Callable

OPEN_TIMEOUT_S = 30.0  # containerd's runc shim gives a client this long to open its end
_FILE_SCHEME = "file://"
# A terminal must neither be waited for nor become this process's own.
_APPENDING = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
CHUNK_BYTES = 256 * 1024  # the capacity of an input's pipe: larger reads cost less per byte


@dataclass(frozen=True, slots=True)
class Stdio:
    """The stream paths of one process, exactly as the client sent them; empty means that it wants none."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


@dataclass(slots=True)
class HostStreams:
    """Open host ends of one process's streams; -1 means there is none."""

    stdin: int = -1
    stdout: int = -1
    stderr: int = -1
    driver: LogDriver | None = None
    _stdin_over: bool = False
    _kept: dict[str, int] = field(default_factory=dict)

    def close_stdin_writer(self) -> None:
        """Close the shim's own writing end of stdin (CloseIO), now or as soon as it would be opened."""
        self._stdin_over = True
        self._close_kept("stdin")

    def open_stdin(self, path: str) -> None:
        """Open the FIFO or file that the process reads from.

        :raises OSError: if it cannot be opened.
        """
        self.stdin = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        is_fifo = stat.S_ISFIFO(os.fstat(self.stdin).st_mode)
        if is_fifo:
            with contextlib.suppress(OSError):  # the usual capacity serves too
                fcntl.fcntl(self.stdin, fcntl.F_SETPIPE_SZ, CHUNK_BYTES)
        if is_fifo and not self._stdin_over:
            self.keep("stdin", os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))

    def close(self, name: str) -> None:
        """Close one stream: ``stdin``, ``stdout`` or ``stderr``. Closing twice is harmless."""
        descriptor = getattr(self, name)
        if descriptor >= 0:
            setattr(self, name, -1)
            os.close(descriptor)
        self._close_kept(name)

    async def finish(self) -> None:
        """Once both outputs are closed, let a log driver write the rest and end."""
        if self.driver is not None:
            await self.driver.finish()
            self.driver = None

    def close_all(self) -> None:
        """Close every stream that is open."""
        for name in ("stdin", "stdout", "stderr"):
            self.close(name)

    def _close_kept(self, name: str) -> None:
        descriptor = self._kept.pop(name, -1)
        if descriptor >= 0:
            os.close(descriptor)

    def keep(self, name: str, descriptor: int) -> None:
        """Hold the opposite end of a FIFO until its stream is closed."""
        self._kept[name] = descriptor


async def open_host_streams(stdio: Stdio, *, container_id: str, namespace: str) -> HostStreams:
    """Open the host ends of a process's outputs.

    :param container_id: for a log driver.
    :param namespace: containerd's namespace, for a log driver.
    :raises InvalidArgument: if a path has an unknown scheme or cannot be opened.
    :raises DeadlineExceeded: if no client opens its end of an output FIFO in time.
    """
    streams = HostStreams()
    outputs = {"stdout": stdio.stdout}
    if not stdio.terminal:  # with a terminal stderr may name a FIFO that does not exist
        outputs["stderr"] = stdio.stderr
    try:
        named = [plain_path("stdin", stdio.stdin)]
        for name, path in outputs.items():
            is_url = path.startswith((_FILE_SCHEME, *SCHEMES))
            named.append(unquote(urlsplit(path).path) if is_url else plain_path(name, path))
        await all_answer(filter(None, named), phase="stdio")
        if stdio.stdout.startswith(SCHEMES):  # clients give both outputs the same log URI
            outputs = {}
            streams.driver = await LogDriver.start(
                stdio.stdout, container_id=container_id, namespace=namespace
            )
            streams.stdout, streams.stderr = streams.driver.stdout, streams.driver.stderr
            os.set_blocking(streams.stdout, False)
            os.set_blocking(streams.stderr, False)
        for name, path in outputs.items():
            if path.startswith(_FILE_SCHEME):
                await _open_output(streams, name, _make_file(path))
            elif path:
                await _open_output(streams, name, plain_path(name, path))
    except OSError as error:
        streams.close_all()
        raise InvalidArgument(f"stdio: {error.filename}: {error.strerror}") from error
    except ValueError as error:  # not a URL, or a NUL byte behind its escapes
        streams.close_all()
        raise InvalidArgument(f"stdio: {stdio.stdout!r}, {stdio.stderr!r}: {error}") from error
    except (InvalidArgument, DeadlineExceeded, asyncio.CancelledError):
        streams.close_all()
        raise
    return streams


def _make_file(uri: str) -> str:
    """Make the file of a ``file://`` log URI, if there is none, as containerd's runc shim does."""
    path = Path(unquote(urlsplit(uri).path))
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    return str(path)


def plain_path(name: str, path: str) -> str:
    """Strip the scheme of a FIFO's URI.

    :raises InvalidArgument: if the scheme is not ``fifo://``, or the path is impossible.
    """
    if "\0" in path:
        raise InvalidArgument(f"stdio: {name} {path!r}: holds a NUL byte; give another path")
    scheme, separator, rest = path.partition("://")
    if not separator:
        return path
    if scheme == "fifo":
        return rest
    raise InvalidArgument(
        f"stdio: {name} {path}: scheme {scheme!r} is not supported; use a FIFO, file:// or binary://"
    )


async def _open_output(streams: HostStreams, name: str, path: str) -> None:
    if not stat.S_ISFIFO(os.stat(path).st_mode):  # noqa: PTH116 - one stat of a local tmpfs file
        setattr(streams, name, os.open(path, _APPENDING))
        return
    setattr(streams, name, await _open_when_read(path))
    streams.keep(name, os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    os.set_blocking(getattr(streams, name), False)


async def _open_when_read(path: str) -> int:
    """Open a FIFO for writing as soon as a reader has opened it, or waits in its open call."""
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
    opening = asyncio.ensure_future(asyncio.to_thread(os.open, path, os.O_WRONLY | os.O_CLOEXEC))
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            return await asyncio.shield(opening)
    except (TimeoutError, asyncio.CancelledError) as error:
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # releases the thread
        os.close(await opening)
        os.close(reader)
        if isinstance(error, TimeoutError):
            raise DeadlineExceeded(
                f"stdio: {path}: no reader within {OPEN_TIMEOUT_S:.0f} s; the client must open its end"
            ) from error
        raise


async def _ready(descriptor: int, add: Callable[..., None], remove: Callable[[int], bool]) -> None:
    """Wait until the event loop says that ``descriptor`` can be read or written."""
    ready = asyncio.Event()
    add(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        remove(descriptor)


async def read_chunk(descriptor: int) -> bytes:
    """Wait for the first byte, and read all that is available; empty means end of file."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return os.read(descriptor, CHUNK_BYTES)
        except BlockingIOError:
            await _ready(descriptor, loop.add_reader, loop.remove_reader)


async def write_all(
    descriptor: int, data: bytes | memoryview, *, progressed: Callable[[], None] = lambda: None
) -> None:
    """Write all of ``data``, waiting while the pipe is full; a stalled reader stalls only its own stream.

    :param progressed: called whenever a part of it was written.
    :raises OSError: if the file behind the descriptor refuses (a full disk); FIFOs do not.
    """
    loop = asyncio.get_running_loop()
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
            progressed()
        except BlockingIOError:
            await _ready(descriptor, loop.add_writer, loop.remove_writer)
