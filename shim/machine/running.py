"""A running machine: the parts that exist from its agent's first answer to its end."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from hypervisor import Channel
from shim.agent.guest_streams import LongStreams, RawStreams, RequestStreams
from shim.host.oom_score import set_oom_score_adj
from shim.machine import turns
from shim.telemetry import timeline
from shim.telemetry.timeline_model import guest_phases

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable
    from contextlib import AbstractAsyncContextManager

    from hypervisor import Hypervisor, VmSpec
    from shim.agent.client import Agent
    from shim.agent.guest_streams import GuestStreams
    from shim.machine.limits import Limits
    from shim.machine.parking import Parking
    from shim.machine.resizing import Resizer
    from shim.machine.sizing import Size
    from shim.network.network import Network
    from shim.network.plan import Endpoint

MOST_SHARE_FILES = 500_000
"""How many files of the share the guest may use. It remembers half as many, and the host's kernel needs
1.6 KiB for each (measured with ext4 and Linux 6.18): 0.4 GiB, which the cgroup's limit allows for."""


class RunningMachine:
    """A machine with its agent, its network and its size.

    :param vm: the virtual machine.
    :param agent: its agent, which has answered.
    :param network: its network, which is attached.
    :param resizer: changes its size.
    :param spec: its description.
    :param template_key: the key of the template that it was cloned from; empty if it booted.
    :param began_s: when its boot began, in seconds of ``time.monotonic()``.
    :param given_up: set once the machine should end.
    :param parking: its rest.
    :param park_after_s: after how long without need it is parked, in seconds; 0 for never.
    """

    def __init__(
        self,
        *,
        vm: Hypervisor,
        agent: Agent,
        network: Network,
        resizer: Resizer,
        spec: VmSpec,
        template_key: str,
        began_s: float,
        given_up: asyncio.Event,
        parking: Parking,
        park_after_s: int,
    ) -> None:
        self.vm = vm
        self.agent = agent
        self.spec = spec
        self.template_key = template_key
        self.parking = parking
        self.park_after_s = park_after_s
        self._network = network
        self._resizer = resizer
        self._began_s = began_s
        self._given_up = given_up
        self._takes_raw_streams = spec.channel is Channel.VHOST_VSOCK
        self._takes_long_streams = spec.channel is Channel.VHOST_USER_VSOCK and agent.frames_streams

    @property
    def size(self) -> Size:
        """Its current size."""
        return self._resizer.size

    @property
    def endpoints(self) -> list[Endpoint]:
        """The interfaces of its network namespace that are connected to its cards."""
        return self._network.endpoints

    def turn(self, *, lane: str) -> AbstractAsyncContextManager[None]:
        """Run the block when the host has a processor for it; see :func:`shim.machine.turns.turn_of`.

        :param lane: the lane of the timeline in which the wait is recorded.
        """
        return turns.turn_of(self.spec.accelerator, lane=lane, given_up=self._given_up)

    async def open_guest_streams(self, *, terminal: bool, container_id: str, exec_id: str) -> GuestStreams:
        """Choose how the streams of a new process travel.

        :param terminal: whether the process has a terminal.
        :param container_id: the container's id at the agent.
        :param exec_id: the process's id at the agent.
        """
        if self._takes_raw_streams:
            # Without a terminal, stdin is always connected, so that the process learns of its end.
            names = ["stdout", "stdin"] if terminal else ["stdout", "stderr", "stdin"]
            streams = await RawStreams.open(self.vm, names)
            if streams is not None:
                return streams
            self._takes_raw_streams = False
        if self._takes_long_streams:
            return LongStreams(self.agent, vm=self.vm, container_id=container_id, exec_id=exec_id)
        return RequestStreams(self.agent, container_id=container_id, exec_id=exec_id)

    async def note_guest(self) -> None:
        """Record the guest's phases in the timeline.

        :raises ShimError: if it does not report them.
        """
        if not self.agent.is_hako:
            return
        asked_s = time.monotonic()
        report = await self.agent.timeline()
        for phase in guest_phases(
            report, asked_s=asked_s, answered_s=time.monotonic(), since_s=self._began_s
        ):
            timeline.note(phase.name, lane=phase.lane, began_s=phase.began_s, ended_s=phase.ended_s)

    async def bound_files(self) -> None:
        """Tell the guest how many files of the share it may remember.

        :raises ShimError: if it does not answer.
        """
        if self.agent.is_hako:
            with contextlib.suppress(ProcessLookupError):  # the machine ends
                limit = min(self.vm.share_file_limit, MOST_SHARE_FILES)
                await self.agent.keep_share_files_below(limit)

    async def follow_network(self) -> None:
        """Add new interfaces of its network namespace, because some clients make them just before a start.

        :raises ShimError: if it cannot have one of them.
        """
        await self._network.rescan(vm=self.vm, agent=self.agent)

    async def network_changed(self) -> None:
        """Wait until something changes in its network namespace after it was followed once."""
        await self._network.changed()

    async def grow(self, live: Iterable[Limits]) -> None:
        """Grow until the containers fit.

        :param live: the limits of each.
        :raises ResourceExhausted: if that is impossible.
        """
        await self._resizer.grow(self.agent, live)

    def set_oom_score_adj(self, value: int) -> None:
        """Let the host's kernel kill its processes for memory as readily as those of a container.

        :param value: the container's; see ``/proc/PID/oom_score_adj`` in proc(5).
        """
        for process in self.vm.processes():
            set_oom_score_adj(process.pid, value)

    async def shrink(self, live: Iterable[Limits]) -> None:
        """Release resources that no container needs.

        :param live: the limits of each.
        """
        await self._resizer.shrink(self.agent, live)
