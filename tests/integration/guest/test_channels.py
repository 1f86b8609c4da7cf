"""The agent over each of its channels, and how it treats connections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from proto.extensions import (
    AGENT_PORT,
    FRAMED_STREAM_PORT,
    PRIVILEGED_PARAMETER,
    RAW_STREAM_PORT,
    RAW_STREAMS_PARAMETER,
)
from proto.kata import agent_pb2, health_pb2
from tests.integration.guest.agent_client import StatusError
from tests.integration.guest.conftest import IMAGE, Life
from tests.integration.guest.guest_machine import GuestMachine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def vsock_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuestMachine]:
    machine = GuestMachine(tmp_path_factory.mktemp("vsock"), IMAGE, channel="vsock")
    try:
        machine.create_sandbox()
        yield machine
    finally:
        machine.close()


def test_container_life_over_vsock(vsock_machine: GuestMachine) -> None:
    vsock_machine.make_rootfs("over-vsock")
    container = Life(vsock_machine, "over-vsock")
    container.run("sh", "-c", "cat; exit 3")
    container.write(b"through vsock")
    container.close_stdin()
    assert container.read_all() == b"through vsock"
    assert container.wait() == 3
    container.remove()


def test_unprivileged_ports_are_refused_on_each_listener_where_the_command_line_says_so(
    tmp_path: Path,
) -> None:
    """The daemon's connections soon come from such ports, as unprivileged users' do over vhost-vsock."""
    parameters = f"{PRIVILEGED_PARAMETER} {RAW_STREAMS_PARAMETER}{RAW_STREAM_PORT}"
    machine = GuestMachine(tmp_path, IMAGE, channel="vsock", kernel_parameters=parameters)
    try:
        for port in (AGENT_PORT, RAW_STREAM_PORT, FRAMED_STREAM_PORT):
            machine.knock(port, until=f"vsock: port {port}: refused a connection from CID 2")
    finally:
        machine.close()


def test_vsock_serves_many_connections(vsock_machine: GuestMachine) -> None:
    clients = [vsock_machine.connect() for _ in range(8)]
    for client in clients:
        client.call("Check", health_pb2.CheckRequest(), service="grpc.Health")


def test_vsock_read_of_a_lost_connection_takes_no_output(vsock_machine: GuestMachine) -> None:
    vsock_machine.make_rootfs("lost-reader")
    container = Life(vsock_machine, "lost-reader")
    container.run("cat")
    other = vsock_machine.connect()
    other.begin("ReadStdout", agent_pb2.ReadStreamRequest(container_id=container.id, len=100))
    other.call("Check", health_pb2.CheckRequest(), service="grpc.Health")
    other.shut_down()
    container.client.call("Check", health_pb2.CheckRequest(), service="grpc.Health")
    container.write(b"still here")
    assert container.read() == b"still here"
    container.signal(9)
    container.remove()


def test_serial_serves_one_host_after_another(
    machine: GuestMachine, new_container: Callable[[], Life]
) -> None:
    container = new_container()
    container.run("cat")
    waiting = machine.client.begin(
        "ReadStdout", agent_pb2.ReadStreamRequest(container_id=container.id, len=9)
    )
    machine.client.shut_down()
    with pytest.raises(ConnectionError):
        machine.client.answer(waiting)
    machine.client = container.client = machine.connect()
    container.write(b"again")
    assert container.read() == b"again"


def test_check_answers_while_a_container_is_created(
    machine: GuestMachine, new_container: Callable[[], Life]
) -> None:
    container = new_container()
    creating = container.begin_create("sh", "-c", "exit 0")
    machine.client.call("Check", health_pb2.CheckRequest(), service="grpc.Health")
    machine.client.answer(creating)


@pytest.mark.parametrize(
    ("service", "method", "code"),
    [("grpc.AgentService", "GetIPTables", 12), ("grpc.AgentService", "NoSuch", 12), ("no.Such", "Check", 3)],
)
def test_unknown_calls_are_refused(machine: GuestMachine, service: str, method: str, code: int) -> None:
    stream = machine.client.begin(method, agent_pb2.GetIPTablesRequest(), service=service)
    with pytest.raises(StatusError) as refused:
        machine.client.answer(stream)
    assert refused.value.code == code


def test_frame_errors_are_answered(machine: GuestMachine) -> None:
    machine.client.send_frame(1002, 1, b"")
    with pytest.raises(StatusError, match="odd"):
        machine.client.answer(1002)
    machine.client.send_frame(100001, 1, bytes((4 << 20) + 1))
    with pytest.raises(StatusError, match="exceeds"):
        machine.client.answer(100001)
    machine.client.send_frame(100003, 1, b"\xff\xff")
    with pytest.raises(StatusError, match="decode"):
        machine.client.answer(100003)


def test_version_tells_the_agent(machine: GuestMachine) -> None:
    reply = machine.client.call("Version", health_pb2.CheckRequest(), service="grpc.Health")
    assert reply.agent_version
    details = machine.client.call("GetGuestDetails", agent_pb2.GuestDetailsRequest(mem_block_size=True))
    assert "hako" in details.agent_details.extra_features
    assert details.agent_details.supports_seccomp
    assert details.mem_block_size_bytes > 0
