"""One virtual machine and the containers in it, from the first boot to the last byte.

The machine boots while containerd is still connecting; whoever needs the agent waits for it here. The
death of the machine is an event: it ends every process of the sandbox at once, with a reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hypervisor import AGENT_PORT, Channel, HypervisorError, QemuHypervisor, VmSpec
from proto.containerd import events_pb2
from shim import mounts, postmortem
from shim.agent import Agent
from shim.container import Container, read_spec
from shim.errors import AlreadyExists, DeadlineExceeded, Internal, NotFound, ShimError, Unavailable
from shim.host import resolve
from shim.transfer import RawStreams

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

    from google.protobuf.message import Message

    from proto.containerd.types_pb2 import Mount
    from shim.config import Config
    from shim.events import Publisher
    from shim.ledger import Ledger
    from shim.state_directory import StartRecord
    from shim.stdio import Stdio

_T = TypeVar("_T")

log = logging.getLogger(__name__)

MIB = 1024 * 1024
REASON_TIMEOUT_S = 2.0  # the machine usually says why it ends just after the agent's connection breaks


class Sandbox:
    """The machine of one shim.

    :param record: how the shim was started.
    :param config: the operator's configuration.
    :param publisher: where events go.
    :param ledger: where everything that must be undone is written down.
    :param group: owns every task of the sandbox.
    """

    def __init__(
        self,
        record: StartRecord,
        *,
        config: Config,
        publisher: Publisher,
        ledger: Ledger,
        group: asyncio.TaskGroup,
    ) -> None:
        self.id = record.id
        self.namespace = record.namespace
        self.containers: dict[str, Container] = {}
        self.share = Path(record.state_directory) / "share"
        self._guest_share = Path(record.state_directory) / "guest-share"
        self._record = record
        self._config = config
        self._publisher = publisher
        self._ledger = ledger
        self._group = group
        self._vm: QemuHypervisor | None = None
        self._ready: asyncio.Future[Agent] = asyncio.get_running_loop().create_future()
        self._running: asyncio.Task[None] | None = None
        self._requests: set[asyncio.Task[None]] = set()
        self._doom = ""
        self._has_raw_streams = False

    @property
    def pid(self) -> int:
        """The machine's process: the live host process that stands for every process inside it."""
        return self._vm.pid if self._vm is not None else 0

    def publish(self, topic: str, event: Message) -> None:
        """Queue an event for containerd."""
        self._publisher.publish(topic, event)

    def spawn(self, work: Coroutine[object, object, None], *, name: str) -> asyncio.Task[None]:
        """Run a task that ends with the sandbox; its failure is logged and harms no other container."""

        async def contained() -> None:
            try:
                await work
            except Exception:
                log.exception("%s: unexpected failure", name)

        return self._group.create_task(contained(), name=name)

    def finish(self, work: Coroutine[object, object, _T]) -> asyncio.Future[_T]:
        """Do work to its end, whoever asked for it goes away meanwhile: half done it could not be repeated.

        :returns: its outcome; cancelling that leaves the work alone.
        """
        outcome: asyncio.Future[_T] = asyncio.get_running_loop().create_future()

        async def settled() -> None:
            try:
                result = await work
            except asyncio.CancelledError:
                outcome.cancel()  # the sandbox ends: nobody may wait for this any more
                raise
            except Exception as error:  # noqa: BLE001 - handed on to whoever asked
                if not outcome.done():
                    outcome.set_exception(error)
            else:
                if not outcome.done():
                    outcome.set_result(result)

        task = self._group.create_task(settled(), name="request")
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)
        return outcome

    def start(self) -> None:
        """Begin to boot the machine; :meth:`agent` waits for it."""
        self._running = self._group.create_task(self._live(), name="sandbox")

    async def agent(self) -> Agent:
        """Wait for the machine to be up.

        :returns: the guest agent.
        :raises ShimError: with the reason, if the machine did not come up or is gone.
        """
        return await asyncio.shield(self._ready)

    async def raw_streams(self, stdio: Stdio) -> RawStreams | None:
        """Connect raw streams for a process about to be made, if the channel and the agent have them."""
        if self._vm is None or not self._has_raw_streams:
            return None
        # Without a terminal stdin is wanted in any case: to be ended.
        names = ["stdout", "stdin"] if stdio.terminal else ["stdout", "stderr", "stdin"]
        streams = await RawStreams.open(self._vm, names)
        self._has_raw_streams = streams is not None
        return streams

    async def create(
        self, container_id: str, *, bundle: Path, rootfs: Iterable[Mount], stdio: Stdio
    ) -> Container:
        """Create a container in the machine.

        :raises AlreadyExists: if the id is taken.
        :raises ShimError: if a step fails; the id is free again.
        """
        if container_id in self.containers:
            raise AlreadyExists(f"create: container {container_id}: already exists")
        container = Container(container_id, bundle=bundle, stdio=stdio, sandbox=self)
        self.containers[container_id] = container
        self._ledger.created(container_id)
        try:
            await container.create(rootfs)
        except BaseException:
            del self.containers[container_id]
            raise
        return container

    def container(self, container_id: str) -> Container:
        """Find a container that has been created.

        :raises NotFound: if there is none.
        """
        try:
            return self.containers[container_id]
        except KeyError:
            raise NotFound(f"container {container_id}: not found") from None

    async def switch_off(self, reason: str) -> None:
        """End the machine because it is of no use any more; its processes end with it.

        :param reason: one line for the log.
        """
        self._doom = self._doom or f"switched off: {reason}"
        if self._vm is not None:
            await self._vm.stop()

    async def stop(self) -> None:
        """Switch the machine off and wait until nothing of it is left; stopping twice is harmless."""
        for request in self._requests:
            request.cancel()
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})
        if self._vm is not None:
            await self._vm.stop()
        mounts.unmount(self._guest_share)
        mounts.unmount(self.share)

    async def _live(self) -> None:
        """Boot, then wait for the end of the machine; whoever asks for the agent learns the outcome."""
        try:
            agent = await self._boot()
        except (ShimError, HypervisorError) as error:
            reason = error if isinstance(error, ShimError) else Internal(f"boot: sandbox {self.id}: {error}")
            log.error("%s", reason)  # noqa: TRY400 - the reason is complete; a traceback would bury it
            self._keep_reason(str(reason))
            if self._vm is not None:
                await self._vm.stop()
            self._settle(reason)
            return
        self._ready.set_result(agent)
        log.info("boot: sandbox %s: ready", self.id)
        watching = self.spawn(self._report_ooms(agent), name="out of memory")
        try:
            reason_text = await self._reason_of_end(agent)
            reason_text = self._doom or reason_text
            log.error("sandbox %s: %s", self.id, reason_text)
            self._keep_reason(reason_text)
            self._ready = asyncio.get_running_loop().create_future()
            self._settle(Unavailable(f"sandbox {self.id}: {reason_text}"))
        finally:
            watching.cancel()
            await agent.aclose()

    def _keep_reason(self, reason: str) -> None:
        console = self._vm.console_tail(postmortem.CONSOLE_LINES) if self._vm is not None else []
        try:
            postmortem.write(
                Path(self._config.shim.log_dir),
                namespace=self.namespace,
                sandbox_id=self.id,
                reason=reason,
                console=console,
            )
        except OSError as error:
            log.warning("sandbox %s: its last words are lost: %s", self.id, error)

    async def _report_ooms(self, agent: Agent) -> None:
        """Tell containerd of each container in which the guest's kernel killed for memory."""
        try:
            while True:
                container_id = await agent.next_oom()
                if container_id in self.containers:
                    self.publish("/tasks/oom", events_pb2.TaskOOM(container_id=container_id))
        except ShimError as error:
            log.debug("out of memory: no more reports: %s", error)

    def _settle(self, reason: ShimError) -> None:
        self._ready.set_exception(reason)
        self._ready.exception()  # marks it as seen: maybe nobody asks any more

    async def _boot(self) -> Agent:
        spec = await self._vm_spec()
        timeout_s = self._config.guest.boot_timeout_s
        try:
            async with asyncio.timeout(timeout_s) as limit:
                self._vm = vm = QemuHypervisor(spec, on_process=self._record_process)
                await vm.start(timeout_s=timeout_s)
                connection = await vm.connect(AGENT_PORT, timeout_s=timeout_s)
                agent = await Agent.over(connection, timeout_s=timeout_s)
                await agent.create_sandbox(sandbox_id=self.id, hostname=self._hostname(), dns=[])
                return agent
        except (TimeoutError, DeadlineExceeded) as error:
            if isinstance(error, TimeoutError) and not limit.expired():
                raise
            raise DeadlineExceeded(self._late(timeout_s)) from error
        except Unavailable as error:
            raise Unavailable(f"boot: sandbox {self.id}: {await self._reason_or(error)}") from error

    def _late(self, timeout_s: float) -> str:
        tail = self._vm.console_tail() if self._vm is not None else []
        last = f"its console ends with: {tail[-1]}" if tail else "its console is silent"
        return (
            f"boot: sandbox {self.id}: the guest agent did not answer within {timeout_s:g} s; {last}; "
            "if the guest is only slow, raise [guest] boot_timeout_s"
        )

    async def _vm_spec(self) -> VmSpec:
        config = self._config
        # Before the first await: containers put their files here while the machine still boots.
        self.share.mkdir(mode=0o700, exist_ok=True)
        mounts.share_directory(self.share)
        # A guest writes in what is mounted there, not in the share itself: a link that it put in the way of
        # another container would lead that one's mounts to anywhere on the host.
        self._guest_share.mkdir(mode=0o700, exist_ok=True)
        mounts.bind(self.share, self._guest_share, read_only=True, recursive=False)
        choice = await resolve(config)
        log.info("boot: accelerator %s: %s", choice.accelerator.value, choice.accelerator_reason)
        log.info("boot: channel %s: %s", choice.channel.value, choice.channel_reason)
        self._has_raw_streams = choice.channel is Channel.VHOST_VSOCK
        return VmSpec(
            name=self.id,
            directory=Path(self._record.state_directory),
            qemu=Path(config.hypervisor.qemu),
            machine_options=config.hypervisor.machine_options,
            kernel=Path(config.guest.kernel),
            initrd=Path(config.guest.initrd),
            kernel_parameters=tuple(config.guest.kernel_parameters.split()),
            accelerator=choice.accelerator,
            vcpus=config.hypervisor.vcpus,
            max_vcpus=config.hypervisor.vcpus,
            memory_bytes=config.hypervisor.memory_mib * MIB,
            max_memory_bytes=config.hypervisor.memory_mib * MIB,
            share_source=self._guest_share,
            virtiofsd=choice.virtiofsd,
            channel=choice.channel,
            vsock_daemon=choice.vsock_daemon,
            network_namespace=None,
        )

    def _hostname(self) -> str:
        try:
            spec = read_spec(Path(self._record.bundle))
        except ShimError:  # a sandbox without a container's bundle has no specification
            return ""
        return str(spec.get("hostname") or "")

    def _record_process(self, name: str, pid: int) -> None:
        self._ledger.process(pid, name=name)

    async def _reason_of_end(self, agent: Agent) -> str:
        """Wait for the machine or the agent to go, and say which and why."""
        vm = self._vm
        if vm is None:
            raise Internal(f"sandbox {self.id}: ready without a machine")
        ends = {
            asyncio.ensure_future(vm.wait()),
            asyncio.ensure_future(agent.wait_closed()),
        }
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        reason = await self._reason_or(Unavailable("the guest agent closed its connection"))
        await vm.stop()
        return reason

    async def _reason_or(self, error: ShimError) -> str:
        """Prefer the machine's own word on its end to what was noticed first."""
        if self._vm is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REASON_TIMEOUT_S):
                    return (await self._vm.wait()).reason
        return str(error)
