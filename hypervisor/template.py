"""Templates: a machine that was booted once, kept as files from which others start where it stood."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from hypervisor.interface import VmSpec


def template_key(spec: VmSpec) -> str:
    """Digest all that shapes a machine: two specifications with one key can share a template.

    What is a sandbox' own does not count: its name, its directories, the template itself.

    :param spec: the virtual machine.
    :returns: hexadecimal digits.
    :raises UnsupportedHostError: if this machine's architecture is not supported.
    :raises VmStartError: if QEMU, the kernel or the initial RAM file system is not there.
    """
    raise NotImplementedError


async def save_template(spec: VmSpec, directory: Path, *, timeout_s: float) -> None:
    """Boot a machine, and save it as soon as its agent serves.

    :param spec: the virtual machine; its share and its template are not looked at.
    :param directory: an existing, empty directory for the template's files. It is complete when this
        returns, and useless if it raises.
    :param timeout_s: the longest this may take, in seconds.
    :raises UnsupportedHostError: if this machine's architecture is not supported.
    :raises VmStartError: if the machine does not come up, or cannot be saved. Nothing is left running.
    """
    raise NotImplementedError
