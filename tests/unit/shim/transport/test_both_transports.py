"""Clients see the same behaviour over both transports."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest
from google.protobuf import empty_pb2

from proto.containerd import task_v2_pb2, task_v3_pb2
from shim.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unimplemented,
)
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from tests.unit.shim.transport.conftest import Client, MemoryTasks, OverGrpc, OverTtrpc


TASK = "containerd.task.v3.Task"
FOUR_MIB = 4 << 20


async def test_a_request_reaches_the_handler_and_its_response_comes_back(
    client: Client,
) -> None:
    await client.create("one", bundle="/run/one")
    assert (await client.state("one")).bundle == "/run/one"


async def test_an_empty_response_is_an_answer(client: Client) -> None:
    await client.create("one")
    assert await client.kill("one", signal=9) == empty_pb2.Empty()


async def test_the_code_and_text_of_an_error_arrive_unchanged(client: Client) -> None:
    with pytest.raises(NotFound, match=r"^state: ghost: no such task$"):
        await client.state("ghost")


async def test_each_kind_of_error_keeps_its_kind(client: Client) -> None:
    await client.create("one")
    with pytest.raises(AlreadyExists):
        await client.create("one")


async def test_an_unknown_service_is_unimplemented(client: Client) -> None:
    with pytest.raises(Unimplemented, match=r"^service no\.such\.Service$"):
        await client.call("no.such.Service", "State", empty_pb2.Empty(), empty_pb2.Empty, timeout_s=WITHIN_S)


@pytest.mark.parametrize("method", ["Pause", "NoSuchMethod"], ids=["not offered", "not in the contract"])
async def test_an_unknown_method_is_unimplemented(client: Client, method: str) -> None:
    with pytest.raises(Unimplemented, match=f"^method {method}$"):
        await client.call(TASK, method, empty_pb2.Empty(), empty_pb2.Empty, timeout_s=WITHIN_S)


async def test_both_versions_of_the_task_service_reach_the_same_tasks(client: Client) -> None:
    request = task_v2_pb2.CreateTaskRequest(id="one", bundle="/from/v2")
    await client.call(
        "containerd.task.v2.Task", "Create", request, task_v2_pb2.CreateTaskResponse, timeout_s=WITHIN_S
    )
    assert (await client.state("one")).bundle == "/from/v2"


async def test_a_malformed_payload_is_an_invalid_argument(client: Client) -> None:
    # Field 1 of the request is a string, and 0xff is not UTF-8; Empty preserves unknown fields.
    broken = empty_pb2.Empty()
    broken.ParseFromString(b"\x0a\x01\xff")
    with pytest.raises(InvalidArgument, match=r"containerd\.task\.v3\.StateRequest"):
        await client.call(TASK, "State", broken, task_v3_pb2.StateResponse, timeout_s=WITHIN_S)


async def test_a_waiting_call_does_not_delay_others(client: Client, tasks: MemoryTasks) -> None:
    await client.create("one")
    parked = asyncio.create_task(client.wait("one"))
    await tasks.waits_begun.acquire()
    await client.state("one")
    assert not parked.done()
    await client.kill("one", signal=9)
    assert (await parked).exit_status == 137


async def test_answers_may_come_in_any_order(client: Client, tasks: MemoryTasks) -> None:
    names = [f"task-{number}" for number in range(20)]
    for name in names:
        await client.create(name)
    waits = {name: asyncio.create_task(client.wait(name)) for name in names}
    for _ in names:
        await tasks.waits_begun.acquire()
    for signal, name in enumerate(reversed(names)):
        await client.kill(name, signal=signal)
        assert (await waits[name]).exit_status == 128 + signal


async def test_thousands_of_calls_at_once_each_get_their_own_answer(client: Client) -> None:
    await client.create("one")
    async with asyncio.TaskGroup() as calls:
        waits = [calls.create_task(client.wait("one")) for _ in range(1000)]
        states = [calls.create_task(client.state("one")) for _ in range(2000)]
        await asyncio.wait(states)
        await client.kill("one", signal=2)
    assert {state.result().id for state in states} == {"one"}
    assert {wait.result().exit_status for wait in waits} == {130}


async def test_a_client_deadline_ends_the_call_and_its_handler(client: Client, tasks: MemoryTasks) -> None:
    await client.create("one")
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await client.wait("one", timeout_s=0.2)
    assert time.monotonic() - began > 0.15
    await tasks.waits_cancelled.acquire()
    assert (await client.state("one")).id == "one"


async def test_cancelling_a_caller_leaves_the_connection_usable(client: Client, tasks: MemoryTasks) -> None:
    await client.create("one")
    abandoned = asyncio.create_task(client.wait("one"))
    await tasks.waits_begun.acquire()
    abandoned.cancel()
    with pytest.raises(asyncio.CancelledError):
        await abandoned
    await client.kill("one", signal=9)
    assert (await client.state("one")).id == "one"


async def test_a_client_that_goes_away_cancels_only_its_own_handlers(
    transport: OverGrpc | OverTtrpc, client: Client, tasks: MemoryTasks
) -> None:
    await client.create("one")
    staying = asyncio.create_task(client.wait("one"))
    await tasks.waits_begun.acquire()
    async with transport.connect() as leaving:
        left = asyncio.gather(*(leaving.wait("one") for _ in range(3)), return_exceptions=True)
        for _ in range(3):
            await tasks.waits_begun.acquire()
    for _ in range(3):
        await tasks.waits_cancelled.acquire()
    assert len(await left) == 3
    await client.kill("one", signal=9)
    assert (await staying).exit_status == 137
    assert tasks.waits_cancelled.locked()


async def test_a_defect_is_one_line_for_the_client_and_a_traceback_in_the_log(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Internal) as raised:
        await client.call(
            TASK, "Pids", task_v3_pb2.PidsRequest(id="one"), task_v3_pb2.PidsResponse, timeout_s=WITHIN_S
        )
    assert "ZeroDivisionError: first line second line" in str(raised.value)
    assert "\n" not in str(raised.value)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert f"{TASK}/Pids" in record.message


async def test_a_handler_without_a_response_is_a_defect(client: Client) -> None:
    with pytest.raises(Internal, match="CloseIO"):
        await client.call(TASK, "CloseIO", task_v3_pb2.CloseIORequest(), empty_pb2.Empty, timeout_s=WITHIN_S)


async def test_a_message_just_under_the_limit_passes_both_ways(client: Client, tasks: MemoryTasks) -> None:
    await client.create("one", bundle="x" * (FOUR_MIB - 200))
    assert len((await client.state("one")).bundle) == FOUR_MIB - 200


async def test_a_request_over_the_limit_is_refused_and_the_connection_lives(
    client: Client,
) -> None:
    with pytest.raises(ResourceExhausted):
        await client.create("one", bundle="x" * FOUR_MIB)
    with pytest.raises(NotFound):
        await client.state("one")


async def test_a_response_over_the_limit_is_refused_and_the_connection_lives(
    client: Client, tasks: MemoryTasks
) -> None:
    tasks.stats_bytes = FOUR_MIB
    with pytest.raises(ResourceExhausted):
        await client.call(
            TASK, "Stats", task_v3_pb2.StatsRequest(), task_v3_pb2.StatsResponse, timeout_s=WITHIN_S
        )
    await client.create("one")


@pytest.mark.parametrize(
    "text",
    ["x" * 100_000, "é漢" * 50_000, "/run/\udcff.sock", "two\nlines", "red \x1b[31m", ""],
    ids=["long", "long and not ASCII", "undecodable file name", "two lines", "terminal control", "empty"],
)
async def test_any_error_text_arrives_with_its_class(client: Client, tasks: MemoryTasks, text: str) -> None:
    tasks.delete_error = text
    with pytest.raises(FailedPrecondition) as raised:
        await client.call(
            TASK, "Delete", task_v3_pb2.DeleteRequest(), task_v3_pb2.DeleteResponse, timeout_s=WITHIN_S
        )
    shown = text.replace("\udcff", "?").replace("\n", " ").replace("\x1b", "?")
    assert str(raised.value)[:400] == shown[:400]
