"""One virtual machine and the containers in it, from the first boot to the last byte.

The machine boots while containerd is still connecting; whoever needs the agent waits for it here. The
death of the machine is an event: it ends every process of the sandbox at once, with a reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hypervisor import AGENT_PORT, Channel, HypervisorError, QemuHypervisor, VmSpec
from proto.containerd import events_pb2
from shim import metrics, mounts, postmortem, state_directory
from shim.agent import WATCHABLE_NAME, Agent
from shim.container import Container, read_spec
from shim.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    NotFound,
    ShimError,
    Unavailable,
)
from shim.hooks import Hooks
from shim.host import resolve
from shim.host_cgroup import HostCgroup
from shim.network.namespace import namespace_of
from shim.network.network import Network
from shim.oci import refusing_malformed
from shim.pause_container import PauseContainer
from shim.pod import is_pause, with_files, with_sysctls, write_files
from shim.resizing import Resizer
from shim.sizing import plan
from shim.transfer import RawStreams
from shim.volume_source import GuestWritable

if TYPE_CHECKING:
    import socket
    from collections.abc import Coroutine, Iterable

    from google.protobuf.message import Message

    from hypervisor import Hypervisor
    from proto.containerd.types_pb2 import Mount
    from proto.kata import agent_pb2
    from shim.config import Config
    from shim.events import Publisher
    from shim.ledger import Ledger
    from shim.pod import PodSpec
    from shim.sizing import Limits, Plan
    from shim.state_directory import StartRecord
    from shim.stdio import Stdio

_T = TypeVar("_T")

log = logging.getLogger(__name__)

PING_TIMEOUT_S = 2.0  # an agent that is well answers in milliseconds, under emulation too
END_TIMEOUT_S = 10.0  # for a machine that is killed to be gone
STATUS_KILLED = 128 + signal.SIGKILL
REASON_TIMEOUT_S = 2.0  # the machine usually says why it ends just after the agent's connection breaks


class Sandbox:
    """The machine of one shim.

    :param record: how the shim was started.
    :param config: the operator's configuration.
    :param publisher: where events go.
    :param ledger: where everything that must be undone is written down.
    :param group: owns every task of the sandbox.
    :param host_mounts: the mount namespace of whoever started the shim, open; None is this process's own.
    """

    def __init__(
        self,
        record: StartRecord,
        *,
        config: Config,
        publisher: Publisher,
        ledger: Ledger,
        group: asyncio.TaskGroup,
        host_mounts: int | None = None,
    ) -> None:
        self.id = record.id
        self.namespace = record.namespace
        self.containers: dict[str, Container] = {}
        self.share = Path(record.state_directory) / "share"
        self.guest_writable = GuestWritable()
        self._guest_share = Path(record.state_directory) / "guest-share"
        self._files = Path(record.state_directory) / "etc"
        self._pod: PodSpec | None = None
        self._record = record
        self._config = config
        self._publisher = publisher
        self._ledger = ledger
        self._host_mounts = host_mounts
        self._group = group
        self._vm: QemuHypervisor | None = None
        self._cgroup = HostCgroup([])
        self._resizer: Resizer | None = None
        self._network: Network | None = None
        self._ready: asyncio.Future[Agent] = asyncio.get_running_loop().create_future()
        self._running: asyncio.Task[None] | None = None
        self._requests: set[asyncio.Task[None]] = set()
        self._doom = ""
        self._is_end_wanted = False
        #: Version 3 of the shim protocol: containerd creates further containers without a ``start``.
        self.is_joined_without_start = record.version >= 3
        #: Held by containerd's sandbox service: then only that ends the shim.
        self.held = False
        self.ended = asyncio.Event()
        self.ended_at_s: float | None = None
        self._has_raw_streams = False

    @property
    def pid(self) -> int:
        """The machine's process: the live host process that stands for every process inside it."""
        return self._vm.pid if self._vm is not None else 0

    @property
    def vm(self) -> Hypervisor:
        """The machine; there is one as soon as :meth:`agent` has returned."""
        if self._vm is None:
            raise Unavailable(f"sandbox {self.id}: no machine")
        return self._vm

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

    @property
    def is_started(self) -> bool:
        """Whether the machine boots, runs or has ended."""
        return self._running is not None or self._ready.done()

    @property
    def is_ready(self) -> bool:
        """Whether the machine is up."""
        return self._ready.done() and self._ready.exception() is None

    @property
    def is_needed(self) -> bool:
        """Whether containerd has a container in it, or holds it by its sandbox service."""
        return bool(self.containers) or self.held

    @property
    def exit_status(self) -> int:
        """How the machine ended: 0 if that was wanted, or as a process that was killed."""
        return 0 if self._is_end_wanted else STATUS_KILLED

    @property
    def created_at_s(self) -> float:
        """When the sandbox was asked for, in seconds since 1970."""
        return self._record.started_at

    @property
    def reason_of_end(self) -> str:
        """One line; empty as long as there is a machine, or one to come."""
        error = self._ready.exception() if self._ready.done() else None
        return str(error or "")

    def start(self, pod: PodSpec) -> None:
        """Begin to boot the machine; :meth:`agent` waits for it.

        :param pod: what it is for.
        """
        self._pod = pod
        self._running = self._group.create_task(self._live(pod), name="sandbox")

    def hold(self, pod: PodSpec) -> None:
        """Let containerd's sandbox service have the machine, and begin to boot it unless it does already.

        :param pod: what it is for.
        :raises Internal: if the files of the pod cannot be written.
        """
        try:
            write_files(pod, self._files)
        except OSError as error:
            raise Internal(f"create: {error.filename}: {error.strerror}; look at the host") from error
        self.held = True
        if not self.is_started:
            self.start(pod)

    def complete(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Add to a container's specification what it shares with its pod.

        :raises InvalidArgument: if the specification is malformed.
        """
        with refusing_malformed("config.json"):
            if self._pod is not None and self._pod.sysctls:
                spec = with_sysctls(spec, self._pod.sysctls)
            return with_files(spec, self._files) if self.held else spec

    async def agent(self) -> Agent:
        """Wait for the machine to be up.

        :returns: the guest agent.
        :raises FailedPrecondition: if nobody has said yet what the machine is for.
        :raises ShimError: with the reason, if the machine did not come up or is gone.
        """
        if not self.is_started:
            raise FailedPrecondition(f"sandbox {self.id}: not created yet; call CreateSandbox first")
        return await asyncio.shield(self._ready)

    async def ping(self) -> None:
        """Have the agent answer now.

        :raises DeadlineExceeded: if it does not.
        :raises ShimError: if the machine is not up.
        """
        if self.is_started and not self._ready.done():
            raise Unavailable(f"ping: sandbox {self.id}: still boots; ask again")
        await (await self.agent()).check(timeout_s=PING_TIMEOUT_S)

    async def stats(self) -> agent_pb2.StatsContainerResponse:
        """Measure all containers together.

        :raises ShimError: if the machine is not up.
        """
        await self.agent()
        containers = [one for one in self.containers.values() if not isinstance(one, PauseContainer)]
        measured = await asyncio.gather(*(_measure(one) for one in containers))
        return metrics.total(one for one in measured if one is not None)

    def hooks(self, container_id: str, *, bundle: Path, spec: dict[str, Any]) -> Hooks:
        """Read the hooks of a container.

        :raises InvalidArgument: if one is malformed, or cannot be run on the host.
        """
        return Hooks(
            container_id,
            bundle=bundle,
            spec=spec,
            mount_namespace=self._host_mounts,
            ledger=self._ledger,
        )

    async def raw_streams(self, stdio: Stdio) -> RawStreams | None:
        """Connect raw streams for a process about to be made, if the channel and the agent have them."""
        if self._vm is None or not self._has_raw_streams:
            return None
        # Without a terminal stdin is wanted in any case: to be ended.
        names = ["stdout", "stdin"] if stdio.terminal else ["stdout", "stderr", "stdin"]
        streams = await RawStreams.open(self._vm, names)
        self._has_raw_streams = streams is not None
        return streams

    async def follow_network(self) -> None:
        """Give the machine what came to its network namespace meanwhile, as some put it there before a start.

        :raises ShimError: if it cannot have it.
        """
        await self.agent()
        if self._network is not None:
            await self._network.rescan()

    async def create(
        self, container_id: str, *, bundle: Path, rootfs: Iterable[Mount], stdio: Stdio
    ) -> Container:
        """Create a container in the machine.

        :raises AlreadyExists: if the id is taken.
        :raises ShimError: if a step fails; the id is free again.
        """
        if not self.is_started:
            raise FailedPrecondition(f"create: container {container_id}: its sandbox is not created yet")
        if container_id in self.containers:
            raise AlreadyExists(f"create: container {container_id}: already exists")
        spec = read_spec(bundle)
        kind = PauseContainer if is_pause(spec) else Container
        container = kind(container_id, bundle=bundle, spec=spec, stdio=stdio, sandbox=self)
        self.containers[container_id] = container
        self._ledger.created(container_id)
        try:
            if self.is_joined_without_start:
                self._point_to_state(bundle)
            await container.create(rootfs)
        except BaseException:
            self.forget(container_id)
            raise
        return container

    def forget(self, container_id: str) -> None:
        """Let go of a container: nothing of it is left, or its creation failed."""
        self.containers.pop(container_id, None)
        self._ledger.deleted(container_id)
        if self.containers:  # the machine of the last one goes as a whole
            self.spawn(self._shrink_if_alive(), name="shrink")

    async def grow(self) -> None:
        """Make the machine large enough for its containers.

        :raises ResourceExhausted: if it cannot be done.
        """
        agent = await self.agent()
        if self._resizer is not None:
            await self._resizer.grow(agent, self._live_limits())

    async def shrink(self) -> None:
        """Take from the machine what its containers have no use for."""
        agent = await self.agent()
        if self._resizer is not None:
            await self._resizer.shrink(agent, self._live_limits())

    async def _shrink_if_alive(self) -> None:
        try:
            await self.shrink()
        except ShimError as error:
            log.debug("shrink: sandbox %s: %s", self.id, error)

    def _live_limits(self) -> list[Limits]:
        live = (one for one in self.containers.values() if not one.init.exited.is_set())
        return [one.limits for one in live if not isinstance(one, PauseContainer)]

    def _point_to_state(self, bundle: Path) -> None:
        """Leave in the bundle what ``start`` would have, had it been run for this container."""
        try:
            state_directory.point_to(self._record.state_directory, bundle=str(bundle))
        except OSError as error:
            raise Internal(f"create: {bundle}: {error.strerror}; look at the host") from error

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

    async def end(self) -> None:
        """Switch the machine off because containerd is done with it; return when it is off.

        :raises DeadlineExceeded: if it does not go.
        """
        self._is_end_wanted = self._is_end_wanted or not self.ended.is_set()
        await self.switch_off("its end was asked for")
        if not self.is_started:
            self._over(Unavailable(f"sandbox {self.id}: {self._doom}"))
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await self.ended.wait()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"stop: sandbox {self.id}: its machine, pid {self.pid}, is not gone after {END_TIMEOUT_S:g} s"
            ) from error

    async def stop(self) -> None:
        """Switch the machine off and wait until nothing of it is left; stopping twice is harmless."""
        for request in self._requests:
            request.cancel()
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})
        if self._vm is not None:
            await self._vm.stop()
        if self._network is not None:
            await self._network.detach()
        mounts.unmount(self._guest_share)
        mounts.unmount(self.share)

    async def _live(self, pod: PodSpec) -> None:
        """Boot, then wait for the end of the machine; whoever asks for the agent learns the outcome."""
        reason: ShimError = Unavailable(f"sandbox {self.id}: its shim ends")
        try:
            reason = await self._live_until_over(pod)
        finally:
            self._over(reason)

    async def _live_until_over(self, pod: PodSpec) -> ShimError:
        """Return why the machine did not come up, or why it ended."""
        try:
            agent = await self._boot(pod)
        except (ShimError, HypervisorError) as error:
            reason = error if isinstance(error, ShimError) else Internal(f"boot: sandbox {self.id}: {error}")
            self._report_end(str(reason))
            if self._vm is not None:
                await self._vm.stop()
            return reason
        self._ready.set_result(agent)
        log.info("boot: sandbox %s: ready", self.id)
        watching = self.spawn(self._report_ooms(agent), name="out of memory")
        try:
            reason_text = await self._reason_of_end(agent)
            reason_text = self._doom or reason_text
            self._report_end(f"sandbox {self.id}: {reason_text}")
            return Unavailable(f"sandbox {self.id}: {reason_text}")
        finally:
            watching.cancel()
            await agent.aclose()

    def _report_end(self, reason: str) -> None:
        if self._is_end_wanted:
            log.info("%s", reason)
            return
        log.error("%s", reason)
        self._keep_reason(reason)

    def _over(self, reason: ShimError) -> None:
        """Let everybody know that there is no machine any more."""
        if self._ready.done():
            self._ready = asyncio.get_running_loop().create_future()
        self._ready.set_exception(reason)
        self._ready.exception()  # marks it as seen: maybe nobody asks any more
        self.ended_at_s = time.time()
        self.ended.set()

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

    async def _boot(self, pod: PodSpec) -> Agent:
        sizes = plan(self._config.hypervisor, pod.oci)
        spec = await self._vm_spec(sizes)
        self._network = network = await Network.open(
            namespace_of(pod.oci), ledger=self._ledger, queues=spec.vcpus
        )
        spec = dataclasses.replace(spec, network_namespace=network.namespace_path)
        timeout_s = self._config.guest.boot_timeout_s
        try:
            async with asyncio.timeout(timeout_s) as limit:
                if self._doom:
                    raise Unavailable(self._doom)
                self._cgroup = HostCgroup.make(pod.cgroup, ledger=self._ledger)
                self._vm = vm = QemuHypervisor(spec, on_process=self._record_process)
                self._resizer = Resizer(vm, sizes)
                connection = await _while_preparing(network, _reach(vm, timeout_s=timeout_s))
                agent = await Agent.over(connection, timeout_s=timeout_s)
                try:
                    await agent.create_sandbox(sandbox_id=self.id, hostname=pod.hostname, dns=list(pod.dns))
                    await network.attach(machine=vm, agent=agent)
                except BaseException:
                    await agent.aclose()
                    raise
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

    async def _vm_spec(self, sizes: Plan) -> VmSpec:
        config = self._config
        # Before the first await: containers put their files here while the machine still boots.
        self.share.mkdir(mode=0o700, exist_ok=True)
        mounts.share_directory(self.share)
        (self.share / WATCHABLE_NAME).mkdir(mode=0o755)
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
            vcpus=sizes.boot.vcpus,
            max_vcpus=sizes.most.vcpus,
            memory_bytes=sizes.boot.memory_bytes,
            max_memory_bytes=sizes.most.memory_bytes,
            share_source=self._guest_share,
            virtiofsd=choice.virtiofsd,
            channel=choice.channel,
            vsock_daemon=choice.vsock_daemon,
            network_namespace=None,
            root_ports=config.hypervisor.root_ports,
        )

    def _record_process(self, name: str, pid: int) -> None:
        self._ledger.process(pid, name=name)
        self._cgroup.add(pid)

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


async def _measure(container: Container) -> agent_pb2.StatsContainerResponse | None:
    """Measure one container of many; one that ends meanwhile counts for nothing."""
    try:
        return await container.stats()
    except ShimError as error:
        log.debug("stats: container %s: %s", container.id, error)
        return None


async def _reach(vm: QemuHypervisor, *, timeout_s: float) -> socket.socket:
    await vm.start(timeout_s=timeout_s)
    return await vm.connect(AGENT_PORT, timeout_s=timeout_s)


async def _while_preparing(network: Network, booting: Coroutine[object, object, _T]) -> _T:
    """Do the namespace's part of the network while the machine boots; a failure of one ends the other."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(network.prepare(), name="network")
            return await booting
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
