"""A long stream travels in frames over a connection that begins with the stream's name."""

from __future__ import annotations

import os
import socket
import struct
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from guest.agent import framed_streams
from guest.agent.errors import NotFound
from guest.agent.process import Process
from guest.agent.reaper import Exit
from guest.agent.runtime import Started
from guest.agent.streams import Pipes
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Iterator


MUCH = os.urandom(3 << 20)


class Guest:
    """An agent with one container, whose only process the test plays, and its connection to the host."""

    def __init__(self) -> None:
        self.pipes = Pipes()
        self.process = Process(Started(1, Exit(), self.pipes.streams()))
        self.forgotten: list[str] = []
        self.host, self._guests = socket.socketpair()
        self.host.settimeout(WITHIN_S)
        self.thread = threading.Thread(target=framed_streams.serve, args=(self._guests.detach(), self._find))
        self.thread.start()

    def _find(self, container_id: str) -> SimpleNamespace:
        if container_id != "box":
            raise NotFound(container_id)
        return SimpleNamespace(process=lambda _id: self.process, forget_if_done=self.forgotten.append)

    def name(self, name: bytes) -> None:
        self.host.sendall(frame(name))

    def answers(self) -> bool:
        return self.host.recv(4) == b"\0\0\0\0"

    def read(self) -> bytes:
        """Read frames up to and including the last."""
        frames = []
        while size := int.from_bytes(self._exactly(4), "big"):
            frames.append(self._exactly(size))
        return b"".join(frames)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.host.recv(size - len(data))
            assert part, "the agent closed before the end"
            data += part
        return data

    def close(self) -> None:
        self.host.close()
        self.process.end.set(0)
        self.thread.join(WITHIN_S)
        assert not self.thread.is_alive()
        for fd in self.pipes.child:
            try:
                os.close(fd)
            except OSError:
                continue


@pytest.fixture
def guest() -> Iterator[Guest]:
    opened = Guest()
    yield opened
    opened.close()


def frame(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_an_output_arrives_whole_and_the_host_closes_the_connection(guest: Guest, name: str) -> None:
    guest.name(f"{name}\0box\0exec".encode())
    assert guest.answers()
    written_to, other = guest.pipes.child[1:] if name == "stdout" else guest.pipes.child[:0:-1]
    os.write(other, b"apart")

    def play() -> None:
        view = memoryview(MUCH)
        while view:
            view = view[os.write(written_to, view) :]
        guest.pipes.close_child()

    player = threading.Thread(target=play)
    player.start()
    assert guest.read() == MUCH
    player.join(WITHIN_S)
    assert guest.forgotten == ["exec"]
    guest.host.settimeout(0.1)
    with pytest.raises(TimeoutError):
        guest.host.recv(1)
    guest.host.settimeout(WITHIN_S)
    guest.host.shutdown(socket.SHUT_WR)
    assert guest.host.recv(1) == b""


def test_an_input_arrives_whole_and_the_agent_closes_the_connection(guest: Guest) -> None:
    guest.name(b"stdin\0box\0")
    assert guest.answers()
    for byte in frame(b"one ") + frame(b"two") + frame(b""):
        guest.host.sendall(bytes([byte]))
    with os.fdopen(os.dup(guest.pipes.child[0]), "rb") as read_end:
        assert read_end.read() == b"one two"
    assert guest.host.recv(1) == b""


def test_an_input_that_breaks_off_inside_a_frame_counts_as_ended(guest: Guest) -> None:
    guest.name(b"stdin\0box\0")
    assert guest.answers()
    guest.host.sendall(frame(b"all of it")[:7])
    guest.host.shutdown(socket.SHUT_WR)
    with os.fdopen(os.dup(guest.pipes.child[0]), "rb") as read_end:
        assert read_end.read() == b"all"


def test_input_after_the_process_end_is_dropped(guest: Guest) -> None:
    guest.name(b"stdin\0box\0")
    assert guest.answers()
    guest.process.end.set(0)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        guest.host.sendall(frame(MUCH))


@pytest.mark.parametrize(
    "said",
    [
        frame(b"stdout\0other\0"),
        frame(b"stdlog\0box\0"),
        frame(b"stdout\0box"),
        frame(b"stdout\0box\0exec\0more"),
        frame(b"\xff\xfe"),
        frame(b""),
        struct.pack(">I", 0xFFFFFFFF),
        b"\0\0",
    ],
)
def test_a_connection_that_names_no_stream_is_closed(guest: Guest, said: bytes) -> None:
    guest.host.sendall(said)
    guest.host.shutdown(socket.SHUT_WR)
    assert guest.host.recv(4) == b""


def test_a_silent_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framed_streams, "_NAME_TIMEOUT_MS", 0)
    guest = Guest()
    assert guest.host.recv(1) == b""
    guest.close()
