"""The gRPC server: the same dispatch table on a unix socket, with health and reflection for tools.

No other module imports grpc. Importing it starts no thread: a process may import this module, fork, and serve
in the child.
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, NoReturn

# After a fork, grpc would start its threads again in this process. The launcher of confined processes forks
# in a state in which no thread can start, and grpc then ends the process. Its forks only execute programs.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shim.errors import Internal, ShimError
from shim.override import override
from shim.transport.dispatch import Dispatch, status_text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from shim.transport.dispatch import Heed, Stream

MAX_MESSAGE = 4 << 20
"""Longest message in either direction, in bytes."""

GRACE_S = 1.0
"""How many seconds calls in flight have to finish when the server stops."""

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    # By default, grpc cancels some calls that wait behind a thousand others; here, a burst is
    # legitimate.
    ("grpc.server.max_pending_requests", 1 << 20),
    ("grpc.server.max_pending_requests_hard_limit", 1 << 20),
]

_Context = grpc.aio.ServicerContext[bytes, bytes]


class _TableHandler(grpc.GenericRpcHandler):
    """Answers every path with the dispatch table, which refuses unknown paths."""

    def __init__(self, dispatch: Dispatch, heed: Heed | None) -> None:
        self._dispatch = dispatch
        self._heed = heed

    @override
    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        service, _, method = details.method.removeprefix("/").partition("/")
        stream = self._dispatch.find_stream(service, method)
        if stream is not None:
            # A client that sends only one message looks the same on the wire.
            return grpc.stream_stream_rpc_method_handler(partial(self._converse, stream))
        return grpc.unary_unary_rpc_method_handler(partial(self._call, service, method))

    async def _call(self, service: str, method: str, payload: bytes, context: _Context) -> bytes:
        if self._heed is not None:
            given = context.invocation_metadata() or ()
            headers = [(key, value) for key, value in given if isinstance(value, str)]
            self._heed(method, payload, headers)
        try:
            # grpc itself cancels the handler at the client's deadline.
            return await self._dispatch.find(service, method).answer(payload, timeout_s=None)
        except ShimError as error:
            await _abort(context, error)

    async def _converse(
        self, stream: Stream, payloads: AsyncIterator[bytes], context: _Context
    ) -> AsyncIterator[bytes]:
        try:
            async for answer in stream.answer(payloads):
                yield answer
        except ShimError as error:
            await _abort(context, error)


async def _abort(context: _Context, error: ShimError) -> NoReturn:
    await context.abort(_STATUS_CODES[error.code], status_text(error))


@asynccontextmanager
async def serve_grpc(
    dispatch: Dispatch, path: Path, *, heed: Heed | None = None
) -> AsyncIterator[grpc.aio.Server]:
    """Serve a dispatch table, health and reflection on a unix socket of mode 0600 while the context lasts.

    At its end, calls in flight have :data:`GRACE_S` to finish, and the socket is removed.

    :param dispatch: the methods offered.
    :param path: where to listen; its directory exists, and a stale socket there is replaced.
    :param heed: told the method, the request and the headers of each request before it is served.
    :raises Internal: if the path cannot be listened on.
    """
    server = grpc.aio.server(options=_OPTIONS)
    status = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    offered = [*dispatch.service_names, health.SERVICE_NAME]
    for name in offered:
        await status.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection([*offered, reflection.SERVICE_NAME], server)
    server.add_generic_rpc_handlers((_TableHandler(dispatch, heed),))
    _bind(server, path)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(GRACE_S)
        _remove(path)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _bind(server: grpc.aio.Server, path: Path) -> None:
    # grpc creates the socket inside this call, with the mode that the umask leaves.
    umask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise Internal(
            f"listen: {path}: {error}; see whether its directory exists and the path is short"
        ) from error
    finally:
        os.umask(umask)
