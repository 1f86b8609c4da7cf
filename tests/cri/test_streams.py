"""Streams through containerd: exec with standard streams or a terminal, attach, and port forwarding."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from tests.cri.image import PORT
from tests.cri.streams import STDERR, STDIN, STDOUT

if TYPE_CHECKING:
    from tests.cri.conftest import Duo

MIB = 1 << 20


def test_a_streamed_command_has_all_its_streams_and_an_exit_code(duo: Duo) -> None:
    script = "read word; echo got $word; echo wrong >&2; exit 3"
    with duo.worker.stream("sh", "-c", script, stdin=True, stdout=True, stderr=True) as stream:
        stream.send(STDIN, b"hello\n")
        assert stream.read_until(STDOUT, b"\n") == b"got hello\n"
        assert stream.exit_code() == 3
        assert stream.received[STDERR] == b"wrong\n"


@pytest.mark.mainly
def test_a_streamed_command_passes_many_bytes_both_ways(duo: Duo) -> None:
    content = bytes(range(256)) * (MIB // 256)
    command = ("head", "-c", str(len(content)))
    with duo.worker.stream(*command, stdin=True, stdout=True, stderr=True) as stream:
        for start in range(0, len(content), 32768):
            stream.send(STDIN, content[start : start + 32768])
        assert stream.read_bytes(STDOUT, len(content)) == content
        assert stream.exit_code() == 0


@pytest.mark.mainly
def test_a_streamed_terminal_has_the_size_that_it_is_given(duo: Duo) -> None:
    script = "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.1; done"
    with duo.worker.stream("sh", "-c", script, stdin=True, stdout=True, tty=True) as stream:
        stream.read_until(STDOUT, b"ready")
        stream.resize(columns=91, rows=37)
        assert b"37 91" in stream.read_until(STDOUT, b"\n37 91")
        assert stream.exit_code() == 0


def test_attaching_joins_the_streams_of_a_container(duo: Duo) -> None:
    script = "while read word; do echo got $word; done"
    container = duo.pod.run("attended", "sh", "-c", script, stdin=True)
    try:
        for word in ("first", "second"):
            with container.stream(stdin=True, stdout=True, stderr=True) as stream:
                stream.send(STDIN, f"{word}\n".encode())
                stream.read_until(STDOUT, f"got {word}\n".encode())
        container.wait_for_line("got second")
        assert [line.text for line in container.log()] == ["got first", "got second"]
    finally:
        container.remove()


def test_a_port_of_the_pod_is_forwarded(duo: Duo) -> None:
    data, errors = 0, 1
    with duo.pod.forward(PORT) as stream:
        stream.send(data, b"echo through the tunnel\n")
        stream.read_until(data, b"through the tunnel\n")
        port = struct.pack("<H", PORT)
        assert stream.received == {data: port + b"through the tunnel\n", errors: port}


@pytest.mark.mainly
def test_a_port_without_a_server_is_refused_with_an_error(duo: Duo) -> None:
    with duo.pod.forward(9) as stream:
        assert b"refused" in stream.read_all()[1]
