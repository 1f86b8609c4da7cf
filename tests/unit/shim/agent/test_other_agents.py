"""With an agent other than Hako's, the shim speaks plain Kata protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from proto.kata import agent_pb2, oci_pb2
from shim.agent.client import Agent
from shim.agent.guest_paths import SHM_DIRECTORY
from shim.errors import Internal, InvalidArgument, NotFound, Unimplemented

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from shim.errors import ShimError
    from shim.transport.ttrpc_client import TtrpcClient

ANYHOW = """Invalid container id

Caused by:
    0: No such container
    1: os error 2

Stack backtrace:
   0: anyhow::error::new
   1: core::ops
"""


class Peer:
    """An agent with some features; it answers every request with an empty message or an error."""

    def __init__(self, *features: str, error: ShimError | None = None) -> None:
        self.requests: list[tuple[str, Message]] = []
        self._features = features
        self._error = error

    async def call(
        self, _service: str, method: str, request: Message, reply: type[Message], **_: object
    ) -> Message:
        self.requests.append((method, request))
        if self._error is not None:
            raise self._error
        answer = reply()
        if isinstance(answer, agent_pb2.GuestDetailsResponse):
            answer.agent_details.extra_features.extend(self._features)
        return answer

    def asked(self, method: str) -> list[Message]:
        return [request for name, request in self.requests if name == method]


async def sandbox_of(peer: Peer) -> Agent:
    agent = Agent(cast("TtrpcClient", peer))
    await agent.create_sandbox(sandbox_id="box", hostname="box", dns=[])
    return agent


async def test_a_stock_agents_shared_memory_is_remounted_with_its_size() -> None:
    peer = Peer("seccomp")
    await sandbox_of(peer)
    [request] = peer.asked("UpdateEphemeralMounts")
    assert isinstance(request, agent_pb2.UpdateEphemeralMountsRequest)
    [storage] = request.storages
    assert storage.mount_point == SHM_DIRECTORY
    assert {"remount", "size=67108864", "mode=1777"} <= set(storage.options)


async def test_hakos_agent_is_asked_for_shared_memory_only_once() -> None:
    peer = Peer("hako")
    await sandbox_of(peer)
    assert not peer.asked("UpdateEphemeralMounts")


async def test_no_container_has_the_sandboxs_id_at_the_agent() -> None:
    peer = Peer()
    await sandbox_of(peer)
    [request] = peer.asked("CreateSandbox")
    assert isinstance(request, agent_pb2.CreateSandboxRequest)
    assert request.sandbox_id not in {"", "box"}, "else its kills for memory would not be reported"


@pytest.mark.parametrize(
    ("features", "is_hako", "frames"),
    [
        ((), False, False),
        (("seccomp", "agent-policy"), False, False),
        (("hako",), True, False),
        (("hako", "hako.streams"), True, True),
    ],
)
async def test_extensions_are_used_only_if_the_agent_offers_them(
    features: tuple[str, ...], *, is_hako: bool, frames: bool
) -> None:
    agent = await sandbox_of(Peer(*features))
    assert (agent.is_hako, agent.frames_streams) == (is_hako, frames)


@pytest.mark.parametrize(("feature", "asked"), [("seccomp", 1), ("hako", 0)])
async def test_a_terminals_size_is_set_unless_the_agent_reads_it(feature: str, asked: int) -> None:
    peer = Peer(feature)
    agent = await sandbox_of(peer)
    box = oci_pb2.Box(Height=31, Width=97)
    whole = oci_pb2.Spec(Process=oci_pb2.Process(Terminal=True, ConsoleSize=box))
    await agent.containers.create(
        agent_pb2.CreateContainerRequest(container_id="box", exec_id="box", OCI=whole)
    )
    await agent.processes.execute(
        agent_pb2.ExecProcessRequest(container_id="box", exec_id="one", process=whole.Process)
    )
    await agent.processes.execute(agent_pb2.ExecProcessRequest(process=oci_pb2.Process(ConsoleSize=box)))
    requests = [
        agent_pb2.TtyWinResizeRequest(container_id="box", exec_id=name, row=31, column=97)
        for name in ("box", "one")
    ]
    assert peer.asked("TtyWinResize") == requests * asked


@pytest.mark.parametrize(
    ("feature", "limits"),
    [("seccomp", ((1 << 63) - 4096, (1 << 63) - 4096, 50_000_000)), ("hako", (-1, -1, -1))],
)
async def test_a_limit_is_lifted_in_the_agents_terms(feature: str, limits: tuple[int, int, int]) -> None:
    peer = Peer(feature)
    agent = await sandbox_of(peer)
    resources = oci_pb2.LinuxResources(
        Memory=oci_pb2.LinuxMemory(Limit=-1, Swap=-1), CPU=oci_pb2.LinuxCPU(Quota=-1, Period=50_000)
    )
    await agent.containers.update("box", resources)
    await agent.containers.update("box", oci_pb2.LinuxResources())
    lifted, nothing = peer.asked("UpdateContainer")
    assert isinstance(lifted, agent_pb2.UpdateContainerRequest)
    sent = lifted.resources
    assert (sent.Memory.Limit, sent.Memory.Swap, sent.CPU.Quota) == limits
    assert nothing == agent_pb2.UpdateContainerRequest(
        container_id="box", resources=oci_pb2.LinuxResources()
    ), "an omitted limit stays"


async def test_a_control_file_that_a_stock_agent_ignores_is_refused_by_name() -> None:
    peer = Peer("seccomp")
    agent = await sandbox_of(peer)
    with pytest.raises(InvalidArgument, match=r"resources: unified: memory\.high: .*; leave it out"):
        await agent.containers.update("box", oci_pb2.LinuxResources(), unified={"memory.high": "1"})
    assert peer.asked("UpdateContainer") == []


@pytest.mark.parametrize(
    ("feature", "sent"), [("seccomp", [("2MB", 4 << 20)]), ("hako", [("1GB", 0), ("2MB", 4 << 20)])]
)
async def test_only_hakos_agent_learns_that_no_huge_pages_are_allowed(
    feature: str, sent: list[tuple[str, int]]
) -> None:
    peer = Peer(feature)
    agent = await sandbox_of(peer)
    limits = [
        oci_pb2.LinuxHugepageLimit(Pagesize=size, Limit=limit)
        for size, limit in (("1GB", 0), ("2MB", 4 << 20))
    ]
    resources = oci_pb2.LinuxResources(HugepageLimits=limits)
    await agent.containers.update("box", resources)
    (update,) = peer.asked("UpdateContainer")
    assert isinstance(update, agent_pb2.UpdateContainerRequest)
    assert [(one.Pagesize, one.Limit) for one in update.resources.HugepageLimits] == sent


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        (Internal(ANYHOW), Internal("Invalid container id: No such container: os error 2")),
        (
            Internal(r'"update: Link not found\n\nStack backtrace:\n   0: <x>"'),
            Internal("update: Link not found"),
        ),
        (InvalidArgument('"invalid container id"'), InvalidArgument("invalid container id")),
        (
            Internal('rpc status: Status { code: NOT_FOUND, message: "InvalidExecId", details: [] }'),
            NotFound("InvalidExecId"),
        ),
        (
            Internal(r'rpc status: Status { code: WHAT, message: "say \"no\"", special_fields: X { } }'),
            Internal('say "no"'),
        ),
        (
            NotFound("/grpc.AgentService/ResizeVolume is not supported"),
            Unimplemented("/grpc.AgentService/ResizeVolume is not supported"),
        ),
        (NotFound("InvalidExecId"), NotFound("InvalidExecId")),
        (Internal('"'), Internal('"')),
    ],
)
async def test_an_agents_error_becomes_one_line_of_the_right_class(
    answer: ShimError, meaning: ShimError
) -> None:
    agent = Agent(cast("TtrpcClient", Peer(error=answer)))
    with pytest.raises(type(meaning)) as caught:
        await agent.containers.start("box")
    assert type(caught.value) is type(meaning)
    assert str(caught.value) == str(meaning)
