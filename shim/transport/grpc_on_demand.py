"""A gRPC server that starts with the first connection, because few sandboxes are ever used over gRPC.

Until then, there is only the listening socket. gRPC can only listen on a socket that it made itself, so its
socket then replaces ours, and earlier connections are forwarded to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from shim.errors import Internal, ShimError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from shim.transport.dispatch import Dispatch, Heed

log = logging.getLogger(__name__)

_CHUNK = 1 << 16


@asynccontextmanager
async def serve_grpc_on_demand(
    dispatch: Dispatch, path: Path, *, heed: Heed | None = None
) -> AsyncIterator[None]:
    """Serve like :func:`~shim.transport.grpc_server.serve_grpc`, from the first connection on.

    :param dispatch: the methods offered.
    :param path: where to listen; its directory exists, and a stale socket there is replaced.
    :param heed: told of each request before it is served.
    :raises Internal: if the path cannot be listened on.
    """
    over = asyncio.Event()
    with _listen(path) as listener:
        try:
            async with asyncio.TaskGroup() as group:
                serve = partial(_serve, dispatch, path, listener, over, heed)
                serving = group.create_task(_when_wanted(serve, listener, over), name="gRPC")
                yield
                over.set()
                await asyncio.wait({serving})
        finally:
            _remove(path)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _listen(path: Path) -> socket.socket:
    _remove(path)
    listener = socket.socket(socket.AF_UNIX)
    umask = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)  # noqa: FBT003 - its only spelling
    except OSError as error:
        listener.close()
        raise Internal(f"listen: {path}: {error.strerror or error}; look at its directory") from error
    finally:
        os.umask(umask)
    return listener


async def _when_wanted(
    serve: Callable[[], Awaitable[None]], listener: socket.socket, over: asyncio.Event
) -> None:
    loop = asyncio.get_running_loop()
    wanted = asyncio.Event()
    loop.add_reader(listener, wanted.set)
    try:
        await _first_of(wanted, over)
    finally:
        loop.remove_reader(listener)
    if over.is_set():
        return
    try:
        await serve()
    except ShimError as error:
        log.error("gRPC: %s", error)  # noqa: TRY400 - containerd's own calls do not use this socket


async def _first_of(*events: asyncio.Event) -> None:
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()


async def _serve(
    dispatch: Dispatch, path: Path, listener: socket.socket, over: asyncio.Event, heed: Heed | None
) -> None:
    # Without a zygote, importing grpc takes longer than the rest of the start.
    from shim.transport.grpc_server import serve_grpc  # noqa: PLC0415

    own = path.with_name(f"{path.name}.own")
    # The server ends first, because its last answers must get through.
    async with asyncio.TaskGroup() as relays, serve_grpc(dispatch, own, heed=heed):
        os.rename(own, path)  # noqa: PTH104 - like Path.rename, but known not to block
        with contextlib.suppress(BlockingIOError):
            while True:
                client, _ = listener.accept()
                relays.create_task(_relay(client, path), name="gRPC relay")
        listener.close()
        await over.wait()


async def _relay(client: socket.socket, path: Path) -> None:
    """Copy bytes in both directions until one side ends."""
    with client, socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):
        client.setblocking(False)  # noqa: FBT003 - its only spelling
        server.setblocking(False)  # noqa: FBT003 - as above
        await asyncio.get_running_loop().sock_connect(server, str(path))
        pumps = [asyncio.ensure_future(_pump(*way)) for way in ((client, server), (server, client))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(source: socket.socket, target: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, _CHUNK):
        await loop.sock_sendall(target, data)
