"""The table of methods, without a transport."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from proto.containerd import task_v2_pb2, task_v3_pb2
from proto.hako import management_pb2
from proto.kata import agent_pb2
from shim.errors import DeadlineExceeded, Internal, InvalidArgument, NotFound, Unimplemented
from shim.transport.dispatch import Dispatch, snake_case
from tests.waiting import settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import Any

    from google.protobuf.descriptor import ServiceDescriptor


TASK_V2 = task_v2_pb2.DESCRIPTOR.services_by_name["Task"]
TASK_V3 = task_v3_pb2.DESCRIPTOR.services_by_name["Task"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Create", "create"),
        ("ResizePty", "resize_pty"),
        ("CloseIO", "close_io"),
        ("GetOOMEvent", "get_oom_event"),
        ("AddARPNeighbors", "add_arp_neighbors"),
        ("TtyWinResize", "tty_win_resize"),
    ],
)
def test_python_methods_are_named_after_rpcs(name: str, expected: str) -> None:
    assert snake_case(name) == expected


def test_every_rpc_of_the_contracts_has_a_unique_python_name() -> None:
    for service in (TASK_V3, agent_pb2.DESCRIPTOR.services_by_name["AgentService"]):
        names = {snake_case(method.name) for method in service.methods}
        assert len(names) == len(service.methods)
        assert all(name.isidentifier() for name in names)


class Recorder:
    """Records its requests."""

    def __init__(self) -> None:
        self.request: task_v2_pb2.StateRequest | task_v3_pb2.StateRequest | None = None

    async def state(
        self, request: task_v2_pb2.StateRequest | task_v3_pb2.StateRequest
    ) -> task_v3_pb2.StateResponse:
        self.request = request
        return task_v3_pb2.StateResponse(id=request.id, pid=7)


async def test_requests_of_both_versions_are_of_the_class_listed_first() -> None:
    recorder = Recorder()
    dispatch = Dispatch([(TASK_V3, recorder), (TASK_V2, recorder)])
    payload = task_v2_pb2.StateRequest(id="one").SerializeToString()
    answer = await dispatch.find("containerd.task.v2.Task", "State").answer(payload, timeout_s=None)
    assert recorder.request == task_v3_pb2.StateRequest(id="one")
    assert task_v2_pb2.StateResponse.FromString(answer).pid == 7


async def test_two_implementations_get_requests_of_their_own_classes() -> None:
    first, second = Recorder(), Recorder()
    dispatch = Dispatch([(TASK_V3, first), (TASK_V2, second)])
    await dispatch.find("containerd.task.v2.Task", "State").answer(b"", timeout_s=None)
    assert type(second.request) is task_v2_pb2.StateRequest
    assert first.request is None


def test_services_are_listed_in_the_order_given() -> None:
    assert Dispatch([(TASK_V3, Recorder()), (TASK_V2, Recorder())]).service_names == [
        "containerd.task.v3.Task",
        "containerd.task.v2.Task",
    ]


@pytest.mark.parametrize(
    ("service", "method", "text"),
    [
        ("containerd.task.v1.Task", "State", "service containerd.task.v1.Task"),
        ("", "", "service "),
        ("containerd.task.v3.Task", "Create", "method Create"),
        ("containerd.task.v3.Task", "state", "method state"),
        ("containerd.task.v3.Task", "__init__", "method __init__"),
    ],
)
def test_a_method_that_is_not_offered_is_unimplemented(service: str, method: str, text: str) -> None:
    with pytest.raises(Unimplemented) as raised:
        Dispatch([(TASK_V3, Recorder())]).find(service, method)
    assert str(raised.value) == text


def test_a_late_service_is_made_at_its_first_request() -> None:
    made = []

    def make() -> tuple[ServiceDescriptor, object]:
        made.append(1)
        return TASK_V2, Recorder()

    dispatch = Dispatch([(TASK_V3, Recorder())], late={TASK_V2.full_name: make})
    dispatch.find("containerd.task.v3.Task", "State")
    assert not made
    dispatch.find("containerd.task.v2.Task", "State")
    assert dispatch.service_names == ["containerd.task.v3.Task", "containerd.task.v2.Task"]
    assert len(made) == 1


class Counting:
    async def events(
        self, requests: AsyncIterator[management_pb2.EventsRequest]
    ) -> AsyncIterator[management_pb2.Event]:
        async for request in requests:
            if not request.follow:
                raise NotFound("no such event")
            yield management_pb2.Event(number=1)


async def payloads(*requests: bytes) -> AsyncIterator[bytes]:
    for request in requests:
        yield request


async def test_a_stream_receives_and_sends_messages() -> None:
    service = management_pb2.DESCRIPTOR.services_by_name["Management"]
    dispatch = Dispatch([(service, Counting())])
    stream = dispatch.find_stream(service.full_name, "Events")
    assert stream is not None
    asked = management_pb2.EventsRequest(follow=True).SerializeToString()

    assert [each async for each in stream.answer(payloads(asked, asked))] == [b"\x38\x01", b"\x38\x01"]
    with pytest.raises(NotFound):
        [each async for each in stream.answer(payloads(b""))]
    with pytest.raises(InvalidArgument, match="not a valid"):
        [each async for each in stream.answer(payloads(b"\xff"))]
    with pytest.raises(Unimplemented):  # over ttrpc
        dispatch.find(service.full_name, "Events")


class Misbehaving:
    async def state(self, _request: task_v3_pb2.StateRequest) -> None:
        stray = asyncio.get_running_loop().create_future()
        stray.cancel()
        await stray

    async def wait(self, _request: task_v3_pb2.WaitRequest) -> None:
        raise TimeoutError("of its own")

    async def kill(self, _request: task_v3_pb2.KillRequest) -> None:
        await asyncio.Event().wait()


@pytest.fixture
def misbehaving() -> Callable[..., Any]:
    dispatch = Dispatch([(TASK_V3, Misbehaving())])
    return lambda method: dispatch.find("containerd.task.v3.Task", method)


async def test_a_cancellation_inside_the_handler_is_answered(
    misbehaving: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Internal, match="cancelled"):
        await misbehaving("State").answer(b"", timeout_s=None)
    assert "cancelled from inside" in caplog.text


async def test_a_handlers_own_timeout_is_not_taken_for_the_clients_deadline(
    misbehaving: Callable[..., Any],
) -> None:
    with pytest.raises(Internal, match="TimeoutError: of its own"):
        await misbehaving("Wait").answer(b"", timeout_s=60)


async def test_a_handler_that_outlives_the_deadline_is_given_up_on(misbehaving: Callable[..., Any]) -> None:
    with pytest.raises(DeadlineExceeded, match=r"containerd\.task\.v3\.Task/Kill: .* 0\.01 s"):
        await misbehaving("Kill").answer(b"", timeout_s=0.01)


@pytest.mark.parametrize("timeout_s", [None, 60])
async def test_cancelling_the_call_cancels_the_handler_without_an_answer(
    misbehaving: Callable[..., Any], timeout_s: int | None
) -> None:
    call = asyncio.create_task(misbehaving("Kill").answer(b"", timeout_s=timeout_s))
    await settle()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
