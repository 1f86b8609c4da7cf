"""``hako check``: tells whether this host can run sandboxes, and by which means."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor import (
    Accelerator,
    Identity,
    VmStartError,
    detect_dialect,
    jail_problem,
    vhost_net_problem,
    weaknesses,
)
from proto.extensions import most_open_in_guest
from shim import config
from shim.agent.oci_namespaces import WantedNamespace
from shim.errors import FailedPrecondition, Internal
from shim.host import kernel_limits
from shim.host.program_version import version_line
from shim.machine import host_choice, jail
from shim.machine.cgroup import missing_controllers
from shim.network import redirect
from shim.network.namespace import NetworkNamespace

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable
    from typing import Any

    from shim.config import Config

_CONFINED = "confines"
_JAIL_REMEDY = (
    "give containerd all capabilities, the ids of [hypervisor] jail_first_id and a kernel with pid, ipc, "
    "network and mount namespaces, seccomp and the memory and pids controllers; [hypervisor] jail says "
    "whether that is needed"
)
_MOUNTINFO = Path("/proc/self/mountinfo")
_SUPPORTED_MACHINE = "x86_64"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One requirement of sandboxes.

    :param name: the requirement.
    :param ok: whether the host has it.
    :param detail: the finding, or the problem.
    :param remedy: the remedy; empty if the host has it.
    :param warning: a weakness of it, and the remedy; empty if there is none.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    warning: str = ""


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser("check", help="say whether this host can run sandboxes, and by which means")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--config", default="", metavar="PATH", help="a configuration other than the host's")


def run(chosen: argparse.Namespace) -> int:
    """Print the findings.

    :param chosen: the command line.
    :returns: the exit status: 1 if this host cannot run sandboxes.
    """
    environment = {config.ENVIRONMENT_VARIABLE: chosen.config} if chosen.config else os.environ
    findings = asyncio.run(examine(config.parse(config.locate(environment))))
    able = all(finding.ok for finding in findings)
    if chosen.json:
        print(json.dumps({"able": able, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return 0 if able else 1
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        print(f"{'ok' if finding.ok else 'no':<3}{finding.name:<{width}}  {finding.detail}{remedy}")
        if finding.warning:
            print(f"{'':<3}{'':<{width}}  warning: {finding.warning}")
    print("This host can run sandboxes." if able else "This host cannot run sandboxes.")
    return 0 if able else 1


async def examine(settings: Config) -> list[Finding]:
    """Check everything that sandboxes need; a missing part does not hide the others.

    :param settings: the operator's configuration.
    :returns: one finding for each requirement, in the order in which a sandbox needs them.
    """
    probes: dict[str, Callable[[Config], Awaitable[str]]] = {
        "user": _user,
        "architecture": _architecture,
        "containerd": _containerd,
        "qemu": _qemu,
        "accelerator": _accelerator,
        "jail": _jail,
        "channel": _channel,
        "virtiofsd": _virtiofsd,
        "network": _network,
        "guest": _guest,
    }
    findings = []
    for name, probe in probes.items():
        try:
            detail = await probe(settings)
            findings.append(Finding(name=name, ok=True, detail=detail, warning=_warning(name, detail)))
        except (FailedPrecondition, VmStartError) as error:
            # One line: phase, object, cause, remedy. The phase is this check.
            detail, _, remedy = str(error).partition(": ")[2].partition("; ")
            findings.append(Finding(name=name, ok=False, detail=detail, remedy=remedy))
    return findings


def _warning(name: str, detail: str) -> str:
    if name == "accelerator":
        is_kvm = detail.startswith(Accelerator.KVM.value)
        return "; ".join(weaknesses()) if is_kvm else host_choice.EMULATION_IS_NO_BOUNDARY
    if name == "virtiofsd":
        return _few_files()
    if name == "jail" and not detail.startswith(_CONFINED):
        return f"a guest that takes QEMU over is root on this host; {_JAIL_REMEDY}"
    return ""


def _few_files() -> str:
    """Warn if the file servers of sandboxes may open only few files, or those of two all of the host's."""
    limit, of_all = kernel_limits.most_open_files(), kernel_limits.most_open_by_all()
    most = most_open_in_guest(limit)
    if most is not None:
        return (
            f"it may open {limit} files: a guest that looks at more is slow, and may have {most} open; "
            "raise the limit of containerd's service (LimitNOFILE)"
        )
    if of_all < 2 * limit:
        return (
            f"it may open {limit} files, and all processes of the host {of_all}: two guests can keep others "
            "from opening any; raise the sysctl fs.file-max"
        )
    return ""


async def _user(_: Config) -> str:
    if os.geteuid() != 0:
        raise FailedPrecondition(f"check: runs as uid {os.geteuid()}; run containerd and this as root")
    return "root"


async def _architecture(_: Config) -> str:
    machine = os.uname().machine
    if machine != _SUPPORTED_MACHINE:
        raise FailedPrecondition(f"check: {machine} is not supported; use an {_SUPPORTED_MACHINE} host")
    return machine


async def _containerd(_: Config) -> str:
    found = shutil.which("containerd")
    if found is None:
        raise FailedPrecondition("check: containerd: not found in PATH; install containerd 1.6 or later")
    # The line reads: containerd <Go module> <version> <revision>.
    line = await _version_of(Path(found))
    return f"{found}, version {''.join(line.split()[2:3])}"


async def _qemu(settings: Config) -> str:
    qemu = host_choice.find_qemu(settings)
    # The line reads: QEMU emulator version <version> (<package>).
    line = await _version_of(qemu)
    return f"{qemu}, version {line.partition(' version ')[2]}"


async def _accelerator(settings: Config) -> str:
    verdict = await host_choice.choose_accelerator(settings)
    return f"{verdict.accelerator.value}: {verdict.reason}"


async def _jail(settings: Config) -> str:
    if settings.hypervisor.jail == "off":
        return "off: set by [hypervisor] jail"
    first = settings.hypervisor.jail_first_id
    problem = await jail_problem(Identity(uid=first, gid=first))
    if problem is None:
        missing = missing_controllers(await asyncio.to_thread(_MOUNTINFO.read_text, encoding="utf-8"))
        problem = f"cgroups of the host cannot limit {' and '.join(missing)}" if missing else None
    if problem is None:
        last = first + settings.hypervisor.jail_ids - 1
        return f"{_CONFINED} each sandbox as its own user, of ids {first} to {last}"
    verdict = await host_choice.choose_accelerator(settings)
    if jail.is_required(settings, verdict.accelerator):
        raise FailedPrecondition(f"check: {problem}; {_JAIL_REMEDY}")
    return f"impossible: {problem}"


async def _channel(settings: Config) -> str:
    channel, reason = host_choice.choose_channel(settings)
    return f"{channel.value}: {reason}"


async def _virtiofsd(settings: Config) -> str:
    virtiofsd = host_choice.find_virtiofsd(settings)
    try:
        dialect = await detect_dialect(virtiofsd)
    except OSError as error:
        missing = error.filename or virtiofsd
        raise FailedPrecondition(f"check: {missing}: {error.strerror}; install it") from error
    return f"{virtiofsd}, the {dialect.name.title()} daemon"


async def _network(_: Config) -> str:
    """Connect an interface to an imaginary machine, in a namespace that no other process sees."""
    try:
        namespace = await NetworkNamespace.open(WantedNamespace(None))
        try:
            await namespace.run(redirect.try_out)
        finally:
            namespace.close()
    except Internal as error:
        raise FailedPrecondition(str(error)) from error
    problem = vhost_net_problem()
    mover = f"by QEMU ({problem}; load vhost_net)" if problem else "by the kernel (vhost-net)"
    return f"traffic control redirects an interface to a tap; packets are moved {mover}"


async def _guest(settings: Config) -> str:
    kernel, initrd = host_choice.find_guest(settings)
    return f"{kernel}, {initrd}"


async def _version_of(program: Path) -> str:
    """Ask a program for its version, which both programs only print on request.

    :raises FailedPrecondition: if it does not print it.
    """
    try:
        return await asyncio.to_thread(version_line, str(program))
    except OSError as error:
        raise FailedPrecondition(f"check: {error}; reinstall it") from error
