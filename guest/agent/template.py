"""What a future template does before it is saved: all that its clones would otherwise do one by one."""

from __future__ import annotations

import gc

from guest.agent import files, kernel, modules, runtime, workers
from proto.extensions import TEMPLATE_PARAMETER

_WORKERS = 6
"""One for a connection, a container's end, its kills for memory, and each of its three streams."""

_MODULES = (
    # Every sandbox has a share.
    "virtiofs",
    # Gives the free pages back before the machine is saved, and in each clone.
    "virtio_balloon",
    # Nearly every pod has a network.
    "virtio_net",
)


def prepare(command_line: str) -> None:
    """Load what the clones will need and let go of what they will not, if this machine is to be a template.

    :param command_line: the kernel's.
    :raises OSError: if the kernel refuses.
    """
    if TEMPLATE_PARAMETER not in command_line.split():
        return
    for name in _MODULES:
        modules.load(name)
    runtime.prepare()
    workers.prepare(_WORKERS)
    gc.collect()
    # What is there now stays: later collections need not look at it, nor write to its pages.
    gc.freeze()
    kernel.release_heap()
    files.write("/proc/sys/vm/drop_caches", "3")
