"""A hostile guest agent harms only its own sandbox: every call ends, and every process ends once."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import logging
import os
import shutil
import socket
from typing import TYPE_CHECKING, cast

import pytest
from google.protobuf.message_factory import GetMessageClass
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proto import ttrpc_pb2
from proto.containerd import events_pb2, task_v3_pb2
from proto.kata import agent_pb2, health_pb2
from shim.agent.client import Agent
from shim.config import Config
from shim.errors import ShimError
from shim.host import kernel
from shim.host.ledger import Ledger
from shim.host.state_directory import StartRecord
from shim.sandbox.context import Context
from shim.sandbox.work import Work
from shim.services.task import TaskService
from shim.telemetry.event_feed import EventFeed
from shim.transport.ttrpc_client import TtrpcClient
from shim.transport.ttrpc_codec import Frame, FrameDecoder, FrameType, OversizedFrame, encode_frame
from tests.fuzz.material import bent, messages
from tests.fuzz.peers import header
from tests.fuzz.served_shim import MachinelessSandbox
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Any

    from google.protobuf.message import Message

    from shim.sandbox.guest_container import GuestContainer
    from shim.telemetry.events import Publisher


CASES = settings().max_examples
CALL_TIMEOUT_S = 0.02
END_TIMEOUT_S = patient(40)

_METHODS = {
    method.name: GetMessageClass(method.output_type)
    for descriptor, name in ((agent_pb2.DESCRIPTOR, "AgentService"), (health_pb2.DESCRIPTOR, "Health"))
    for method in descriptor.services_by_name[name].methods
}
# An answer to these ends something: an honest agent answers them late.
_LONG = ("WaitProcess", "ReadStdout", "ReadStderr", "GetOOMEvent")
# The shim reads the answers of these.
_ANSWERED = (
    "WaitProcess",
    "ReadStdout",
    "GetOOMEvent",
    "GetGuestDetails",
    "StatsContainer",
    "GetDiagnosticData",
)


def response(payload: bytes = b"", *, code: int = 0, message: str = "") -> bytes:
    status = ttrpc_pb2.Status(code=code, message=message) if code else None
    return ttrpc_pb2.Response(payload=payload, status=status).SerializeToString()


@st.composite
def deeds(draw: Callable[..., Any]) -> tuple[str, bytes, int, dict[str, bytes]]:
    """What the agent does on one request, as a function of its method and stream id."""
    kind = draw(
        st.sampled_from(
            [
                "agree",
                "any",
                "bent",
                "bytes",
                "refuse",
                "never",
                "twice",
                "stranger",
                "data",
                "huge",
                "noise",
                "close",
            ]
        )
    )
    noise = draw(st.binary(max_size=30))
    code = draw(st.sampled_from([1, 2, 3, 5, 13, 16, 17, 999, -1, 2**31 - 1]))
    payloads = {}
    if kind in {"any", "bent"}:
        # Draw a reply for every method, though only one is sent: which one depends on what the shim asks at
        # that moment, and hypothesis must draw the same each time.
        for name in _ANSWERED:
            valid = messages(_METHODS[name].DESCRIPTOR).map(lambda message: message.SerializeToString())
            payloads[name] = draw(valid if kind == "any" else bent(valid))
    return kind, noise, code, payloads


def answer(deed: tuple[str, bytes, int, dict[str, Any]], method: str, stream_id: int) -> bytes | None:
    """Return the bytes of one action; None for the end of the connection."""
    kind, noise, code, payloads = deed
    honest = encode_frame(stream_id, FrameType.RESPONSE, response())
    if kind in {"any", "bent"}:
        # A method with an empty answer gets the answer of another one.
        payload = payloads.get(method, payloads["WaitProcess"])
        return encode_frame(stream_id, FrameType.RESPONSE, response(payload))
    return {
        "agree": honest,
        "bytes": encode_frame(stream_id, FrameType.RESPONSE, noise),
        "refuse": encode_frame(
            stream_id, FrameType.RESPONSE, response(code=code, message="\x1b[31m\n" * 500)
        ),
        "never": b"",
        "twice": honest * 2,
        "stranger": encode_frame(stream_id + 1000, FrameType.RESPONSE, response()),
        "data": encode_frame(stream_id, FrameType.DATA, response()),
        "huge": header(0xFFFF_FFFF, stream_id=stream_id, kind=2) + noise,
        "noise": noise,
        "close": None,
    }[kind]


class HostileAgent:
    """The guest's end of the connection: honest until the script begins, then follows the script."""

    def __init__(
        self, connection: socket.socket, script: list[tuple[str, bytes, int, dict[str, Any]]]
    ) -> None:
        self._connection = connection
        self._script = collections.deque(script)
        self.hostile = False

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        decoder = FrameDecoder()
        with contextlib.suppress(ConnectionError):
            while data := await loop.sock_recv(self._connection, 65536):
                for frame in decoder.feed(data):
                    said = self._answer(frame)
                    if said is None:
                        self._connection.shutdown(socket.SHUT_RDWR)
                        return
                    await loop.sock_sendall(self._connection, said)

    def _answer(self, frame: Frame | OversizedFrame) -> bytes | None:
        assert isinstance(frame, Frame)
        method = ttrpc_pb2.Request.FromString(frame.body).method
        if self.hostile and self._script:
            return answer(self._script.popleft(), method, frame.stream_id)
        honest = b"" if method in _LONG else encode_frame(frame.stream_id, FrameType.RESPONSE, response())
        if method == "GetGuestDetails":
            details = agent_pb2.AgentDetails(extra_features=["hako"])
            payload = agent_pb2.GuestDetailsResponse(agent_details=details).SerializeToString()
            honest = encode_frame(frame.stream_id, FrameType.RESPONSE, response(payload))
        return honest


class Events:
    """Receives the events that the sandbox publishes."""

    def __init__(self) -> None:
        self.all: list[tuple[str, bytes]] = []
        self.feed = EventFeed()

    def publish(self, topic: str, message: Message) -> None:
        self.all.append((topic, message.SerializeToString()))

    @property
    def exits(self) -> list[events_pb2.TaskExit]:
        return [events_pb2.TaskExit.FromString(data) for topic, data in self.all if topic == "/tasks/exit"]


class Defects(logging.Handler):
    """Collects everything logged with a traceback; a guest's answers must not cause one."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(self.format(record))


CALLS: tuple[tuple[str, Any], ...] = (
    ("create", task_v3_pb2.CreateTaskRequest(id="box")),
    ("start", task_v3_pb2.StartRequest(id="box")),
    ("stats", task_v3_pb2.StatsRequest(id="box")),
    ("exec", task_v3_pb2.ExecProcessRequest(id="box", exec_id="shell")),
    ("start", task_v3_pb2.StartRequest(id="box", exec_id="shell")),
    ("pids", task_v3_pb2.PidsRequest(id="box")),
    ("pause", task_v3_pb2.PauseRequest(id="box")),
    ("resume", task_v3_pb2.ResumeRequest(id="box")),
    ("update", task_v3_pb2.UpdateTaskRequest(id="box")),
    ("state", task_v3_pb2.StateRequest(id="box")),
    ("kill", task_v3_pb2.KillRequest(id="box", signal=15)),
    ("wait", task_v3_pb2.WaitRequest(id="box")),
    ("delete", task_v3_pb2.DeleteRequest(id="box", exec_id="shell")),
    ("delete", task_v3_pb2.DeleteRequest(id="box")),
)
for _name, _request in CALLS:
    if _name == "exec":
        _request.spec.value = json.dumps({"args": ["true"], "cwd": "/"}).encode()
    if _name == "update":
        _request.resources.type_url, _request.resources.value = "LinuxResources", b"{}"


async def life(directory: Path, script: list[tuple[str, bytes, int, dict[str, Any]]], begin: int) -> Events:
    """Run one container with an agent that turns hostile at call number ``begin``."""
    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    hostile = HostileAgent(theirs, script)
    serving = asyncio.create_task(hostile.serve())
    events = Events()
    try:
        async with asyncio.timeout(END_TIMEOUT_S), asyncio.TaskGroup() as group:
            ledger = Ledger(str(directory), create=True)
            context = Context(
                record=record(directory),
                config=Config(),
                publisher=cast("Publisher", events),
                ledger=ledger,
                work=Work(group),
                leave=lambda: None,
            )
            sandbox = MachinelessSandbox(context)
            containers = sandbox.containers()
            agent = await Agent.over(ours, timeout_s=END_TIMEOUT_S)
            try:
                hostile.hostile = begin == 0
                with contextlib.suppress(ShimError, TimeoutError):
                    async with asyncio.timeout(CALL_TIMEOUT_S):
                        await agent.create_sandbox(sandbox_id="box", hostname="", dns=[])
                await sandbox.admit(agent)
                await go_through(TaskService(sandbox, containers), hostile, begin, directory)
            finally:
                theirs.shutdown(socket.SHUT_RDWR)
                await agent.aclose()
                for container in cast("list[GuestContainer]", list(containers.all.values())):
                    await container.init.exited.wait()
                    async with container.lock:  # a delete goes on after its client gave up
                        await container._files.take_back()
                ledger.close()
    finally:
        serving.cancel()
        theirs.close()
    assert failures == []
    return events


async def go_through(service: TaskService, hostile: HostileAgent, begin: int, directory: Path) -> None:
    for number, (method, request) in enumerate(CALLS, start=1):
        hostile.hostile = hostile.hostile or number >= begin
        if method == "create":
            request.bundle = str(directory / "bundle")
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                (await getattr(service, method)(request)).SerializeToString()
        except ShimError as error:
            assert str(error)  # noqa: PT017 - a refusal is one of the two right outcomes
        except TimeoutError:  # as if the client's deadline had passed
            continue


def record(directory: Path) -> StartRecord:
    names = ("grpc_address", "ttrpc_address", "publish_binary", "config_text", "config_source", "socket_path")
    empty: dict[str, Any] = dict.fromkeys(names, "")
    return StartRecord(
        **empty,
        namespace="fuzz",
        id="box",
        bundle=str(directory / "bundle"),
        protocol="ttrpc",
        state_directory=str(directory),
        debug=False,
        dialect="1.6",
        started_at=0.0,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a container's root file system needs root")
    directory = tmp_path_factory.mktemp("sandbox")
    (directory / "bundle" / "rootfs").mkdir(parents=True)
    spec = {"process": {"args": ["true"], "cwd": "/"}, "root": {"path": "rootfs"}}
    (directory / "bundle" / "config.json").write_text(json.dumps(spec))
    yield directory
    kernel.detach_mounts(os.path.realpath(directory))


@settings(max_examples=2 * CASES)
@given(script=st.lists(deeds(), min_size=1, max_size=12), begin=st.integers(0, len(CALLS)))
@example(script=[("agree", b"", 0, None)] * 40, begin=2)
@example(script=[("close", b"", 0, None)], begin=2)
@example(script=[("huge", b"x", 0, None)] * 20, begin=2)
def test_any_replies(place: Path, script: list[tuple[str, bytes, int, dict[str, Any]]], begin: int) -> None:
    defects = Defects()
    logging.getLogger().addHandler(defects)
    try:
        events = asyncio.run(life(place, script, begin))
    finally:
        logging.getLogger().removeHandler(defects)
        (place / "ledger").unlink()
        if (place / "share").exists():
            kernel.detach_mounts(os.path.realpath(place / "share"))  # of containers that the agent kept
            shutil.rmtree(place / "share")
    assert defects.found == []
    exits = [event.id for event in events.exits]
    assert len(exits) == len(set(exits))
    assert all(event.exit_status <= 255 for event in events.exits)


@pytest.mark.parametrize("status", [-1, 256, 2**31 - 1, -(2**31)])
async def test_an_impossible_exit_status_becomes_255(status: int) -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    agent = Agent(await TtrpcClient.over(ours))
    waiting = asyncio.create_task(agent.processes.wait("box", exec_id="box"))
    await asyncio.get_running_loop().sock_recv(theirs, 4096)
    payload = agent_pb2.WaitProcessResponse(status=status).SerializeToString()
    await asyncio.get_running_loop().sock_sendall(
        theirs, encode_frame(1, FrameType.RESPONSE, response(payload))
    )
    async with asyncio.timeout(END_TIMEOUT_S):
        assert await waiting == 255
    theirs.close()
    await agent.aclose()
