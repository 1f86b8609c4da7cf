"""The common part of both ends of a ttrpc connection: the decoder, back-pressure and the end."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from typing import cast

from shim.override import override
from shim.transport.ttrpc_codec import Frame, FrameDecoder, FrameError, OversizedFrame

logger = logging.getLogger(__name__)


class TtrpcConnection(asyncio.Protocol):
    """A stream socket cut into frames."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._decoder = FrameDecoder()
        self._writable = asyncio.Event()
        self._writable.set()
        self._turn = asyncio.Lock()
        self.lost = asyncio.Event()
        self.loss_cause = "closed by the peer"

    @abstractmethod
    def frame_received(self, frame: Frame | OversizedFrame) -> None:
        """Take the next frame.

        :raises FrameError: if a correct peer would never send it; the connection is then dropped.
        """

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; asyncio calls this first."""
        self.transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        """Pass on the complete frames."""
        try:
            for frame in self._decoder.feed(data):
                self.frame_received(frame)
        except FrameError as error:
            logger.warning("ttrpc: connection dropped: %s", error)
            self.drop(f"dropped: {error}")

    @override
    def pause_writing(self) -> None:
        """Make writers wait, because the write buffer is full."""
        self._writable.clear()

    @override
    def resume_writing(self) -> None:
        """Let writers continue, because the write buffer has drained."""
        self._writable.set()

    @override
    def eof_received(self) -> None:
        """End both directions: ttrpc has no half-closed state, and buffered answers have no reader."""
        self.transport.abort()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        """Wake the tasks that wait for the connection."""
        if exc is not None:
            self.loss_cause = str(exc)
        self.lost.set()
        self._writable.set()

    async def writable(self) -> None:
        """Wait in turn until the write buffer has room, or the connection is lost."""
        async with self._turn:
            # The previous writer may have filled the buffer again.
            while not self._writable.is_set():
                await self._writable.wait()

    def send(self, frame: bytes) -> None:
        """Write a frame at once; it is lost with the connection if that is ending."""
        if not self.transport.is_closing():
            self.transport.write(frame)

    def drop(self, cause: str) -> None:
        """End the connection now, without sending the buffered rest.

        :param cause: the error for later calls on it.
        """
        self.loss_cause = cause
        self.transport.abort()
