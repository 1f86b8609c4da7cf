"""The channels to the agent, without a guest."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, cast
from unittest.mock import Mock

import pytest

from hypervisor import Channel, ChannelError, VmStartError, channel_problem
from hypervisor.vsock import (
    NotListeningError,
    SerialChannel,
    UserVsockChannel,
    bind_privileged,
    make_channel,
)
from proto.extensions import AGENT_PORT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence
    from typing import Any

    from hypervisor import VmSpec, interface
    from hypervisor.confinement import Confinement
    from hypervisor.process import ChildProcess


def no_spawn(
    name: str,
    argv: Sequence[str],
    *,
    inherit: Iterable[int] = (),
    confinement: Confinement | None = None,
) -> ChildProcess:
    raise AssertionError("no process is needed")


async def test_virtio_serial_carries_one_connection_to_the_agents_port() -> None:
    channel = SerialChannel()
    with ExitStack() as handover:
        await channel.open(handover)
        with pytest.raises(ChannelError, match="reaches port 1024 only"):
            await channel.dial(AGENT_PORT + 1)
        with await channel.dial(AGENT_PORT) as stream:
            assert stream.getblocking() is False
        with pytest.raises(ChannelError, match="one connection only"):
            await channel.dial(AGENT_PORT)


class Binding:
    """A socket that finds some ports in use, or may use none."""

    def __init__(self, *, taken: Iterable[int] = (), error: int = errno.EADDRINUSE) -> None:
        self.bound = 0
        self._taken = set(taken)
        self._error = error

    def bind(self, address: tuple[int, int]) -> None:
        if address[1] in self._taken:
            raise OSError(self._error, os.strerror(self._error))
        self.bound = address[1]


def test_a_connection_comes_from_a_free_privileged_port() -> None:
    stream = Binding(taken=set(range(1, 1024)) - {700})
    bind_privileged(cast("socket.socket", stream), range(1, 1024))
    assert stream.bound == 700


def test_without_a_free_privileged_port_connecting_fails() -> None:
    stream = Binding(taken=range(1024))
    with pytest.raises(ChannelError, match="vsock ports 1 to 1023 are all in use"):
        bind_privileged(cast("socket.socket", stream), range(1, 1024))


def test_without_the_capability_for_privileged_ports_connecting_fails() -> None:
    stream = Binding(taken=range(1024), error=errno.EACCES)
    with pytest.raises(ChannelError, match="give the shim CAP_NET_BIND_SERVICE"):
        bind_privileged(cast("socket.socket", stream), range(1, 1024))


def test_a_missing_vsock_daemon_is_named(make_spec: Callable[..., VmSpec]) -> None:
    spec = make_spec(channel=Channel.VHOST_USER_VSOCK, vsock_daemon=None)
    with pytest.raises(VmStartError, match="install vhost-device-vsock"):
        make_channel(spec, spawn=no_spawn)


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[tuple[UserVsockChannel, list[Any], dict[str, bytes]]]:
    """The ports socket of a vsock daemon whose answers a test chooses."""
    received: list[bytes] = []
    answer = {"bytes": b""}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.readline())
        writer.write(answer["bytes"])
        await writer.drain()
        writer.close()

    channel = UserVsockChannel(Path("/unused"), tmp_path, spawn=no_spawn)
    server = await asyncio.start_unix_server(serve, tmp_path / "vsock.sock")
    yield channel, received, answer
    server.close()
    await server.wait_closed()
    channel.close()


async def test_dialling_reads_no_more_than_the_daemons_answer(
    daemon: tuple[UserVsockChannel, list[Any], dict[str, bytes]],
) -> None:
    channel, received, answer = daemon
    answer["bytes"] = b"OK 1073741824\nhello"
    with await channel.dial(1024) as stream:
        assert await asyncio.get_running_loop().sock_recv(stream, 100) == b"hello"
    assert received == [b"CONNECT 1024\n"]


@pytest.mark.parametrize(
    "refusal", [b"", b"OK", b"no\n"], ids=["hangs up", "half an answer", "another answer"]
)
async def test_a_refused_connection_can_be_dialled_again(
    daemon: tuple[UserVsockChannel, list[Any], dict[str, bytes]], refusal: bytes
) -> None:
    channel, _, answer = daemon
    answer["bytes"] = refusal
    with pytest.raises(NotListeningError):
        await channel.dial(1024)


async def test_a_daemon_is_ready_once_it_has_read_all_messages(
    daemon: tuple[UserVsockChannel, list[Any], dict[str, bytes]], tmp_path: Path
) -> None:
    channel, _, answer = daemon
    answer["bytes"] = b"OK 1073741824\n"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "vhost-vsock.sock"))
        listener.listen()
        channel._spawn = Mock()
        with ExitStack() as handover:
            device = await channel.open(handover)
        with listener.accept()[0] as daemons_end:
            assert channel.is_handed_over()
            with socket.socket(fileno=os.dup(device.fd)) as qemus_end:
                qemus_end.send(b"a queue")
                assert not channel.is_handed_over()
                daemons_end.recv(3)
                assert not channel.is_handed_over()
                daemons_end.recv(100)
                assert channel.is_handed_over()
            (await channel.dial(1024)).close()
            # From here on, only QEMU holds its end.
            assert daemons_end.recv(1) == b""
    assert channel.is_handed_over()


@pytest.mark.parametrize(
    ("channel", "daemon_path", "problem"),
    [
        (Channel.VIRTIO_SERIAL, None, None),
        (Channel.VHOST_USER_VSOCK, Path("/bin/true"), None),
        (Channel.VHOST_USER_VSOCK, None, "install vhost-device-vsock"),
        (Channel.VHOST_USER_VSOCK, Path("/nonexistent/daemon"), "/nonexistent/daemon: no such program"),
    ],
)
def test_the_problem_of_a_channel_on_this_host_is_named(
    channel: interface.Channel, daemon_path: Path | None, problem: str | None
) -> None:
    found = channel_problem(channel, vsock_daemon=daemon_path)
    assert found == problem if found is None or problem is None else problem in found


def test_a_host_without_vhost_vsock_gets_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hypervisor.vsock.VHOST_VSOCK", tmp_path / "vhost-vsock")
    problem = channel_problem(Channel.VHOST_VSOCK, vsock_daemon=None)
    assert "load the kernel module vhost_vsock" in (problem or "")
