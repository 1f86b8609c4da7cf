"""Templates: a machine that was booted once and saved in files, from which other machines continue.

A template is a directory of three files: the memory, sparse and at the guest's own addresses; the state of
QEMU's devices; and a description of both, written last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor import architecture
from hypervisor.argv import Inherited, SerialPort, boot_argv
from hypervisor.errors import TemplateError, VmStartError
from hypervisor.interface import Accelerator, Channel
from hypervisor.virtiofsd import Dialect
from proto.extensions import TEMPLATE_PARAMETER

if TYPE_CHECKING:
    from hypervisor.interface import VmSpec

MEMORY = "memory"
STATE = "state"
DESCRIPTION = "template.json"

_FORMAT = 3
"""Must be increased when the format of the files, or the machine that they describe, changes."""

_NO_FD = 0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CPUINFO = Path("/proc/cpuinfo")
_CPU_FIELDS = ("vendor_id", "model name", "microcode", "flags")

_STATE_LIMIT = 256 << 20
"""More than the state of any machine: a larger size is an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateDescription:
    """A template's description.

    :param qemu_version: the version of the QEMU that saved it; no other version loads it.
    :param memory_bytes: the guest's memory.
    :param data_bytes: how much of it is not zero, and therefore in the file.
    :param memory_written_ns: when that file was last written to, in nanoseconds since 1970.
    :param state_bytes: the length of the state.
    :param state_sha256: its digest, hexadecimal.
    :param virtiofsd: the :func:`identity` of the virtio-fs daemon at that time.
    :param virtiofsd_dialect: the daemon's dialect, so that clones need not ask it.
    """

    qemu_version: str
    memory_bytes: int
    data_bytes: int
    memory_written_ns: int
    state_bytes: int
    state_sha256: str
    virtiofsd: list[str | int]
    virtiofsd_dialect: str

    def dialect_of(self, virtiofsd: Path) -> Dialect | None:
        """Return the dialect of a virtio-fs daemon if the template was made with that daemon.

        :param virtiofsd: the program.
        :returns: ``None`` if it must be asked.
        :raises VmStartError: if there is no such file.
        """
        dialects = {dialect.value: dialect for dialect in Dialect}
        return dialects.get(self.virtiofsd_dialect) if self.virtiofsd == identity(virtiofsd) else None

    def write(self, directory: Path) -> None:
        """Write the description; it makes the template complete.

        :param directory: where the other files are.
        :raises OSError: if it cannot be written.
        """
        values = {"format": _FORMAT, **dataclasses.asdict(self)}
        (directory / DESCRIPTION).write_text(json.dumps(values, indent=1) + "\n")


def template_key(spec: VmSpec) -> str:
    """Digest everything that shapes a machine. Specifications with the same key can share a template.

    The sandbox's own name and directories do not count, nor does the template.

    :param spec: the virtual machine.
    :returns: hexadecimal digits.
    :raises UnsupportedHostError: if this machine's architecture is not supported.
    :raises VmStartError: if QEMU, the kernel or the initial RAM file system does not exist.
    """
    bare = bare_machine(dataclasses.replace(spec, name="", network_namespace=None))
    shape: list[object] = [
        _FORMAT,
        boot_argv(bare, _placeholders(spec), architecture=architecture.for_host()),
        [identity(file) for file in (spec.qemu, spec.kernel, spec.initrd)],
    ]
    if spec.accelerator is Accelerator.KVM:
        # The guest has probed this processor's abilities and the speed of its clock.
        shape += [_BOOT_ID.read_text(), _processor(_CPUINFO.read_text())]
    return hashlib.sha256(json.dumps(shape).encode()).hexdigest()


def _placeholders(spec: VmSpec) -> Inherited:
    agent = _NO_FD if spec.channel is Channel.VIRTIO_SERIAL else None
    return bare_descriptors(qmp=_NO_FD, console=_NO_FD, memory=_NO_FD, agent=agent)


def bare_machine(spec: VmSpec) -> VmSpec:
    """Reduce a machine to the parts that a template has.

    :param spec: the virtual machine.
    """
    # The agent then loads what clones need, and frees the rest.
    return dataclasses.replace(spec, kernel_parameters=(TEMPLATE_PARAMETER, *spec.kernel_parameters))


def bare_descriptors(*, qmp: int, console: int, memory: int, agent: int | None) -> Inherited:
    """Name the descriptors of a template's machine, which has no device that QEMU cannot save.

    :param qmp: the control connection.
    :param console: the console.
    :param memory: the memory.
    :param agent: the agent's virtio-serial port; a machine with another channel has none.
    """
    channel = SerialPort(fd=agent) if agent is not None else None
    return Inherited(qmp=qmp, console=console, share=None, channel=channel, memory=memory)


def read_description(directory: Path) -> TemplateDescription:
    """Read a template's description.

    :param directory: the template's.
    :raises TemplateError: if it is missing, or this program did not write it.
    """
    path = directory / DESCRIPTION
    try:
        values = json.loads(path.read_bytes())
        if values.pop("format") != _FORMAT:
            raise TemplateError(f"template: {path}: written by another version of this program")
        found = TemplateDescription(**values)
    except OSError as error:
        raise TemplateError(f"template: {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TemplateError(f"template: {path}: not a template's description: {error!r}") from error
    kinds = (str, int, int, int, int, str, list, str)
    if not all(isinstance(*pair) for pair in zip(dataclasses.astuple(found), kinds, strict=True)):
        raise TemplateError(f"template: {path}: not a template's description: a value of the wrong type")
    return found


def read_state(directory: Path, template: TemplateDescription) -> bytes:
    """Read the state of a template's devices.

    :param directory: the template's.
    :param template: its description.
    :raises TemplateError: if it is missing, or has changed since it was saved.
    """
    path = directory / STATE
    try:
        state = path.read_bytes() if path.stat().st_size <= _STATE_LIMIT else b""
    except OSError as error:
        raise TemplateError(f"template: {path}: {error.strerror}") from error
    if len(state) != template.state_bytes:
        raise TemplateError(f"template: {path}: {len(state)} bytes instead of {template.state_bytes}")
    if hashlib.sha256(state).hexdigest() != template.state_sha256:
        raise TemplateError(f"template: {path}: its checksum is wrong")
    return state


def open_memory(directory: Path, template: TemplateDescription) -> int:
    """Open the memory of a template for reading.

    :param directory: the template's.
    :param template: its description.
    :returns: a descriptor, the caller's to close.
    :raises TemplateError: if it is missing or truncated, or was written to since it was saved.
    """
    path = directory / MEMORY
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TemplateError(f"template: {path}: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if status.st_size != template.memory_bytes:
            raise TemplateError(
                f"template: {path}: {status.st_size} bytes instead of {template.memory_bytes}"
            )
        # Not a digest: reading the whole file would take as long as the copy, for each clone.
        if status.st_mtime_ns != template.memory_written_ns:
            raise TemplateError(f"template: {path}: changed since it was saved")
    except BaseException:
        os.close(fd)
        raise
    return fd


def identity(file: Path) -> list[str | int]:
    """Identify a file and its version.

    :param file: the file.
    :raises VmStartError: if there is none.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise VmStartError(f"template: {file}: {error.strerror}") from error
    return [str(file), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


def _processor(cpuinfo: str) -> list[str]:
    """Pick the lines that identify a processor's model."""
    first = cpuinfo.partition("\n\n")[0].splitlines()
    return [line for line in first if line.partition(":")[0].strip() in _CPU_FIELDS]
