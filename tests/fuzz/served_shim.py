"""The program behind the ``shim`` fixture: everything of the daemon but the virtual machine.

Run as ``python -m tests.fuzz.served_shim DIRECTORY``. It serves ``DIRECTORY/ttrpc`` and ``DIRECTORY/grpc``,
and writes a line to standard output when both listen. An honest agent answers over a socket: it keeps track
of processes and agrees to everything else.
"""

from __future__ import annotations

import asyncio
import collections
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message_factory import GetMessageClass

from hypervisor import Accelerator, Channel
from proto.containerd import task_v2_pb2, task_v3_pb2
from proto.kata import agent_pb2, health_pb2
from shim.agent.client import Agent
from shim.config import Config
from shim.errors import Unavailable
from shim.host import mounts
from shim.host.ledger import Ledger
from shim.host.state_directory import StartRecord
from shim.machine.parking import Parking
from shim.machine.running import RunningMachine
from shim.sandbox.containers import Containers
from shim.sandbox.context import Context
from shim.sandbox.life import Happening
from shim.sandbox.sandbox import Sandbox
from shim.sandbox.shared_volumes import SharedVolumes
from shim.sandbox.work import Work
from shim.services.task import TaskService
from shim.telemetry.events import Publisher
from shim.telemetry.log import configure
from shim.transport.dispatch import Dispatch, snake_case
from shim.transport.grpc_server import serve_grpc
from shim.transport.ttrpc_server import TtrpcServer

if TYPE_CHECKING:
    from typing import Any

    from hypervisor import Hypervisor, VmSpec
    from shim.machine.machine import Machine
    from shim.machine.resizing import Resizer
    from shim.network.network import Network


_SERVICE = agent_pb2.DESCRIPTOR.services_by_name["AgentService"]


class HonestAgent:
    """A guest agent in which processes live until they are killed and write nothing."""

    def __init__(self) -> None:
        self._ended: collections.defaultdict[Any, asyncio.Event] = collections.defaultdict(asyncio.Event)
        for method in _SERVICE.methods:
            name = snake_case(method.name)
            if not hasattr(self, name):
                setattr(self, name, partial(self._agree, GetMessageClass(method.output_type)))

    async def _agree(self, reply: Any, _request: Any) -> Any:
        return reply()

    async def get_guest_details(self, _request: Any) -> Any:
        details = agent_pb2.AgentDetails(extra_features=["hako"], supports_seccomp=True)
        return agent_pb2.GuestDetailsResponse(agent_details=details)

    async def signal_process(self, request: Any) -> Any:
        if request.signal == signal.SIGKILL:
            self._end(request.container_id, request.exec_id)
        return Empty()

    async def remove_container(self, request: Any) -> Any:
        self._end(request.container_id, "")
        return Empty()

    def _end(self, container_id: Any, exec_id: Any) -> None:
        for (container, process), ended in self._ended.items():
            if container == container_id and exec_id in {"", process}:
                ended.set()

    async def create_container(self, request: Any) -> Any:
        self._ended[request.container_id, request.exec_id] = asyncio.Event()
        return Empty()

    async def exec_process(self, request: Any) -> Any:
        self._ended[request.container_id, request.exec_id] = asyncio.Event()
        return Empty()

    async def wait_process(self, request: Any) -> Any:
        await self._ended[request.container_id, request.exec_id].wait()
        return agent_pb2.WaitProcessResponse(status=137)

    async def read_stdout(self, request: Any) -> Any:
        await self._ended[request.container_id, request.exec_id].wait()
        return agent_pb2.ReadStreamResponse()

    read_stderr = read_stdout

    async def get_oom_event(self, _request: Any) -> None:
        await asyncio.Event().wait()

    async def check(self, _request: Any) -> Any:
        return health_pb2.HealthCheckResponse()


class Pretence:
    """Stands for a machine, its network and its size; it ends with its agent."""

    pid = 1

    def __init__(self, directory: Any) -> None:
        self.share = directory / "share"

    def share_daemons(self) -> Any:
        return []

    async def do_nothing(self, *_: Any, **_named: Any) -> None:
        return

    rescan = changed = grow = shrink = switch_off = do_nothing


class MachinelessSandbox(Sandbox):
    """A sandbox without a machine, whose agent is there from the beginning."""

    def __init__(self, context: Any) -> None:
        self.pretence = Pretence(context.directory)
        super().__init__(context, cast("Machine", self.pretence))

    def containers(self) -> Any:
        return Containers(
            self._context, self, SharedVolumes.of(cast("Machine", self.pretence), work=self.work)
        )

    async def admit(self, agent: Agent) -> None:
        self.pretence.share.mkdir()
        self._apply(Happening.START)
        self._apply(Happening.READY)
        self._now = RunningMachine(
            vm=cast("Hypervisor", SimpleNamespace(processes=list)),
            agent=agent,
            network=cast("Network", self.pretence),
            resizer=cast("Resizer", self.pretence),
            spec=cast("VmSpec", SimpleNamespace(accelerator=Accelerator.KVM, channel=Channel.VIRTIO_SERIAL)),
            template_key="",
            began_s=0.0,
            given_up=asyncio.Event(),
            parking=Parking(
                cast("Hypervisor", None), agent, directory="", switch_off=self.pretence.switch_off
            ),
            park_after_s=0,
        )
        self._settled.set()
        self.work.spawn(self._end_with(agent), name="end")

    async def _end_with(self, agent: Any) -> None:
        await agent.wait_closed()
        self._apply(Happening.GONE)
        self._conclude(Unavailable("the agent is gone"))


def listen(path: str) -> Any:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(100)
    return listener


async def serve(directory: Any) -> None:
    state = directory / "state"
    state.mkdir()
    record = StartRecord(
        namespace="fuzz",
        id="box",
        bundle=str(directory / "bundle"),
        grpc_address="",
        ttrpc_address="",
        publish_binary="",
        config_text="",
        config_source="",
        protocol="ttrpc",
        socket_path=str(directory / "ttrpc"),
        state_directory=str(state),
        debug=False,
        dialect="1.6",
        started_at=0.0,
    )
    honest = HonestAgent()
    guest = Dispatch([(_SERVICE, honest), (health_pb2.DESCRIPTOR.services_by_name["Health"], honest)])
    async with asyncio.TaskGroup() as group:
        group.create_task(TtrpcServer(guest).serve(listen(directory / "agent")))
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(directory / "agent"))
        connection.setblocking(False)
        agent = await Agent.over(connection, timeout_s=60)
        await agent.create_sandbox(sandbox_id="box", hostname="", dns=[])
        context = Context(
            record=record,
            config=Config(),
            publisher=Publisher("", namespace="fuzz"),
            ledger=Ledger(str(state), create=True),
            work=Work(group),
            leave=lambda: None,
        )
        sandbox = MachinelessSandbox(context)
        containers = sandbox.containers()
        await sandbox.admit(agent)
        task = TaskService(sandbox, containers)
        dispatch = Dispatch(
            [
                (task_v3_pb2.DESCRIPTOR.services_by_name["Task"], task),
                (task_v2_pb2.DESCRIPTOR.services_by_name["Task"], task),
            ]
        )
        group.create_task(TtrpcServer(dispatch).serve(listen(directory / "ttrpc")))
        async with serve_grpc(dispatch, directory / "grpc"):
            print("ready", flush=True)
            await asyncio.Event().wait()


def protect_host(directory: Any) -> None:
    """Let hostile requests write only below ``directory``, and hide what they mount from other processes."""
    mounts.enter_private_namespace()
    mounts.mount(str(directory), directory, flags=mounts.MS_BIND)
    targets = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for target in {"/", "/run", "/tmp"} & set(targets):
        mounts.mount("none", Path(target), flags=mounts.MS_BIND | mounts.MS_REMOUNT | mounts.MS_RDONLY)


def main() -> None:
    directory = Path(sys.argv[1])
    configure("info")
    protect_host(directory)
    asyncio.run(serve(directory))


if __name__ == "__main__":
    main()
