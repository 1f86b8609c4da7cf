"""A sandbox's virtual machine on the host: its needs, its start, and the reason for its end.

Its share, its network namespace, its cgroup and its size belong to it and end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import socket
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hypervisor import (
    SHARE_DAEMON,
    Accelerator,
    ChannelError,
    JailError,
    QemuHypervisor,
    TemplateError,
)
from proto.extensions import AGENT_PORT
from shim.agent.client import Agent
from shim.agent.guest_paths import MODULES_NAME, WATCHABLE_NAME
from shim.agent.oci_namespaces import namespace_of
from shim.errors import DeadlineExceeded, ShimError, Unavailable
from shim.host import mounts
from shim.host.oom_score import set_oom_score_adj
from shim.machine import pod_annotations, turns
from shim.machine.bounds import bounded
from shim.machine.cgroup import HostCgroup
from shim.machine.cloning import Cloning, clone_of, dial_clone
from shim.machine.host_choice import EMULATION_IS_NO_BOUNDARY, resolve
from shim.machine.jail import Jail, refuse_unbounded, without
from shim.machine.parking import Parking
from shim.machine.resizing import Resizer
from shim.machine.running import RunningMachine
from shim.machine.sizing import Size, plan
from shim.machine.spec import describe, queue_pairs
from shim.network.network import Network
from shim.telemetry import latency, postmortem, timeline

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from hypervisor import Identity, VmProcess, VmSpec
    from shim.config import Config
    from shim.host.ledger import Ledger
    from shim.machine.host_choice import HostChoice
    from shim.machine.pod import PodSpec
    from shim.machine.sizing import Plan
    from shim.machine.template_store import Template

_T = TypeVar("_T")

log = logging.getLogger(__name__)

REASON_TIMEOUT_S = 5.0  # for a machine's reason, after the agent's connection breaks; a busy host is late

_CLONE_PART = 0.75  # a clone may take this part of the time for a boot to answer
_LOAD_TIMES = 10  # its load may take so many times longer; each of its steps has a shorter limit


@dataclasses.dataclass(frozen=True, slots=True)
class _Started:
    """A virtual machine whose agent has answered.

    :param spec: its description; a clone may be smaller than wanted.
    """

    vm: QemuHypervisor
    agent: Agent
    spec: VmSpec

    @property
    def size(self) -> Size:
        return Size(vcpus=self.spec.vcpus, memory_bytes=self.spec.memory_bytes)


class Machine:
    """The machine of one sandbox; it boots once.

    :param sandbox_id: the sandbox's id.
    :param directory: the sandbox's state directory.
    :param config: the operator's configuration.
    :param ledger: where everything that must be undone is recorded.
    """

    def __init__(self, sandbox_id: str, *, directory: Path, config: Config, ledger: Ledger) -> None:
        self.share = directory / "share"
        self.cloning = Cloning(sandbox_id, config=config)
        #: The live host process that stands for every process in the machine; 0 if there is none yet.
        self.pid = 0
        #: Why it was switched off, if it was; later errors follow from that and are not the reason.
        self.doom = ""
        self._id = sandbox_id
        self._directory = directory
        self._guest_share = directory / "guest-share"
        self._config = config
        self._ledger = ledger
        self._cgroup = HostCgroup([])
        self._oom_score_adj: int | None = None
        #: Every QEMU that was started for the machine; the last one is the machine.
        self._attempts: list[QemuHypervisor] = []
        self._jail: Jail | None = None
        self._given_up = asyncio.Event()
        self._undo = contextlib.AsyncExitStack()
        for share in (self.share, self._guest_share):
            unmount = functools.partial(mounts.unmount, share)
            self._undo.push_async_callback(mounts.run_to_the_end, unmount)

    def processes(self) -> list[VmProcess]:
        """List its processes on the host."""
        return [process for vm in self._attempts[-1:] for process in vm.processes()]

    def share_daemons(self) -> list[int]:
        """List the processes of the virtio-fs daemon, which has its own mount namespace."""
        processes = [process for vm in self._attempts for process in vm.processes()]
        return [process.pid for process in processes if process.name == SHARE_DAEMON]

    async def boot(self, pod: PodSpec) -> RunningMachine:
        """Start it, with its share and its network.

        :param pod: its pod.
        :raises ShimError: with the reason, if it does not start.
        :raises HypervisorError: likewise.
        """
        began_s = time.monotonic()
        usual = self._config
        self._config = pod_annotations.applied(usual, pod.oci, phase=f"boot: sandbox {self._id}")
        sizes = plan(self._config.hypervisor, pod=pod.limits, first=pod.first)
        with timeline.phase("share, host's abilities", lane=timeline.MACHINE):
            self._prepare_share()  # before the first await: containers put their files here during the boot
            choice = await resolve(self._config)
            spec = self._describe(choice, sizes)
            template = self.cloning.find(spec, sizes, pod, is_usual=self._config == usual)
        with timeline.phase("network namespace", lane=timeline.MACHINE):
            network = await Network.open(namespace_of(pod.oci), ledger=self._ledger, queues=queue_pairs(spec))
            self._undo.push_async_callback(network.detach)
        spec = dataclasses.replace(
            spec, network_namespace=network.namespace_path, jail=self._claim_identity(spec)
        )
        timeout_s = self._config.guest.boot_timeout_s
        try:
            # Waiting for a turn does not count as being late.
            async with (
                turns.turn_of(spec.accelerator, lane=timeline.MACHINE, given_up=self._given_up),
                asyncio.timeout(timeout_s) as limit,
            ):
                if self.doom:
                    raise Unavailable(self.doom)
                self._cgroup = bounded(
                    spec,
                    self._jail,
                    wanted=pod.cgroup,
                    name=f"hako-{self._directory.name}",
                    ledger=self._ledger,
                )
                self._oom_score_adj = pod.oom_score_adj
                bringing_up = self._bring_up(spec, sizes, template, limit=limit)
                started = await _while_preparing(network, bringing_up)
                try:
                    refuse_unbounded(self._cgroup.problem, self._jail)
                    await self._set_up(started, pod, network)
                except BaseException:
                    await started.agent.aclose()
                    raise
        except (TimeoutError, DeadlineExceeded) as error:
            if isinstance(error, TimeoutError) and not limit.expired():
                raise
            raise DeadlineExceeded(self._late(timeout_s)) from error
        except Unavailable as error:
            raise Unavailable(f"boot: sandbox {self._id}: {await self._reason_or(error)}") from error
        return RunningMachine(
            vm=started.vm,
            agent=started.agent,
            network=network,
            resizer=Resizer(started.vm, sizes, size=started.size, limit_memory=self._cgroup.limit_memory),
            spec=started.spec,
            template_key=template.key if template and started.spec.template else "",
            began_s=began_s,
            given_up=self._given_up,
            parking=Parking(
                started.vm,
                started.agent,
                directory=self._config.hypervisor.park_dir,
                switch_off=self.switch_off,
            ),
            park_after_s=self._config.hypervisor.park_after_s,
        )

    async def reason_of_end(self, running: RunningMachine) -> str:
        """Wait until the machine or the agent ends; then no part of the machine runs any longer.

        :param running: what :meth:`boot` returned.
        :returns: which of them ended and why, in one line.
        """
        ends = {asyncio.ensure_future(running.vm.wait()), asyncio.ensure_future(running.agent.wait_closed())}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        reason = await self._reason_or(Unavailable("the guest agent closed its connection"))
        await self.kill()
        return self.doom or reason

    async def switch_off(self, reason: str) -> None:
        """End it because it is no longer needed; a machine that does not boot yet never will.

        :param reason: one line for the log.
        """
        self.doom = self.doom or f"switched off: {reason}"
        await self.kill()

    async def kill(self) -> None:
        """End it; killing twice is harmless."""
        self._given_up.set()
        for vm in self._attempts[-1:]:  # earlier ones were stopped when they failed
            await vm.stop()

    async def clear_away(self) -> None:
        """End it and undo everything that was made for it."""
        await self.kill()
        await self._undo.aclose()

    def keep_reason(self, reason: str, *, namespace: str) -> None:
        """Keep the reason for its end and its last output for ``hako logs``.

        :param reason: one line.
        :param namespace: containerd's namespace.
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
        return [line for vm in self._attempts[-1:] for line in vm.console_tail(lines)]

    def _late(self, timeout_s: float) -> str:
        tail = self._console(1)
        last = f"its console ends with: {tail[-1]}" if tail else "its console is silent"
        return (
            f"boot: sandbox {self._id}: the guest agent did not answer within {timeout_s:g} s; {last}; "
            "if the guest is only slow, raise [guest] boot_timeout_s"
        )

    def _prepare_share(self) -> None:
        self.share.mkdir(mode=0o700, exist_ok=True)
        mounts.share_directory(self.share)
        (self.share / WATCHABLE_NAME).mkdir(mode=0o755)
        # A guest may write only to mounts in the share, not to the share itself: with a link in the share,
        # it could redirect another container's mounts to anywhere on the host.
        self._guest_share.mkdir(mode=0o700, exist_ok=True)
        mounts.bind(self.share, self._guest_share, read_only=True, recursive=False)
        modules = Path(self._config.guest.kernel).with_name("modules")
        if modules.is_dir():
            (self.share / MODULES_NAME).mkdir()
            mounts.bind(modules, self.share / MODULES_NAME, read_only=True, recursive=False)

    def _claim_identity(self, spec: VmSpec) -> Identity | None:
        self._jail = jail = Jail.of(self._config, spec.accelerator)
        if jail is None:
            return None
        self._undo.callback(jail.close)
        return jail.identity

    def _describe(self, choice: HostChoice, sizes: Plan) -> VmSpec:
        accelerator = choice.accelerator
        log.info("boot: accelerator %s: %s", accelerator.value, choice.accelerator_reason)
        if accelerator is Accelerator.TCG:
            log.warning("boot: accelerator %s: %s", accelerator.value, EMULATION_IS_NO_BOUNDARY)
        log.info("boot: channel %s: %s", choice.channel.value, choice.channel_reason)
        return describe(
            self._config,
            choice,
            name=self._id,
            directory=self._directory,
            share=self._guest_share,
            size=sizes.boot,
            most=sizes.most,
        )

    async def _bring_up(
        self, spec: VmSpec, sizes: Plan, template: Template | None, *, limit: asyncio.Timeout
    ) -> _Started:
        """Clone the machine; without a usable template, boot it.

        :param limit: the deadline, which begins anew after an attempt to clone the machine.
        """
        timeout_s = self._config.guest.boot_timeout_s
        if template is None:
            return await self._start(spec, timeout_s=timeout_s)
        limit.reschedule(None)  # each step of a clone has its own deadline
        clone = clone_of(spec, sizes, template)
        try:
            started = await self._start(clone, timeout_s=_CLONE_PART * timeout_s)
        except (TemplateError, ChannelError, ShimError) as error:
            await self.kill()
            if self.doom:
                raise
            vm = self._attempts[-1]
            self.cloning.judge(template, error, starved=vm.was_starved)
        else:
            log.info("boot: template %.12s: cloned", template.key)
            limit.reschedule(asyncio.get_running_loop().time() + timeout_s)
            with contextlib.suppress(OSError):
                self.cloning.templates.answers(template)
            return started
        limit.reschedule(asyncio.get_running_loop().time() + timeout_s)
        return await self._start(spec, timeout_s=timeout_s)

    async def _start(self, spec: VmSpec, *, timeout_s: float) -> _Started:
        """Start the machine, and wait until its agent answers.

        :raises TemplateError: if it should be a clone and the template is unusable.
        :raises HypervisorError: if it does not start, or does not answer in time.
        :raises ShimError: if its agent does not answer in time.
        """
        is_clone = spec.template is not None
        ends_at_s = time.monotonic() + timeout_s

        def left_s() -> float:
            return max(ends_at_s - time.monotonic(), 0.0)

        vm = QemuHypervisor(
            spec,
            on_process=self._record_process,
            on_devices=self._cgroup.allow_devices,
            phase=partial(timeline.phase, lane=timeline.MACHINE),
            on_command=latency.QMP.observe,
            on_console_pause=partial(latency.drop, "console"),
        )
        self._attempts.append(vm)
        try:
            await vm.start(timeout_s=timeout_s * (_LOAD_TIMES if is_clone else 1))
        except JailError as error:
            return await self._start(without(spec, str(error), self._jail), timeout_s=left_s())
        self.pid = vm.pid
        if is_clone:
            ends_at_s = time.monotonic() + timeout_s
        with timeline.phase("clone goes on" if is_clone else "guest boots", lane=timeline.MACHINE):
            dial = dial_clone if is_clone else QemuHypervisor.connect
            connection = await dial(vm, AGENT_PORT, timeout_s=left_s())
        with timeline.phase("first answer", lane=timeline.MACHINE):
            # A clone that exceeded its time had no processor.
            left_to_answer_s = timeout_s if is_clone else left_s()
            agent = await Agent.over(connection, timeout_s=left_to_answer_s, is_clone=is_clone)
        return _Started(vm, agent, spec)

    async def _set_up(self, started: _Started, pod: PodSpec, network: Network) -> None:
        """Tell the guest about its pod, and give it its network cards."""
        with timeline.phase("CreateSandbox", lane=timeline.MACHINE):
            await started.agent.create_sandbox(
                sandbox_id=self._id,
                # A pod without a name shares the host's name, or has the name of a new namespace.
                hostname=pod.hostname or socket.gethostname(),
                dns=list(pod.dns),
                shm_bytes=pod.shm_bytes,
            )
        with timeline.phase("network cards", lane=timeline.MACHINE):
            await network.attach(vm=started.vm, agent=started.agent)

    def _record_process(self, name: str, pid: int) -> None:
        self._ledger.process(pid, name=name)
        self._cgroup.add(pid)
        if self._oom_score_adj is not None:
            set_oom_score_adj(pid, self._oom_score_adj)

    async def _reason_or(self, error: ShimError) -> str:
        """Prefer the machine's own reason for its end to the first symptom."""
        for vm in self._attempts[-1:]:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REASON_TIMEOUT_S):
                    return (await vm.wait()).reason
        return str(error)


async def _while_preparing(network: Network, booting: Coroutine[object, object, _T]) -> _T:
    """Do the namespace's part of the network while the machine boots; if one fails, the other ends."""
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(network.prepare(), name="network")
            return await booting
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
