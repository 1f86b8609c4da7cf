"""Log drivers: ``binary://`` programs that read a process's output from inherited pipes.

The contract is containerd's runtime v2 logging: descriptors 3 and 4 are the read ends of stdout and
stderr, 5 is written to or closed when the driver is ready, and the environment holds the container's
id and namespace and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from shim.errors import DeadlineExceeded, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMES = ("binary://", "binary-v2://")
READY_TIMEOUT_S = 30.0
TERM_TIMEOUT_S = 12.0  # between SIGTERM and SIGKILL, as containerd's runc shim allows
_FIRST_DESCRIPTOR = 3
_ABOVE_TARGETS = 10  # dup2 onto 3 to 5 must not hit a source


@dataclass(frozen=True, slots=True)
class DriverUri:
    """A parsed log URI: the program, its arguments, and whether silence when ready is a failure."""

    path: str
    arguments: tuple[str, ...]
    must_say_ready: bool


def parse_uri(uri: str) -> DriverUri:
    """Read ``binary:///path?key=value&...``: each key and its first value are two arguments.

    :raises InvalidArgument: if it is not a URI, its path is not absolute, or it holds a NUL byte.
    """
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise InvalidArgument(f"log driver: {uri}: {error}") from error
    if "\0" in unquote(uri):
        raise InvalidArgument(f"log driver: {uri}: it holds a NUL byte; leave it out")
    if parts.netloc or not parts.path.startswith("/"):
        raise InvalidArgument(f"log driver: {uri}: the program's path must be absolute")
    first: dict[str, str] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        first.setdefault(key, value)
    arguments: list[str] = []
    for key, value in first.items():
        arguments += [key, value]
    return DriverUri(unquote(parts.path), tuple(arguments), must_say_ready=parts.scheme == "binary-v2")


class LogDriver:
    """A running driver, and the write ends of the pipes it reads.

    :param pid: the driver's process, a child of this one.
    :param stdout: write end for standard output; the receiver closes it.
    :param stderr: write end for standard error; the receiver closes it.
    """

    def __init__(self, pid: int, *, stdout: int, stderr: int) -> None:
        self.stdout = stdout
        self.stderr = stderr
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._exited = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @classmethod
    async def start(cls, uri: str, *, container_id: str, namespace: str) -> LogDriver:
        """Start a driver and wait until it is ready.

        :raises InvalidArgument: if the program cannot be started, or ends before it is ready.
        :raises DeadlineExceeded: if it is not ready in time; it is killed.
        """
        parsed = parse_uri(uri)
        pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
        (out_read, out_write), (err_read, err_write), (ready_read, ready_write) = pipes
        environment = {"CONTAINER_ID": container_id, "CONTAINER_NAMESPACE": namespace}
        try:
            pid = _spawn(parsed, environment, descriptors=[out_read, err_read, ready_write])
        except OSError as error:
            for descriptor in (out_write, err_write, ready_read):
                os.close(descriptor)
            raise InvalidArgument(f"log driver: {parsed.path}: {error.strerror}") from error
        finally:
            for descriptor in (out_read, err_read, ready_write):
                os.close(descriptor)
        driver = cls(pid, stdout=out_write, stderr=err_write)
        try:
            said = await _first_byte(ready_read)
            if parsed.must_say_ready and not said:
                raise InvalidArgument(f"log driver: {parsed.path}: it gave up before it was ready")
        except TimeoutError:
            driver.kill()
            raise DeadlineExceeded(
                f"log driver: {parsed.path}: not ready within {READY_TIMEOUT_S:.0f} s"
            ) from None
        except BaseException:
            driver.kill()
            raise
        finally:
            os.close(ready_read)
        return driver

    def kill(self) -> None:
        """End the driver now and close its pipes."""
        for descriptor in (self.stdout, self.stderr):
            os.close(descriptor)
        self._signal(signal.SIGKILL)

    async def finish(self) -> None:
        """Ask the driver, whose pipes have ended, to flush and exit; kill it if it does not."""
        self._signal(signal.SIGTERM)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TERM_TIMEOUT_S):
                    await self._exited.wait()
        finally:
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if not self._exited.is_set():
            signal.pidfd_send_signal(self._pidfd, number)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        os.waitpid(self._pid, 0)
        self._exited.set()


def _spawn(parsed: DriverUri, environment: dict[str, str], *, descriptors: list[int]) -> int:
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _ABOVE_TARGETS) for descriptor in descriptors]
    try:
        return os.posix_spawn(
            parsed.path,
            [parsed.path, *parsed.arguments],
            environment,
            file_actions=list(_file_actions(high)),
            setsid=True,
        )
    finally:
        for descriptor in high:
            os.close(descriptor)


def _file_actions(high: list[int]) -> Iterator[tuple[int, int, int]]:
    for target, descriptor in enumerate(high, start=_FIRST_DESCRIPTOR):
        yield os.POSIX_SPAWN_DUP2, descriptor, target


async def _first_byte(descriptor: int) -> bytes:
    """Wait for a byte or the end of a pipe.

    :raises TimeoutError: if neither happens in time.
    """
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            await readable.wait()
    finally:
        loop.remove_reader(descriptor)
    return os.read(descriptor, 1)
