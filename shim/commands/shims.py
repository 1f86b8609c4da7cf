"""Asks the shims of this host's sandboxes, all at once and with a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from google.protobuf.message import Message

from hypervisor import printable
from proto.hako import management_pb2 as api
from shim import config
from shim.errors import DeadlineExceeded, ShimError, Unavailable, from_code
from shim.host import host_process, ledger, state_directory
from shim.refusal import Refusal
from shim.transport.ttrpc_client import TtrpcClient

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable

    import grpc.aio

    from shim.config import Config
    from shim.host.state_directory import StartRecord

SERVICE = "hako.management.v1.Management"
TIMEOUT_S = 5.0
"""How long a shim may take to answer a command: on a busy host it may take seconds. All are asked at once."""

_RETRY_S = 0.05
_REASON_LOST = "Internal error from Core"  # of gRPC, if the other side ends a call during a write

_MESSAGE = 200  # characters of an error
_MOST_NAMED = 5
_M = TypeVar("_M", bound=Message)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Answer(Generic[_T]):
    """The outcome of a request to one shim.

    :param record: how the shim was started.
    :param value: the answer; none if there is none.
    :param problem: why there is no answer, in one line.
    """

    record: StartRecord
    value: _T | None = None
    problem: str = ""


def add_config_to(parser: argparse.ArgumentParser) -> None:
    """Add the option that names another configuration."""
    parser.add_argument("--config", default="", metavar="PATH", help="a configuration other than the host's")


def add_sandbox_to(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name one sandbox."""
    parser.add_argument("id", metavar="ID", help="the id of a sandbox: of a pod, or of a single container")
    add_namespace_to(parser)
    add_config_to(parser)


def add_namespace_to(parser: argparse.ArgumentParser) -> None:
    """Add the option that chooses the sandboxes of one namespace."""
    parser.add_argument("--namespace", default="*", metavar="NAME", help="containerd's namespace (any)")


def settings_of(chosen: argparse.Namespace) -> Config:
    """Read the configuration that a command line names.

    :raises Refusal: if it is wrong.
    """
    environment = {config.ENVIRONMENT_VARIABLE: chosen.config} if chosen.config else os.environ
    return config.parse(config.locate(environment))


def records(state_dir: str, namespace: str = "*") -> list[StartRecord]:
    """List the start records of this host's sandboxes, oldest first.

    :param state_dir: the directory of their state.
    :param namespace: containerd's namespace; ``*`` for any.
    :raises Refusal: if that cannot be read.
    """
    try:
        directories = list(Path(state_dir).iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Refusal(f"sandboxes: {state_dir}: {error.strerror}; run this as root") from error
    found = []
    for directory in directories:
        try:
            record = state_directory.read_record(str(directory))
            if namespace in {"*", record.namespace}:
                found.append(record)
        except PermissionError as error:
            raise Refusal(f"sandboxes: {directory}: {error.strerror}; run this as root") from error
        except (OSError, ValueError, TypeError):
            continue  # a starting sandbox has no record yet, and an ending one has lost it
    return sorted(found, key=lambda record: (record.started_at, record.id))


def one(chosen: argparse.Namespace) -> StartRecord:
    """Find the sandbox that a command line names, by its id or a unique prefix of it.

    :raises Refusal: if there is none, or more than one.
    """
    command, namespace, wanted = chosen.command, chosen.namespace, chosen.id
    known = records(settings_of(chosen).shim.state_dir, namespace)
    found = [each for each in known if each.id == wanted]
    found = found or [each for each in known if wanted and each.id.startswith(wanted)]
    if not found:
        raise Refusal(f"{command}: {printable(wanted, limit=_MESSAGE)}: no such sandbox; see `hako ps`")
    if len(found) > 1:
        names = ", ".join(f"{each.id} in {each.namespace}" for each in found[:_MOST_NAMED])
        names += f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        raise Refusal(
            f"{command}: {wanted}: more than one sandbox: {names}; give the whole id and --namespace"
        )
    return found[0]


async def ask(
    record: StartRecord,
    method: str,
    request: Message,
    reply: type[_M],
    *,
    timeout_s: float = TIMEOUT_S,
    service: str = SERVICE,
) -> _M:
    """Ask a shim over the socket that containerd uses.

    :param record: how it was started.
    :param method: a method of the service that is not a stream.
    :param timeout_s: how long the answer may take.
    :param service: the full name of the service; by default, the management API.
    :raises DeadlineExceeded: if it does not answer in time.
    :raises Unavailable: if it is gone, or its process is stopped.
    :raises ShimError: if it answers with one.
    """
    refuse_stopped(record)
    try:
        async with asyncio.timeout(timeout_s):
            connection = await _connect(record)
            if record.protocol == "grpc":
                connection.close()  # a channel would try again, and not say why there is none
                path = f"/{service}/{method}"
                return await _ask_over_grpc(record, path, request, reply, timeout_s=timeout_s)
            client = await TtrpcClient.over(connection)
            try:
                return await client.call(service, method, request, reply, timeout_s=timeout_s)
            finally:
                await client.aclose()
    except (TimeoutError, DeadlineExceeded) as error:
        refuse_stopped(record)
        raise DeadlineExceeded(
            f"its shim did not answer within {timeout_s:g} s; it is busy, or waits for the host"
        ) from error


def refuse_stopped(record: StartRecord) -> None:
    """Do not wait for a shim that cannot answer.

    :param record: how it was started.
    :raises Unavailable: if its process is stopped, by a signal or a debugger.
    """
    try:
        known = ledger.shims_in(record.state_directory)
    except OSError:  # it is gone, which the connection will tell
        return
    for each in known:
        if host_process.is_stopped(each):
            raise Unavailable(f"its shim is stopped; `kill -CONT {each.pid}` lets it go on")


async def _connect(record: StartRecord) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.setblocking(False)  # noqa: FBT003 - its only spelling
    try:
        while True:
            try:
                connection.connect(record.socket_path)  # which never waits: unix(7)
            except BlockingIOError:  # as many as the kernel allows wait to be accepted, and no event tells
                await asyncio.sleep(_RETRY_S)
            else:
                return connection
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError):
            raise Unavailable(_why_nobody_listens(record, error)) from error
        raise


def _why_nobody_listens(record: StartRecord, error: OSError) -> str:
    try:
        known = ledger.shims_in(record.state_directory)
    except FileNotFoundError:
        return "its sandbox has ended"
    if not known or any(map(host_process.is_running, known)):
        return "its shim is starting; ask again"
    return f"its shim is gone: {error.strerror}; containerd removes what it left, once it runs"


async def _ask_over_grpc(
    record: StartRecord, path: str, request: Message, reply: type[_M], *, timeout_s: float
) -> _M:
    async with channel_to(record.socket_path) as channel:
        call: Callable[..., Awaitable[_M]] = channel.unary_unary(
            path,
            request_serializer=type(request).SerializeToString,
            response_deserializer=reply.FromString,
        )
        with errors_of_grpc(timeout_s):
            # It listens, as ``ask`` has seen, but a channel fails if the kernel lets no more callers connect.
            return await call(request, timeout=timeout_s, wait_for_ready=True)


@contextlib.asynccontextmanager
async def channel_to(path: str) -> AsyncIterator[grpc.aio.Channel]:
    """Connect to a gRPC socket for a block.

    :param path: the socket.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # this module reports its messages better
    import grpc.aio  # noqa: PLC0415 - most commands do not need it

    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        yield channel


@contextlib.contextmanager
def errors_of_grpc(timeout_s: float = TIMEOUT_S) -> Any:
    """Translate gRPC errors in a block.

    :param timeout_s: the deadline of the calls in it.
    :raises ShimError: for an error of gRPC.
    """
    import grpc.aio  # noqa: PLC0415 - as above

    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise DeadlineExceeded(f"its shim did not answer within {timeout_s:g} s") from error
        if error.details() == _REASON_LOST:
            raise Unavailable("its shim has ended the call; see `hako logs`") from error
        raise from_code(error.code().value[0], error.details() or "") from error


async def ask_all(
    asked: Iterable[StartRecord], question: Callable[[StartRecord], Awaitable[_T]]
) -> list[Answer[_T]]:
    """Ask many shims at once.

    :param asked: which.
    :param question: asks one of them, with a deadline.
    :returns: for each, in the same order, an answer or why there is none.
    """

    async def answer(record: StartRecord) -> Answer[_T]:
        try:
            return Answer(record, await question(record))
        except ShimError as error:
            return Answer(record, problem=printable(str(error), limit=_MESSAGE))

    return await asyncio.gather(*(answer(each) for each in asked))


def still_there(answers: Iterable[Answer[_T]]) -> list[Answer[_T]]:
    """Leave out the sandboxes that had ended before they could be asked."""
    return [each for each in answers if each.value is not None or state_of(each.record).exists()]


async def stream_events(
    record: StartRecord, *, follow: bool, timeout_s: float | None
) -> AsyncGenerator[api.Event, None]:
    """Yield the events of a sandbox; see :func:`errors_of_grpc`.

    :param follow: continue with each event as it happens.
    :param timeout_s: how long that may take; None for no limit.
    """
    async with channel_to(str(state_of(record) / "grpc.sock")) as channel:
        call = channel.unary_stream(
            f"/{SERVICE}/Events",
            request_serializer=api.EventsRequest.SerializeToString,
            response_deserializer=api.Event.FromString,
        )
        async for event in call(api.EventsRequest(follow=follow), timeout=timeout_s):
            yield event


def state_of(record: StartRecord) -> Path:
    """Return the state directory of a sandbox."""
    return Path(record.state_directory)
