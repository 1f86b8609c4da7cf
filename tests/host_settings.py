"""The settings for machines on the host of the tests; an emulated host is too slow for probes."""

from __future__ import annotations

import os

from shim.config import HypervisorConfig

ACCELERATOR_VARIABLE, MEMORY_VARIABLE = "HAKO_TEST_ACCELERATOR", "HAKO_TEST_MEMORY_MIB"

ACCELERATOR = os.environ.get(ACCELERATOR_VARIABLE, "")
"""The accelerator that tests must use; empty if Hako should detect it."""

OTHERS = {"HAKO_TEST_JAIL": "jail", "HAKO_TEST_VIRTIOFSD": "virtiofsd"}
"""By variable, further keys that a run can set where a test does not."""

INITRD = os.environ.get("HAKO_TEST_INITRD", "")
"""The initramfs of another guest, such as Kata's, of which no template can be made; empty for Hako's own."""

MEMORY_MIB = int(os.environ.get(MEMORY_VARIABLE, HypervisorConfig().memory_mib))
"""The memory of a machine, without that of its containers."""


def hypervisor_table(own: str = "") -> str:
    """Return the table ``hypervisor`` of Hako's configuration for this host.

    :param own: the test's own lines, which take precedence.
    """
    lines = [f'accelerator = "{ACCELERATOR}"'] if ACCELERATOR and "accelerator" not in own else []
    if MEMORY_VARIABLE in os.environ and "memory_mib" not in own:
        lines.append(f"memory_mib = {MEMORY_MIB}")
    for variable, key in OTHERS.items():
        if os.environ.get(variable) and f"{key} =" not in own:
            lines.append(f'{key} = "{os.environ[variable]}"')
    return "".join(f"{line}\n" for line in lines) + own


def guest_table(own: str = "") -> str:
    """Return the table ``guest`` of Hako's configuration for this host.

    :param own: the test's own lines.
    """
    return (f'initrd = "{INITRD}"\n' if INITRD and "initrd" not in own else "") + own
