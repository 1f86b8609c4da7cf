"""A sandbox's virtual machine on the host: what is made for it, how it comes up, and why it ended.

Its share, its network namespace, its place in the cgroups and its size belong to it and go with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import socket
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hypervisor import (
    SHARE_DAEMON,
    Accelerator,
    Channel,
    ChannelError,
    HypervisorError,
    QemuHypervisor,
    TemplateError,
    VmSpec,
    template_key,
)
from proto.extensions import AGENT_PORT
from shim.agent.client import Agent
from shim.agent.guest_paths import MODULES_NAME, WATCHABLE_NAME
from shim.agent.guest_streams import LongStreams, RawStreams, RequestStreams
from shim.agent.oci_namespaces import namespace_of
from shim.errors import DeadlineExceeded, ShimError, Unavailable
from shim.host import mounts
from shim.machine import turns
from shim.machine.cgroup import HostCgroup
from shim.machine.cloning import LATE, blames_template, dial_clone
from shim.machine.host_choice import EMULATION_IS_NO_BOUNDARY, resolve
from shim.machine.pod import refuses_template
from shim.machine.resizing import Resizer
from shim.machine.sizing import Size, plan
from shim.machine.spec import describe, queue_pairs
from shim.machine.template_store import TemplateStore
from shim.network.network import Network
from shim.refusal import Refusal
from shim.telemetry import postmortem, timeline
from shim.telemetry.timeline_model import guest_phases

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterable

    from hypervisor import Hypervisor
    from shim.agent.guest_streams import GuestStreams
    from shim.config import Config
    from shim.host.ledger import Ledger
    from shim.machine.pod import PodSpec
    from shim.machine.sizing import Limits, Plan
    from shim.machine.template_store import Template
    from shim.sandbox.host_streams import Stdio

_T = TypeVar("_T")

log = logging.getLogger(__name__)

REASON_TIMEOUT_S = 2.0  # the machine usually says why it ends just after the agent's connection breaks

_CLONE_PART = 0.75  # of the time for a boot: so long a clone may take to answer
_LOAD_TIMES = 10  # by how much longer its load may take, each step of which is given up long before


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
        #: Whether it could have been cloned, had there been a template.
        self.lacks_template = False
        self._id = sandbox_id
        self._directory = directory
        self._guest_share = directory / "guest-share"
        self._config = config
        self._ledger = ledger
        self._vm: QemuHypervisor | None = None
        self._cgroup = HostCgroup([])
        self._resizer: Resizer | None = None
        self._network: Network | None = None
        self._channel: Channel | None = None  # if it has room for streams beside requests
        self.templates = TemplateStore(Path(config.hypervisor.template_dir))
        self._began_at_s = 0.0
        self._accelerator = Accelerator.KVM
        self._given_up = asyncio.Event()

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

    def share_daemons(self) -> list[int]:
        """List the processes of the virtio-fs daemon, which has a mount namespace of its own.

        :raises Unavailable: if there is no machine yet.
        """
        return [process.pid for process in self.vm.processes() if process.name == SHARE_DAEMON]

    async def boot(self, pod: PodSpec) -> Agent:
        """Bring it up, with its share and its network.

        :param pod: what it is for.
        :returns: the guest agent.
        :raises ShimError: with the reason, if it does not come up.
        :raises HypervisorError: as :class:`ShimError`.
        """
        self._began_at_s = time.monotonic()
        sizes = plan(self._config.hypervisor, pod.oci)
        with timeline.phase("share, host's abilities", lane=timeline.MACHINE):
            spec = await self._spec(sizes)
            template = self._find_template(spec, sizes, pod)
            self._accelerator = spec.accelerator
        with timeline.phase("network namespace", lane=timeline.MACHINE):
            self._network = network = await Network.open(
                namespace_of(pod.oci), ledger=self._ledger, queues=queue_pairs(spec)
            )
        spec = dataclasses.replace(spec, network_namespace=network.namespace_path)
        timeout_s = self._config.guest.boot_timeout_s
        try:
            # What waits for a turn is not late.
            async with self.turn(lane=timeline.MACHINE), asyncio.timeout(timeout_s) as limit:
                if self.doom:
                    raise Unavailable(self.doom)
                self._cgroup = HostCgroup.make(pod.cgroup, ledger=self._ledger)
                bringing_up = self._bring_up(spec, sizes, template, limit=limit)
                agent = await _while_preparing(network, bringing_up)
                try:
                    with timeline.phase("CreateSandbox", lane=timeline.MACHINE):
                        await agent.create_sandbox(
                            sandbox_id=self._id,
                            # Who names none shares the host's, or has what a new namespace begins with.
                            hostname=pod.hostname or socket.gethostname(),
                            dns=list(pod.dns),
                            shm_bytes=pod.shm_bytes,
                        )
                    with timeline.phase("network cards", lane=timeline.MACHINE):
                        await network.attach(vm=self.vm, agent=agent)
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

    @contextlib.asynccontextmanager
    async def turn(self, *, lane: str) -> AsyncIterator[None]:
        """Do the block when the host has a processor for it; for work of the guest that somebody waits for.

        :param lane: of the timeline, where the wait is noted.
        """
        if self._accelerator is not Accelerator.TCG:
            yield
            return
        at_once = len(os.sched_getaffinity(0))
        async with contextlib.AsyncExitStack() as stack:
            with timeline.phase("wait for a turn", lane=lane):
                await stack.enter_async_context(
                    turns.turn(turns.DIRECTORY, at_once=at_once, given_up=self._given_up)
                )
            yield

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
        self._given_up.set()
        if self._vm is not None:
            await self._vm.stop()

    async def clear_away(self) -> None:
        """End it and take back all that was made for it."""
        await self.kill()
        if self._network is not None:
            await self._network.detach()
        for share in (self._guest_share, self.share):
            await mounts.run_to_the_end(functools.partial(mounts.unmount, share))

    async def open_guest_streams(
        self, stdio: Stdio, agent: Agent, *, container_id: str, exec_id: str
    ) -> GuestStreams:
        """Choose how the streams of a process about to be made travel.

        :param stdio: the streams.
        :param agent: what :meth:`boot` returned.
        :param container_id: the container's id at the agent.
        :param exec_id: the process' id at the agent.
        """
        if self._channel is Channel.VHOST_VSOCK:
            # Without a terminal stdin is wanted in any case: to be ended.
            names = ["stdout", "stdin"] if stdio.terminal else ["stdout", "stderr", "stdin"]
            streams = await RawStreams.open(self.vm, names)
            if streams is not None:
                return streams
            self._channel = None
        if self._channel is Channel.VHOST_USER_VSOCK and agent.frames_streams:
            return LongStreams(agent, vm=self.vm, container_id=container_id, exec_id=exec_id)
        return RequestStreams(agent, container_id=container_id, exec_id=exec_id)

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

    async def network_changed(self) -> None:
        """Wait until something changes in its network namespace after it was followed once.

        :raises Unavailable: if there is no machine yet.
        """
        if self._network is None:
            raise Unavailable(f"sandbox {self._id}: no machine")
        await self._network.changed()

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
        modules = Path(config.guest.kernel).with_name("modules")
        if modules.is_dir():
            (self.share / MODULES_NAME).mkdir()
            mounts.bind(modules, self.share / MODULES_NAME, read_only=True, recursive=False)
        choice = await resolve(config)
        accelerator = choice.accelerator
        log.info("boot: accelerator %s: %s", accelerator.value, choice.accelerator_reason)
        if accelerator is Accelerator.TCG:
            log.warning("boot: accelerator %s: %s", accelerator.value, EMULATION_IS_NO_BOUNDARY)
        log.info("boot: channel %s: %s", choice.channel.value, choice.channel_reason)
        self._channel = choice.channel
        return describe(
            config,
            choice,
            name=self._id,
            directory=self._directory,
            share=self._guest_share,
            size=sizes.boot,
            most=sizes.most,
        )

    def _find_template(self, spec: VmSpec, sizes: Plan, pod: PodSpec) -> Template | None:
        """Find what a machine can be cloned from, and say why not if there is nothing."""
        if self._config.hypervisor.template == "off":
            return None
        if self._config.hypervisor.huge_pages:
            log.info(
                "boot: sandbox %s: its memory is of huge pages, which are not copied; boots cold", self._id
            )
            return None
        if refuses_template(pod.oci):
            log.info("boot: sandbox %s: wants no clone; boots cold", self._id)
            return None
        try:
            key = template_key(self._clone_of(spec, sizes))
            template = self.templates.find(key)
            if template is None:
                why = self.templates.failure(key)
                # Machines of other sizes are too many to have a template of each.
                self.lacks_template = not why and sizes.most == plan(self._config.hypervisor, {}).most
                if not why and self.templates.is_building():
                    why, self.lacks_template = "one is being built", False
                log.info("boot: template %.12s: %s; boots cold", key, why or "there is none yet")
        except (Refusal, HypervisorError, OSError) as error:
            log.warning("boot: %s; boots cold", error)
            return None
        return template

    def _clone_of(self, spec: VmSpec, sizes: Plan, template: Template | None = None) -> VmSpec:
        """Describe the machine that is cloned: one that can grow has the size that any can grow from."""
        size = sizes.boot if sizes.most == sizes.boot else sizes.base
        return dataclasses.replace(
            spec,
            vcpus=size.vcpus,
            memory_bytes=size.memory_bytes,
            template=template.path if template else None,
        )

    async def _bring_up(
        self, spec: VmSpec, sizes: Plan, template: Template | None, *, limit: asyncio.Timeout
    ) -> Agent:
        """Clone the machine; if there is no template, or none that is of use, boot it.

        :param limit: put off for a machine that could not be cloned.
        """
        timeout_s = self._config.guest.boot_timeout_s
        if template is None:
            return await self._start(spec, sizes, timeout_s=timeout_s)
        clone = self._clone_of(spec, sizes, template)
        limit.reschedule(None)  # each step of a clone has its own
        try:
            agent = await self._start(clone, sizes, timeout_s=_CLONE_PART * timeout_s)
        except (TemplateError, ChannelError, ShimError) as error:
            await self.kill()
            if self.doom:
                raise
            starved = self._vm is not None and self._vm.was_starved
            self._judge(template, error, to_blame=blames_template(error, starved=starved))
        else:
            log.info("boot: template %.12s: cloned", template.key)
            limit.reschedule(asyncio.get_running_loop().time() + timeout_s)
            with contextlib.suppress(OSError):
                self.templates.answers(template)
            return agent
        limit.reschedule(asyncio.get_running_loop().time() + timeout_s)
        return await self._start(spec, sizes, timeout_s=timeout_s)

    def _judge(self, template: Template, error: Exception, *, to_blame: bool) -> None:
        """Keep or remove the template of a clone that did not come up, and say what was done."""
        advice = 'if clones go on to fail on this host, set [hypervisor] template = "off"'
        try:
            if not to_blame or (isinstance(error, LATE) and not self.templates.is_late(template)):
                fate = "it is kept, for the host may only be busy"
            else:
                self.templates.discard(template, reason=str(error))
                self.lacks_template = not self.templates.failure(template.key)
                fate = "it is removed"
        except OSError as failure:
            fate = f"it cannot be removed: {failure}"
        log.warning(
            "boot: template %.12s: %s; %s, and the machine boots cold; %s", template.key, error, fate, advice
        )

    async def _start(self, spec: VmSpec, sizes: Plan, *, timeout_s: float) -> Agent:
        """Start the machine and have its agent answer.

        :raises TemplateError: if it is to be a clone and the template is of no use.
        :raises HypervisorError: if it does not start, or does not answer in time.
        :raises ShimError: if its agent does not answer in time.
        """
        is_clone = spec.template is not None
        ends_at_s = time.monotonic() + timeout_s

        def left_s() -> float:
            return max(ends_at_s - time.monotonic(), 0.0)

        self._vm = vm = QemuHypervisor(
            spec, on_process=self._record_process, phase=partial(timeline.phase, lane=timeline.MACHINE)
        )
        size = Size(vcpus=spec.vcpus, memory_bytes=spec.memory_bytes)
        self._resizer = Resizer(vm, sizes, size=size)
        await vm.start(timeout_s=timeout_s * (_LOAD_TIMES if is_clone else 1))
        if is_clone:
            ends_at_s = time.monotonic() + timeout_s
        with timeline.phase("clone goes on" if is_clone else "guest boots", lane=timeline.MACHINE):
            dial = dial_clone if is_clone else QemuHypervisor.connect
            connection = await dial(vm, AGENT_PORT, timeout_s=left_s())
        with timeline.phase("first answer", lane=timeline.MACHINE):
            # What a clone needed beyond its time, it needed for want of a processor.
            left_to_answer_s = timeout_s if is_clone else left_s()
            return await Agent.over(connection, timeout_s=left_to_answer_s, is_clone=is_clone)

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


async def _while_preparing(network: Network, booting: Coroutine[object, object, _T]) -> _T:
    """Do the namespace's part of the network while the machine boots; a failure of one ends the other."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(network.prepare(), name="network")
            return await booting
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
