"""Count everything that a container's life may leave on a machine."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from shim import zygote_protocol
from shim.config import HypervisorConfig
from shim.machine import jail
from shim.machine.turns import DIRECTORY as TURNS
from tests.e2e.containerd import CGROUPS, NAMESPACE
from tests.e2e.tasks import Tasks
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.e2e.containerd import Containerd

SHARED_DIRECTORIES = (Path("/run/containerd/s"), Path("/run/containerd/fifo"), Path("/run/hako"))
TEMPLATES = Path(HypervisorConfig().template_dir)
"""Not of any container either, except for the remains of an unfinished build."""
JAIL = Path(jail.DIRECTORY)
"""Not of the containers of one test alone: others have their numbers there, too."""
ZYGOTES = Path(zygote_protocol.ZYGOTE_DIRECTORY)
"""Not part of any container: a zygote outlives the containers that started it."""

SETTLE_S = patient(40.0)
"""How long containerd and a shim may take for their work after they have answered."""

Census: TypeAlias = "Mapping[str, str]"
"""A line for each thing, by what makes it the same thing later."""


def take(daemon: Containerd, *, state_directory: Path) -> Census:
    """Count the processes, mounts, files, cgroups, network devices, snapshots and so on.

    :param daemon: the containerd whose containers count; it is not counted itself.
    :param state_directory: where Hako keeps the state of its sandboxes.
    """
    things = [
        *_mounts(),
        *_files(daemon, state_directory),
        *_cgroups(),
        *(f"network device {device.name}" for device in Path("/sys/class/net").iterdir()),
        *(f"network namespace {path.name}" for path in Path("/run/netns").glob("*")),
        *_loop_devices(daemon),
        *_objects(daemon),
    ]
    return {**dict(_processes(daemon)), **{thing: thing for thing in things}}


def difference(before: Census, daemon: Containerd, *, state_directory: Path) -> list[str]:
    """Return what changed since ``before``, once containerd had time to settle.

    :returns: one line per change, ``+`` for new things and ``-`` for missing ones; empty if none.
    """
    return settled_difference(before, lambda: take(daemon, state_directory=state_directory))


def settled_difference(before: Census, again: Callable[[], Census]) -> list[str]:
    """Return what changed since ``before``, once containerd had time to settle.

    :param again: takes the census that is compared.
    :returns: as ``difference``.
    """
    deadline = time.monotonic() + SETTLE_S
    while (after := again()).keys() != before.keys() and time.monotonic() < deadline:
        time.sleep(0.05)
    return sorted(
        [
            *(f"+ {after[thing]}" for thing in after.keys() - before.keys()),
            *(f"- {before[thing]}" for thing in before.keys() - after.keys()),
        ]
    )


def _processes(daemon: Containerd) -> Iterator[tuple[str, str]]:
    for process in daemon.nursery.descendants():
        if process.pid != daemon.pid:
            # It stays the same process when it becomes another program: runc's init is one for a moment after
            # ctr has answered.
            yield (
                f"process {process.pid} {process.start_time}",
                f"process {process.pid} {process.command[:160]}",
            )


def _objects(daemon: Containerd) -> Iterator[str]:
    with Tasks(daemon.address, namespace=daemon.namespace) as client:
        yield from (f"container {name}" for name in client.containers())
        yield from (f"snapshot {name}" for name in client.active_snapshots())


def _mounts() -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields = line.split()
        separator = fields.index("-")
        yield f"mount {fields[4]} ({fields[separator + 1]} {fields[separator + 2]})"


def _files(daemon: Containerd, state_directory: Path) -> Iterator[str]:
    tops = [
        *(
            path
            for base in (daemon.state, daemon.root)
            for path in base.glob("io.containerd.runtime.v2.task/*/*")
        ),
        *(entry for directory in (*SHARED_DIRECTORIES, state_directory) for entry in directory.glob("*")),
        *TEMPLATES.glob(".*"),
    ]
    for top in tops:
        if top in {ZYGOTES, TEMPLATES, TURNS, JAIL}:
            continue
        yield f"file {top}"
        # A mount point is counted as a mount; the files seen through it are not left behind.
        for directory, names, files in os.walk(top):
            # What goes away meanwhile is no mount point; Path.is_mount raises an error for that.
            names[:] = [name for name in names if not os.path.ismount(f"{directory}/{name}")]
            yield from (f"file {directory}/{name}" for name in [*names, *files])


def _loop_devices(daemon: Containerd) -> Iterator[str]:
    # They are the whole machine's: another lane's are over files in another directory.
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # detached meanwhile
            path = backing.read_text(encoding="utf-8").strip()
            if daemon.home.parent in Path(path).parents:
                yield f"loop device over {path}"


def _cgroups() -> Iterator[str]:
    # They are the whole machine's, so that only those below this lane's count.
    for directory, _, _ in os.walk(CGROUPS):
        if f"/{NAMESPACE}/" in directory:
            yield f"cgroup {directory}"
