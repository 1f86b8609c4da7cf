"""Takes added processors and memory into use, and processors out of use."""

from __future__ import annotations

import errno
import os

from guest.agent import files, limits, modules, uevent
from guest.agent.console import log

_CPUS = "/sys/devices/system/cpu"
_MEMORY = "/sys/devices/system/memory"


def use_cpus(count: int) -> None:
    """Use exactly this many processors, the oldest ones; wait for processors that are not announced yet.

    :param count: how many.
    :raises AgentError: if there are fewer at the deadline.
    :raises OSError: if the kernel refuses.
    """

    def look() -> bool | None:
        # The first processor cannot be switched off, so it has no such file.
        nodes = [f"{_CPUS}/{name}/online" for name in _numbered(_CPUS, "cpu")]
        switches = [path for path in nodes if files.exists(path)]
        always = len(nodes) - len(switches)
        for position, path in enumerate(switches, start=always):
            _switch(path, "1" if position < count else "0")
        return len(nodes) >= count or None

    uevent.wait_for(look, what=f"online: {count} processors")
    from guest.agent import channels  # noqa: PLC0415 - a boot should not wait for it

    channels.use(count)


def online_memory() -> None:
    """Use all memory, adjust the limits to it, and prepare for memory that the host adds later.

    :raises OSError: if the kernel refuses.
    """
    modules.load("virtio_mem")
    for name in _numbered(_MEMORY, "memory"):
        try:
            _switch(f"{_MEMORY}/{name}/state", "online")
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.EBUSY}:
                raise
            # The driver refuses while it adds or removes the block, and then decides about it itself.
            log(f"online: {name}: {error.strerror}")
    limits.follow()


def report_free_memory() -> None:
    """Report unused memory to the host from now on; only the host benefits."""
    try:
        modules.load("virtio_balloon")
    except OSError as error:
        log(f"free memory is not reported: {error}")


def _switch(path: str, wanted: str) -> None:
    try:
        if files.read(path).strip() != wanted:
            files.write(path, wanted)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENODEV}:  # removed since
            raise


def _numbered(directory: str, prefix: str) -> list[str]:
    names = os.listdir(directory) if files.exists(directory) else ()
    numbers = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return [f"{prefix}{number}" for number in sorted(int(each) for each in numbers if each.isdigit())]
