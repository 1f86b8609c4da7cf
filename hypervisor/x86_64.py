"""The x86_64 virtual machine."""

from __future__ import annotations

import struct

from hypervisor.interface import Accelerator

MACHINE_TYPE = "q35,sata=off,smbus=off,smm=off,vmport=off,usb=off"
"""q35, because it has hotplug, and because microvm sometimes hangs under TCG while it calibrates its clock.

Devices that no guest uses, but that its kernel would probe, are off (disk controller, SMBus, VMware's port,
USB). So is system management mode, for which the firmware would relocate itself.
"""

CPU_MODELS = {
    # Everything that the host has except performance counters: they leak timing between tenants, and a nested
    # host often lacks them.
    Accelerator.KVM: "host,pmu=off",
    # Everything QEMU can translate. Images built for x86-64-v2 or v3 refuse to start on less, and smaller
    # models were measured to bring the agent up later, not earlier: its libraries fall back to slower code.
    # Without the promise of fast string instructions: translated, they move a byte or a word at a time. A
    # kernel that is promised only short ones copies forever (seen on QEMU 10, which has both).
    Accelerator.TCG: "max,-erms,-fsrm",
}

EARLY_CONSOLE = "isa-serial"

KERNEL_PARAMETERS = (
    # The virtio console is a module in distribution kernels; a panic before it is loaded (no init, a broken
    # initrd) would otherwise leave no trace. The kernel falls silent here once the real console is up.
    "earlyprintk=ttyS0",
    # The kernel checks the timer: it panics unless a few interrupts come in a moment. On a loaded host, a
    # guest may have no processor in that moment, which looks like a broken timer.
    "no_timer_check",
    # Reset through the keyboard controller, which QEMU notices at once; the default tries ACPI first.
    "reboot=k",
)

TRANSLATED_KERNEL_PARAMETERS = (
    # The same for the kernel, which expects fast string instructions of the model's vendor: with plain moves
    # it boots in a tenth less time, and bytes pass three times as fast (measured).
    "clearcpuid=rep_good",
)

_PROBE_VALUE = 42
PROBE_DEVICE = "isa-debug-exit,iobase=0xf4,iosize=1"
PROBE_STATUS = _PROBE_VALUE << 1 | 1
"""How the device turns the byte written to it into an exit status."""

_PROBE_ROUNDS = 200_000_000
"""Two instructions each: under a tenth of a second natively, above half a second translated."""

_LOAD_ADDRESS = 0x100000
_XEN_ELFNOTE_PHYS32_ENTRY = 18


def probe_kernel() -> bytes:
    """Build a kernel with a PVH entry, as guest kernels have one, that counts and then ends QEMU."""
    code = (
        b"\xb9" + struct.pack("<I", _PROBE_ROUNDS)  # mov ecx, rounds
        + b"\x49"                                   # dec ecx
        + b"\x75\xfd"                               # jnz to the instruction before
        + b"\xb0" + bytes([_PROBE_VALUE])           # mov al, value
        + b"\xe6\xf4"                               # out 0xf4, al
        + b"\xf4"                                   # hlt
    )  # fmt: skip
    note = struct.pack("<III4sI", 4, 4, _XEN_ELFNOTE_PHYS32_ENTRY, b"Xen\0", _LOAD_ADDRESS)
    header_size, segment_size = 64, 56
    note_offset = header_size + 2 * segment_size
    code_offset = note_offset + len(note)
    executable, machine, version, load, note_type, all_access, readable = 2, 62, 1, 1, 4, 7, 4
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH",
        executable, machine, version, _LOAD_ADDRESS, header_size, 0, 0, header_size, segment_size, 2, 0, 0, 0,
    )  # fmt: skip
    segments = struct.pack(
        "<IIQQQQQQ", load, all_access, code_offset, _LOAD_ADDRESS, _LOAD_ADDRESS, len(code), len(code), 1
    ) + struct.pack("<IIQQQQQQ", note_type, readable, note_offset, 0, 0, len(note), len(note), 4)
    return header + segments + note + code
