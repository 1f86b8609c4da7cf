"""Finds and chooses the means that this host offers for virtual machines; ``hako check`` uses this, too."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor import Accelerator, Channel, HypervisorError, Verdict, channel_problem
from hypervisor import choose_accelerator as accelerator_probe
from shim.errors import FailedPrecondition
from shim.host import private_directory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shim.config import Config

AUTO = "auto"
#: By QEMU's security policy, docs/system/security.rst.
EMULATION_IS_NO_BOUNDARY = (
    "QEMU does not count emulation as a boundary that holds a hostile guest; "
    'use a host with KVM, and [hypervisor] accelerator = "kvm" to refuse others'
)
_VERDICT = Path("/var/cache/hako/accelerator.json")
#: ``scripts/setup`` puts programs here that the distribution does not package.
OWN_PROGRAMS = Path("/var/lib/hako/bin")
#: Distributions put daemons here.
_DAEMON_DIRECTORIES = (Path("/usr/libexec"), Path("/usr/lib/qemu"), OWN_PROGRAMS)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostChoice:
    """The means by which sandboxes are made on this host.

    :param accelerator: how guest instructions are run.
    :param accelerator_reason: why that one was chosen.
    :param channel: how the guest agent is reached.
    :param channel_reason: why that one was chosen.
    :param virtiofsd: the virtio-fs daemon.
    :param vsock_daemon: the vhost-user-vsock daemon, if there is one.
    """

    accelerator: Accelerator
    accelerator_reason: str
    channel: Channel
    channel_reason: str
    virtiofsd: Path
    vsock_daemon: Path | None


async def resolve(config: Config) -> HostChoice:
    """Choose the means by which a sandbox is made.

    :param config: the operator's configuration.
    :raises FailedPrecondition: if the host lacks something, with the remedy.
    """
    find_qemu(config)
    find_guest(config)
    verdict = await choose_accelerator(config)
    channel, channel_reason = choose_channel(config)
    return HostChoice(
        accelerator=verdict.accelerator,
        accelerator_reason=verdict.reason,
        channel=channel,
        channel_reason=channel_reason,
        virtiofsd=find_virtiofsd(config),
        vsock_daemon=_find_vsock_daemon(config),
    )


def find_qemu(config: Config) -> Path:
    """Find QEMU.

    :param config: the operator's configuration.
    :raises FailedPrecondition: if it does not exist.
    """
    qemu = Path(config.hypervisor.qemu)
    if not os.access(qemu, os.X_OK):
        raise FailedPrecondition(
            f"boot: {qemu}: no such program; install qemu-system-x86 or set [hypervisor] qemu"
        )
    return qemu


def find_guest(config: Config) -> tuple[Path, Path]:
    """Find the guest's kernel and initial RAM file system.

    :param config: the operator's configuration.
    :raises FailedPrecondition: if one does not exist.
    """
    kernel, initrd = Path(config.guest.kernel), Path(config.guest.initrd)
    for key, path in (("kernel", kernel), ("initrd", initrd)):
        if not path.is_file():
            raise FailedPrecondition(
                f"boot: guest {key} {path}: no such file; run `hako install` or `hako image build`, or set "
                f"[guest] {key}"
            )
    return kernel, initrd


def find_virtiofsd(config: Config) -> Path:
    """Find the virtio-fs daemon.

    :param config: the operator's configuration.
    :raises FailedPrecondition: if it does not exist.
    """
    found = _find(config.hypervisor.virtiofsd, "virtiofsd")
    if found is None:
        where = _searched(config.hypervisor.virtiofsd)
        raise FailedPrecondition(
            f"boot: virtiofsd: not found in {where}; install virtiofsd or set [hypervisor] virtiofsd"
        )
    return found


async def choose_accelerator(config: Config) -> Verdict:
    """Choose how guest instructions are run.

    :param config: the operator's configuration.
    :raises FailedPrecondition: if the test with guest code fails, or its verdict cannot be saved.
    """
    if config.hypervisor.accelerator != AUTO:
        accelerator = Accelerator(config.hypervisor.accelerator)
        return Verdict(accelerator=accelerator, reason="set by [hypervisor] accelerator")
    try:
        private_directory.make(str(_VERDICT.parent))
        return await accelerator_probe(Path(config.hypervisor.qemu), cache=_VERDICT)
    except (HypervisorError, OSError) as error:
        raise FailedPrecondition(f"boot: accelerator: {error}; set [hypervisor] accelerator") from error


def choose_channel(config: Config) -> tuple[Channel, str]:
    """Choose how the guest agent is reached: the best channel that this host offers.

    :param config: the operator's configuration.
    :returns: the channel and the reason for it.
    :raises FailedPrecondition: if the operator chose a channel that cannot be used.
    """
    daemon = _find_vsock_daemon(config)
    if config.hypervisor.channel != AUTO:
        channel = Channel(config.hypervisor.channel)
        problem = channel_problem(channel, vsock_daemon=daemon)
        if problem is not None:
            raise FailedPrecondition(f"boot: channel {channel.value}: {problem}")
        return channel, "set by [hypervisor] channel"
    problems = []
    for channel in Channel:
        problem = channel_problem(channel, vsock_daemon=daemon)
        if problem is None:
            break
        problems.append(problem)
    return channel, "; ".join(problems) or "the fastest, and usable"


def _find_vsock_daemon(config: Config) -> Path | None:
    return _find(config.hypervisor.vsock_daemon, "vhost-device-vsock")


def _find(configured: str, name: str) -> Path | None:
    if configured != AUTO:
        return Path(configured) if os.access(configured, os.X_OK) else None
    in_path = shutil.which(name)
    candidates: Iterable[Path] = (directory / name for directory in _DAEMON_DIRECTORIES)
    found = next((path for path in candidates if os.access(path, os.X_OK)), None)
    return Path(in_path) if in_path is not None else found


def _searched(configured: str) -> str:
    if configured != AUTO:
        return configured
    return ", ".join(("PATH", *map(str, _DAEMON_DIRECTORIES)))
