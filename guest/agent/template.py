"""Work that a future template does before it is saved, so that its clones need not do it."""

from __future__ import annotations

import gc

from guest.agent import files, kernel, modules, runtime, workers
from proto.extensions import TEMPLATE_PARAMETER

_WORKERS = 6
"""Threads: for a connection, a container's end, its kills for memory, and each of its three streams."""

_MODULES = (
    # Every sandbox has a share.
    "virtiofs",
    # Gives the free pages back before the machine is saved, and in each clone.
    "virtio_balloon",
    # Nearly every pod has a network.
    "virtio_net",
)


def prepare(command_line: str) -> None:
    """If this machine will be a template, load what the clones need and free the rest.

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
    # Existing objects stay, so later collections need not visit them or write to their pages.
    gc.freeze()
    kernel.release_heap()
    files.write("/proc/sys/vm/drop_caches", "3")
