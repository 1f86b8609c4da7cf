"""The error tree of the hypervisor layer, split by the caller's remedy.

::

    HypervisorError
     ├── UnsupportedHostError  run on another machine
     ├── JailError             start it without confinement, or fix the host; nothing was left running
     ├── VmStartError          fix the host or the configuration; nothing was left running
     │    └── TemplateError    boot without the template, and build it again
     │         └── TemplateLateError  the same, unless the host is too busy to tell
     ├── ChannelError          the guest was not reached; the text says whether the VM still runs
     │    └── GuestLateError   it runs, but did not answer in time
     ├── HotplugError          a device was not added, changed or removed; the virtual machine keeps running
     │    └── NoSlotError      every slot is taken; unplug something first
     ├── ResizeError           the size was not reached; the virtual machine keeps running
     │    └── ResizeRefusedError  because the guest refuses or is silent; it has the size that was reached
     ├── ParkError             the memory was not moved; the machine is as before, and it may be tried again
     │    └── ParkedMemoryLostError  the memory is lost; stop the virtual machine
     └── QmpError              QEMU refused a command or its control connection broke

The message is one line: phase, object, cause, remedy.
"""

from __future__ import annotations


class HypervisorError(Exception):
    """Root of every error this package raises on purpose."""


class UnsupportedHostError(HypervisorError):
    """Virtual machines on this architecture are not supported."""


class JailError(HypervisorError):
    """A process of the virtual machine could not be confined; all its processes have been ended."""


class VmStartError(HypervisorError):
    """The virtual machine did not start; all its processes have been ended."""


class TemplateError(VmStartError):
    """A template is missing or broken, another QEMU saved it, or its machine did not survive the load."""


class TemplateLateError(TemplateError):
    """A template was not loaded in time."""


class ChannelError(HypervisorError):
    """No connection to the guest's port could be made."""


class GuestLateError(ChannelError):
    """The guest of a running virtual machine did not answer in time."""


class HotplugError(HypervisorError):
    """A device could not be added to, changed in or removed from a running virtual machine."""


class NoSlotError(HotplugError):
    """The virtual machine has no free slot for another device."""


class ResizeError(HypervisorError):
    """The number of virtual CPUs or the memory of a running virtual machine could not be changed as asked."""


class ResizeRefusedError(ResizeError):
    """The guest gave back or accepted less than it was asked to.

    :param message: the whole line.
    :param reached: the number of virtual CPUs, or the bytes of memory, that there are now.
    """

    def __init__(self, message: str, *, reached: int) -> None:
        super().__init__(message)
        self.reached = reached


class ParkError(HypervisorError):
    """The memory of a virtual machine could not be moved to a file, or back."""


class ParkedMemoryLostError(ParkError):
    """The file with the memory of a parked machine is not what was written."""


class QmpError(HypervisorError):
    """A QMP command failed, or the connection ended before its reply."""
