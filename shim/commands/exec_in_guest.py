"""``hako exec``: a root shell in the guest of a sandbox, where the operator allows that."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import signal
import struct
import termios
import tty
from typing import TYPE_CHECKING

from proto.hako import management_pb2 as api
from shim.commands import shims
from shim.errors import ShimError
from shim.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from typing import Any

    from shim.host.state_directory import StartRecord

_READ_BYTES = 64 << 10
_STDIN, _STDOUT, _STDERR = 0, 1, 2
_RUNS_TIMEOUT_S = 5.0  # shims of older releases say nothing at first


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser(
        "exec",
        help="run a shell, or another command, as root in the guest of a sandbox",
        description="Run a command as root in the guest of a sandbox, outside of its containers. The "
        "configuration must allow it with [guest] debug. The exit status is the command's.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON: output and exit status")
    shims.add_sandbox_to(parser)
    parser.add_argument(
        "argv", nargs=argparse.REMAINDER, metavar="COMMAND", help="what to run, with its arguments (a shell)"
    )


def run(chosen: argparse.Namespace) -> int:
    """Run it, on a terminal if there is one.

    :param chosen: the command line.
    :returns: the command's exit status.
    :raises Refusal: if there is no such sandbox, or the command cannot be run.
    """
    record = shims.one(chosen)
    argv = chosen.argv[1:] if chosen.argv[:1] == ["--"] else chosen.argv
    session = _Session(argv, has_terminal=not chosen.json and os.isatty(_STDIN), keeps=chosen.json)
    with _raw() if session.has_terminal else contextlib.nullcontext():
        try:
            status = asyncio.run(session.run(record))
        except ShimError as error:
            failure = Refusal(f"exec: {record.id}: {' '.join(str(error).removeprefix('exec: ').split())}")
        else:
            if chosen.json:
                output, errors = (text.decode(errors="replace") for text in session.kept.values())
                print(json.dumps({"exit_status": status, "stdout": output, "stderr": errors}, indent=2))
            return status
    raise failure


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    """Give every key to the guest for a block."""
    before = termios.tcgetattr(_STDIN)
    tty.setraw(_STDIN, termios.TCSADRAIN)  # what has been typed already counts
    try:
        yield
    finally:
        termios.tcsetattr(_STDIN, termios.TCSADRAIN, before)


class _Session:
    """One command in a guest and this process's standard streams.

    :param argv: the command; empty for a shell.
    :param has_terminal: whether it gets a terminal like this process's.
    :param keeps: whether its output is kept rather than passed on.
    """

    def __init__(self, argv: list[str], *, has_terminal: bool, keeps: bool) -> None:
        self.has_terminal = has_terminal
        self.kept = {_STDOUT: b"", _STDERR: b""}
        self._argv = argv
        self._keeps = keeps
        self._said: asyncio.Queue[api.ExecRequest | None] = asyncio.Queue(1)
        self._resized = asyncio.Event()
        self._runs = asyncio.Event()

    async def run(self, record: StartRecord) -> int:
        """Run it.

        :param record: how the sandbox was started.
        :returns: its exit status.
        :raises ShimError: if it cannot be run.
        """
        failure = ShimError("the conversation ended before the command; see `hako logs`")
        # A shim that answers here is not stopped; its gRPC server may take longer to come up.
        await shims.ask(record, "LogSources", api.LogSourcesRequest(), api.LogSourcesResponse)
        path = str(shims.state_of(record) / "grpc.sock")
        async with shims.channel_to(path) as channel, asyncio.TaskGroup() as group:
            call = channel.stream_stream(
                f"/{shims.SERVICE}/Exec",
                request_serializer=api.ExecRequest.SerializeToString,
                response_deserializer=api.ExecResponse.FromString,
            )
            tasks = [group.create_task(self._read())]
            if self.has_terminal:
                asyncio.get_running_loop().add_signal_handler(signal.SIGWINCH, self._resized.set)
                tasks.append(group.create_task(self._follow_size()))
            try:
                with shims.errors_of_grpc():
                    async for answer in call(self._requests()):
                        self._runs.set()
                        if answer.WhichOneof("said") == "exit_status":
                            return int(answer.exit_status)
                        self._write(_STDERR if answer.stderr else _STDOUT, answer.stderr or answer.stdout)
            except ShimError as error:
                failure = error
            finally:
                for task in tasks:
                    task.cancel()
        raise failure

    async def _requests(self) -> AsyncIterator[api.ExecRequest]:
        start = api.ExecRequest.Start(args=self._argv, terminal=self.has_terminal)
        if self.has_terminal:
            start.rows, start.columns = _size()
            start.env.append(f"TERM={os.environ.get('TERM', 'linux')}")
        yield api.ExecRequest(start=start)
        # gRPC forgets why a call was refused if the client is sending meanwhile.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RUNS_TIMEOUT_S):
                await self._runs.wait()
        while (said := await self._said.get()) is not None:
            yield said

    async def _read(self) -> None:
        """Pass the standard input on."""
        while data := await _available():
            await self._said.put(api.ExecRequest(stdin=data))
        await self._said.put(api.ExecRequest(end_of_stdin=True))

    async def _follow_size(self) -> None:
        while True:
            await self._resized.wait()
            self._resized.clear()
            rows, columns = _size()
            size = api.ExecRequest.Size(rows=rows, columns=columns)
            await self._said.put(api.ExecRequest(size=size))

    def _write(self, descriptor: int, data: bytes) -> None:
        if self._keeps:
            self.kept[descriptor] += data
            return
        while data:
            data = data[os.write(descriptor, data) :]


def _size() -> tuple[int, int]:
    rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(_STDIN, termios.TIOCGWINSZ, bytes(8)))
    return rows, columns


def _once(ready: asyncio.Future[None]) -> Callable[[], None]:
    """Make what sets a future the first time that it is called."""

    def call() -> None:
        if not ready.done():
            ready.set_result(None)

    return call


async def _available() -> bytes:
    """Wait for input; empty at its end."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    try:
        loop.add_reader(_STDIN, _once(ready))
    except PermissionError:  # a file, which never lets wait
        return os.read(_STDIN, _READ_BYTES)
    try:
        await ready
    finally:
        loop.remove_reader(_STDIN)
    return os.read(_STDIN, _READ_BYTES)
