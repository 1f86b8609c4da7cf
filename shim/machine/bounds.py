"""Limits for the processes of one machine, of a sandbox or a template, on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypervisor import Accelerator
from shim.machine.cgroup import HostCgroup
from shim.machine.device_access import HARMLESS, KVM
from shim.machine.jail import refuse_unbounded

if TYPE_CHECKING:
    from hypervisor import VmSpec
    from shim.host.ledger import Ledger
    from shim.machine.jail import Jail


def bounded(spec: VmSpec, jail: Jail | None, *, wanted: str, name: str, ledger: Ledger) -> HostCgroup:
    """Make the cgroup of a machine, with its limits.

    :param spec: the machine.
    :param jail: what confines its processes.
    :param wanted: ``linux.cgroupsPath``.
    :param name: the cgroup's name, if the machine names none, or one that exists.
    :param ledger: where it is recorded.
    :raises FailedPrecondition: if the machine must have limits, but cannot.
    """
    cgroup = HostCgroup.make(wanted, name=name, ledger=ledger)
    cgroup.limit_memory(spec.memory_bytes)
    # Devices that it is given later are allowed then.
    if jail is not None:
        kvm = (KVM,) if spec.accelerator is Accelerator.KVM else ()
        cgroup.limit_devices((*HARMLESS, *kvm))
    refuse_unbounded(cgroup.problem, jail)
    return cgroup
