"""A sandbox's virtual machine on the host: what is made for it, how it comes up, and why it ended.

Its share, its network namespace, its place in the cgroups and its size belong to it and go with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hypervisor import AGENT_PORT, Channel, QemuHypervisor, VmSpec
from shim import mounts, postmortem, timeline
from shim.agent import WATCHABLE_NAME, Agent
from shim.errors import DeadlineExceeded, ShimError, Unavailable
from shim.host import resolve
from shim.host_cgroup import HostCgroup
from shim.network.namespace import namespace_of
from shim.network.network import Network
from shim.resizing import Resizer
from shim.sizing import plan
from shim.timeline_model import guest_phases
from shim.transfer import RawStreams

if TYPE_CHECKING:
    import socket
    from collections.abc import Coroutine, Iterable

    from hypervisor import Hypervisor
    from shim.config import Config
    from shim.ledger import Ledger
    from shim.pod import PodSpec
    from shim.sizing import Limits, Plan
    from shim.stdio import Stdio

_T = TypeVar("_T")

log = logging.getLogger(__name__)

REASON_TIMEOUT_S = 2.0  # the machine usually says why it ends just after the agent's connection breaks


class Machine:
    """The machine of one sandbox; it boots once.

    :param sandbox_id: whose it is.
    :param directory: the sandbox's state directory.
    :param config: the operator's configuration.
    :param ledger: where everything that must be undone is written down.
    """

    def __init__(self, sandbox_id: str, *, directory: Path, config: Config, ledger: Ledger) -> None:
        self.share = directory / "share"
        #: Why it is to end, if that was decided here; what follows from it is no reason of its own.
        self.doom = ""
        self._id = sandbox_id
        self._directory = directory
        self._guest_share = directory / "guest-share"
        self._config = config
        self._ledger = ledger
        self._vm: QemuHypervisor | None = None
        self._cgroup = HostCgroup([])
        self._resizer: Resizer | None = None
        self._network: Network | None = None
        self._has_raw_streams = False
        self._began_at_s = 0.0

    @property
    def pid(self) -> int:
        """The live host process that stands for every process inside it; 0 if there is none yet."""
        return self._vm.pid if self._vm is not None else 0

    @property
    def vm(self) -> Hypervisor:
        """What devices are plugged into.

        :raises Unavailable: if there is no machine yet.
        """
        if self._vm is None:
            raise Unavailable(f"sandbox {self._id}: no machine")
        return self._vm

    async def boot(self, pod: PodSpec) -> Agent:
        """Bring it up, with its share and its network.

        :param pod: what it is for.
        :returns: the guest agent.
        :raises ShimError: with the reason, if it does not come up.
        :raises HypervisorError: as :class:`ShimError`.
        """
        self._began_at_s = time.monotonic()
        sizes = plan(self._config.hypervisor, pod.oci)
        with _phase("share, host's abilities"):
            spec = await self._spec(sizes)
        with _phase("network namespace"):
            self._network = network = await Network.open(
                namespace_of(pod.oci), ledger=self._ledger, queues=spec.vcpus
            )
        spec = dataclasses.replace(spec, network_namespace=network.namespace_path)
        timeout_s = self._config.guest.boot_timeout_s
        try:
            async with asyncio.timeout(timeout_s) as limit:
                if self.doom:
                    raise Unavailable(self.doom)
                self._cgroup = HostCgroup.make(pod.cgroup, ledger=self._ledger)
                self._vm = vm = QemuHypervisor(spec, on_process=self._record_process, phase=_phase)
                self._resizer = Resizer(vm, sizes)
                connection = await _while_preparing(network, _reach(vm, timeout_s=timeout_s))
                with _phase("first answer"):
                    agent = await Agent.over(connection, timeout_s=timeout_s)
                try:
                    with _phase("CreateSandbox"):
                        await agent.create_sandbox(
                            sandbox_id=self._id, hostname=pod.hostname, dns=list(pod.dns)
                        )
                    with _phase("network cards"):
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
            raise Unavailable(f"boot: sandbox {self._id}: {await self._reason_or(error)}") from error

    async def reason_of_end(self, agent: Agent) -> str:
        """Wait for the machine or the agent to go; nothing of the machine runs any more then.

        :param agent: what :meth:`boot` returned.
        :returns: which of them went and why, in one line.
        """
        ends = {asyncio.ensure_future(self.vm.wait()), asyncio.ensure_future(agent.wait_closed())}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        reason = await self._reason_or(Unavailable("the guest agent closed its connection"))
        await self.kill()
        return self.doom or reason

    async def switch_off(self, reason: str) -> None:
        """End it because it is of no use any more; one that is yet to boot will not.

        :param reason: one line for the log.
        """
        self.doom = self.doom or f"switched off: {reason}"
        await self.kill()

    async def kill(self) -> None:
        """End it; killing twice is harmless."""
        if self._vm is not None:
            await self._vm.stop()

    async def clear_away(self) -> None:
        """End it and take back all that was made for it."""
        await self.kill()
        if self._network is not None:
            await self._network.detach()
        for share in (self._guest_share, self.share):
            await asyncio.to_thread(mounts.unmount, share)

    async def raw_streams(self, stdio: Stdio) -> RawStreams | None:
        """Connect raw streams for a process about to be made, if the channel and the agent have them."""
        if self._vm is None or not self._has_raw_streams:
            return None
        # Without a terminal stdin is wanted in any case: to be ended.
        names = ["stdout", "stdin"] if stdio.terminal else ["stdout", "stderr", "stdin"]
        streams = await RawStreams.open(self._vm, names)
        self._has_raw_streams = streams is not None
        return streams

    async def note_guest(self, agent: Agent) -> None:
        """Note in the timeline what the guest did.

        :raises ShimError: if it does not tell.
        """
        if not agent.is_hako:
            return
        asked_s = time.monotonic()
        report = await agent.timeline()
        for phase in guest_phases(
            report, asked_s=asked_s, answered_s=time.monotonic(), since_s=self._began_at_s
        ):
            timeline.note(phase.name, lane=phase.lane, began_s=phase.began_s, ended_s=phase.ended_s)

    async def follow_network(self) -> None:
        """Take what came to its network namespace meanwhile, as some put it there before a start.

        :raises ShimError: if it cannot have it.
        """
        if self._network is not None:
            await self._network.rescan()

    async def grow(self, agent: Agent, live: Iterable[Limits]) -> None:
        """Become large enough for containers.

        :param live: the limits of each.
        :raises ResourceExhausted: if it cannot be done.
        """
        if self._resizer is not None:
            await self._resizer.grow(agent, live)

    async def shrink(self, agent: Agent, live: Iterable[Limits]) -> None:
        """Give back what containers have no use for.

        :param live: the limits of each.
        """
        if self._resizer is not None:
            await self._resizer.shrink(agent, live)

    def keep_reason(self, reason: str, *, namespace: str) -> None:
        """Leave behind why it ended and what it said last, for ``hako logs``.

        :param reason: one line.
        :param namespace: containerd's.
        """
        try:
            postmortem.write(
                Path(self._config.shim.log_dir),
                namespace=namespace,
                sandbox_id=self._id,
                reason=reason,
                console=self._console(postmortem.CONSOLE_LINES),
            )
        except OSError as error:
            log.warning("sandbox %s: its last words are lost: %s", self._id, error)

    def _console(self, lines: int) -> list[str]:
        return self._vm.console_tail(lines) if self._vm is not None else []

    def _late(self, timeout_s: float) -> str:
        tail = self._console(1)
        last = f"its console ends with: {tail[-1]}" if tail else "its console is silent"
        return (
            f"boot: sandbox {self._id}: the guest agent did not answer within {timeout_s:g} s; {last}; "
            "if the guest is only slow, raise [guest] boot_timeout_s"
        )

    async def _spec(self, sizes: Plan) -> VmSpec:
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
            name=self._id,
            directory=self._directory,
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

    async def _reason_or(self, error: ShimError) -> str:
        """Prefer the machine's own word on its end to what was noticed first."""
        if self._vm is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REASON_TIMEOUT_S):
                    return (await self._vm.wait()).reason
        return str(error)


async def _reach(vm: QemuHypervisor, *, timeout_s: float) -> socket.socket:
    await vm.start(timeout_s=timeout_s)
    with _phase("until the guest listens"):
        return await vm.connect(AGENT_PORT, timeout_s=timeout_s)


def _phase(name: str) -> contextlib.AbstractContextManager[None]:
    return timeline.phase(name, lane=timeline.MACHINE)


async def _while_preparing(network: Network, booting: Coroutine[object, object, _T]) -> _T:
    """Do the namespace's part of the network while the machine boots; a failure of one ends the other."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(network.prepare(), name="network")
            return await booting
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
