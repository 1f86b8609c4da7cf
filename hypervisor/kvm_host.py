"""Reasons why a host's KVM is slower than it could be, from its kernel's parameters."""

from __future__ import annotations

from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_MODULES = Path("/sys/module")
_NESTED_PAGING = {"kvm_intel": "ept", "kvm_amd": "npt"}
"""The parameter of each module that says whether the processor walks the guest's page tables."""


def weaknesses(*, cpuinfo: Path = _CPUINFO, modules: Path = _MODULES) -> list[str]:
    """List the weaknesses of a host's KVM, each with its remedy.

    :param cpuinfo: where the kernel describes the processors.
    :param modules: where it has the parameters of its modules.
    """
    found = []
    try:
        flags = cpuinfo.read_text(encoding="utf-8").partition("\nflags")[2].partition("\n")[0].split()
    except OSError:
        flags = []
    if "hypervisor" in flags:
        found.append(
            "KVM is nested, as this host is a virtual machine: each trip out of a guest is several; "
            "use bare metal where speed counts"
        )
    for module, parameter in _NESTED_PAGING.items():
        try:
            value = (modules / module / "parameters" / parameter).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if value in {"N", "0"}:
            found.append(
                f"KVM has no nested paging: each change of a guest's page tables is a trip out of it; "
                f"load {module} with {parameter}=1, or use a processor that has it"
            )
    return found
