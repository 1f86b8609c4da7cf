"""A process's streams travel to their last byte over the connections that the request names."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from guest.agent import raw_streams
from guest.agent.errors import AgentError
from guest.agent.process import Process
from guest.agent.reaper import Exit
from guest.agent.runtime import Started
from guest.agent.streams import Pipes
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guest.agent.wire import Message


MUCH = os.urandom(3 << 20)


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    """The streams of a process that the test plays."""
    opened = Pipes()
    yield opened
    for fd in opened.child:
        try:
            os.close(fd)
        except OSError:
            continue


@pytest.fixture
def process(pipes: Pipes) -> Process:
    return Process(Started(1, Exit(), pipes.streams()))


@pytest.fixture
def host() -> Iterator[Callable[[int], socket.socket]]:
    """Make a connection from a port, and return the host's end."""
    ends = []

    def connect(port: int) -> socket.socket:
        ours, guests = socket.socketpair()
        ours.settimeout(WITHIN_S)
        ends.append(ours)
        raw_streams.arrive(port, guests.detach())
        return ours

    yield connect
    for end in ends:
        end.close()


def request(*, stdin: int = 0, stdout: int = 0, stderr: int = 0) -> Message:
    return cast("Message", SimpleNamespace(stdin_port=stdin, stdout_port=stdout, stderr_port=stderr))


def read_all(stream: socket.socket) -> bytes:
    return b"".join(iter(lambda: stream.recv(1 << 16), b""))


def test_outputs_arrive_whole_and_separately(
    host: Callable[[int], socket.socket], process: Process, pipes: Pipes
) -> None:
    stdout, stderr = host(7001), host(7002)
    with raw_streams.Claims(request(stdout=7001, stderr=7002)) as claims:
        claims.attach(process, ended=lambda: None)
    os.write(pipes.child[2], b"apart")
    view = memoryview(MUCH)
    received = bytearray()
    while view:
        view = view[os.write(pipes.child[1], view[: 1 << 19]) :]
        while len(received) < len(MUCH) - len(view):
            received += stdout.recv(1 << 16)
    pipes.close_child()
    assert received + read_all(stdout) == MUCH
    assert read_all(stderr) == b"apart"


def test_the_process_reads_all_input_before_its_end(
    host: Callable[[int], socket.socket], process: Process, pipes: Pipes
) -> None:
    stdin = host(7003)
    with raw_streams.Claims(request(stdin=7003)) as claims:
        claims.attach(process, ended=lambda: None)
    stdin.sendall(b"a line\n")
    stdin.close()
    read_end = os.fdopen(os.dup(pipes.child[0]), "rb")
    with read_end:
        assert read_end.read() == b"a line\n"


def test_the_end_of_an_output_is_reported_once(
    host: Callable[[int], socket.socket], process: Process, pipes: Pipes
) -> None:
    stdout, over = host(7004), []
    with raw_streams.Claims(request(stdout=7004)) as claims:
        claims.attach(process, ended=lambda: over.append(True))
    os.write(pipes.child[1], b"last words")
    process.end.set(0)
    # A child of the process still holds the pipe: silence ends the stream.
    assert read_all(stdout) == b"last words"
    assert over == [True]


def test_a_port_without_a_connection_is_refused_and_the_others_are_closed(
    host: Callable[[int], socket.socket],
) -> None:
    stdout = host(7005)
    with pytest.raises(AgentError, match="port 7006"):
        raw_streams.Claims(request(stdout=7005, stderr=7006))
    assert stdout.recv(1) == b""


def test_connections_are_closed_if_the_process_cannot_be_made(host: Callable[[int], socket.socket]) -> None:
    stdout = host(7007)
    with pytest.raises(ZeroDivisionError), raw_streams.Claims(request(stdout=7007)):
        raise ZeroDivisionError
    assert stdout.recv(1) == b""
