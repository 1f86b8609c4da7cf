"""One table of methods for every transport, built from protobuf service descriptors.

A service implementation is an object whose methods are snake_case coroutines that take the request message,
return the response message and raise :class:`~shim.errors.ShimError`. A missing method is unimplemented.
The method of a stream is an asynchronous generator: it takes an iterator over the client's messages and
yields its own. Only gRPC carries streams.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from hypervisor import printable
from shim.errors import DeadlineExceeded, Internal, InvalidArgument, ShimError, Unimplemented

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping

    from google.protobuf.descriptor import ServiceDescriptor

    Service = tuple[ServiceDescriptor, object]
    #: Told the method, the request and the headers of each request.
    Heed = Callable[[str, bytes, Iterable[tuple[str, str]]], None]

MAX_STATUS_TEXT = 2048
"""Longest error text sent, in bytes: gRPC escapes it, tripled at worst, into headers of at most 8 KiB."""

_WAITING = {"Wait", "WaitSandbox"}
_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Method:
    """One callable method: its name for error texts, the class of its requests, the coroutine behind it."""

    name: str
    request_class: type[Message]
    handler: Callable[[Message], Awaitable[Message]]
    #: Called with the bare name and the duration in seconds of each finished call.
    observe: Callable[[str, float], None] | None = None

    async def answer(self, payload: bytes, *, timeout_s: float | None) -> bytes:
        """Run the handler, see :meth:`_answer`, and report how long it took."""
        if self.observe is None:
            return await self._answer(payload, timeout_s=timeout_s)
        began_s = time.monotonic()
        try:
            return await self._answer(payload, timeout_s=timeout_s)
        finally:
            self.observe(self.name.rpartition("/")[2], time.monotonic() - began_s)

    async def _answer(self, payload: bytes, *, timeout_s: float | None) -> bytes:
        """Run the handler on a serialized request, the same way for every transport.

        :param timeout_s: the client's limit, in seconds; None for no limit.
        :returns: the serialized response.
        :raises InvalidArgument: if the payload is not the request message.
        :raises DeadlineExceeded: if the handler did not finish in time; it was cancelled.
        :raises Internal: if the handler failed in an unforeseen way, which is logged with its traceback.
        :raises ShimError: as the handler raises it on purpose.
        """
        try:
            request = self.request_class.FromString(payload)
        except DecodeError as error:
            expected = self.request_class.DESCRIPTOR.full_name
            raise InvalidArgument(f"call: {self.name}: request is not a valid {expected}: {error}") from error
        try:
            if timeout_s is None:
                return (await self.handler(request)).SerializeToString()
            return await self._answer_in_time(request, timeout_s)
        except ShimError:
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not the call was cancelled, but something the handler waited for: the client must get an answer.
            logger.exception("call: %s: cancelled from inside", self.name)
            raise Internal(f"call: {self.name}: its work was cancelled; see the log") from error
        except Exception as error:  # at this boundary, any defect becomes an answer
            logger.exception("call: %s: unexpected failure", self.name)
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise Internal(f"call: {self.name}: {cause}; see the log") from error

    async def _answer_in_time(self, request: Message, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s) as limit:
                return (await self.handler(request)).SerializeToString()
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                f"call: {self.name}: not finished within the client's {timeout_s:g} s; look at the state"
            ) from error


@dataclass(frozen=True, slots=True)
class Stream:
    """One method that takes or returns any number of messages."""

    name: str
    request_class: type[Message]
    handler: Callable[[AsyncIterator[Message]], AsyncIterator[Message]]

    async def answer(self, payloads: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Run the handler on serialized messages, as :meth:`Method.answer` does.

        :param payloads: the client's messages.
        :returns: the serialized answers.
        :raises InvalidArgument: if a payload is not the request message.
        :raises Internal: if the handler failed in an unforeseen way, which is logged with its traceback.
        :raises ShimError: as the handler raises it on purpose.
        """
        try:
            async for answer in self.handler(self._requests(payloads)):
                yield answer.SerializeToString()
        except ShimError:
            raise
        except Exception as error:  # at this boundary, any defect becomes an answer
            logger.exception("call: %s: unexpected failure", self.name)
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise Internal(f"call: {self.name}: {cause}; see the log") from error

    async def _requests(self, payloads: AsyncIterator[bytes]) -> AsyncIterator[Message]:
        async for payload in payloads:
            try:
                request = self.request_class.FromString(payload)
            except DecodeError as error:
                expected = self.request_class.DESCRIPTOR.full_name
                raise InvalidArgument(
                    f"call: {self.name}: request is not a valid {expected}: {error}"
                ) from error
            yield request


class Dispatch:
    """Finds the method for a request.

    One object may have several descriptors, like task v2 and v3, which differ only in the package of
    their messages. Each of its methods is then written against the request class of the **first** descriptor
    listed; those of the others go through the same classes, so their messages must be equal on the wire.

    :param services: each service's descriptor with its implementation.
    :param late: the same by full name, for services that are made at their first request.
    :param observe: called with the name and the duration of each finished call that did not wait for an end.
    """

    def __init__(
        self,
        services: Iterable[Service],
        *,
        late: Mapping[str, Callable[[], Service]] | None = None,
        observe: Callable[[str, float], None] | None = None,
    ) -> None:
        self._services: dict[str, dict[str, Method]] = {}
        self._streams: dict[tuple[str, str], Stream] = {}
        self._request_classes: dict[tuple[int, str], type[Message]] = {}
        self._late = dict(late or {})
        self._observe = observe
        for service, implementation in services:
            self._add(service, implementation)

    def _add(self, service: ServiceDescriptor, implementation: object) -> None:
        methods = self._services[service.full_name] = {}
        for method in service.methods:
            handler = getattr(implementation, snake_case(method.name), None)
            if handler is None:
                continue
            name = f"{service.full_name}/{method.name}"
            request_class = self._request_classes.setdefault(
                (id(implementation), method.name), GetMessageClass(method.input_type)
            )
            if method.client_streaming or method.server_streaming:
                self._streams[service.full_name, method.name] = Stream(name, request_class, handler)
            else:
                observed = None if method.name in _WAITING else self._observe
                methods[method.name] = Method(name, request_class, handler, observed)

    @property
    def service_names(self) -> list[str]:
        """Full names of all services, in the given order; this makes late ones."""
        for name in list(self._late):
            self._make(name)
        return list(self._services)

    def _make(self, name: str) -> None:
        """Make a late service, if it is one."""
        make = self._late.pop(name, None)
        if make is not None:
            self._add(*make())

    def find(self, service: str, method: str) -> Method:
        """Look up one method.

        :param service: full name, such as ``containerd.task.v3.Task``.
        :param method: bare name, such as ``Create``.
        :raises Unimplemented: if there is no such service or the service does not offer the method.
        """
        self._make(service)
        methods = self._services.get(service)
        if methods is None:
            raise Unimplemented(f"service {service}")
        found = methods.get(method)
        if found is None:
            raise Unimplemented(f"method {method}")
        return found

    def find_stream(self, service: str, method: str) -> Stream | None:
        """Look up a method that is a stream; see :meth:`find`."""
        self._make(service)
        return self._streams.get((service, method))


def snake_case(name: str) -> str:
    """Convert the name of an RPC to the name of its Python method: ``CloseIO`` is ``close_io``."""
    return _WORD_START.sub("_", name).lower()


def status_text(error: ShimError) -> str:
    """Return an error's text in a form that every transport can carry: short, one line, printable.

    Names of files may hold surrogate escapes, which no protobuf string accepts, and what a client or a guest
    sent may hold control characters, which clients print on terminals.
    """
    text = " ".join(str(error)[:MAX_STATUS_TEXT].split())
    shown = printable(text, limit=MAX_STATUS_TEXT, replacement="?")
    return shown.encode()[:MAX_STATUS_TEXT].decode("utf-8", "ignore")
