"""How a process becomes a sandbox's daemon: from the command line that ``start`` gave it until it serves."""

from __future__ import annotations

import os
import time

from shim import zygote_protocol
from shim.host import daemonize, kernel, state_directory
from shim.telemetry import timeline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.host.state_directory import StartRecord


def serve(state: str, *, born_at_s: float | None = None) -> None:
    """Run as the daemon that ``start`` made.

    :param state: the state directory of its sandbox.
    :param born_at_s: when this process began to turn into the daemon, in seconds of ``time.monotonic()``, if
        it did other work before.
    """
    timeline.note(
        "process", lane=timeline.SHIM, began_s=born_at_s or timeline.born_at_s(), ended_s=time.monotonic()
    )
    record = state_directory.read_record(state)
    listener = None if record.protocol == "grpc" else daemonize.LISTENER_DESCRIPTOR
    if listener is not None:
        os.set_inheritable(listener, False)  # noqa: FBT003 - its only spelling; QEMU must not accept on it
    daemonize.name_this_process()
    kernel.become_subreaper()
    with timeline.phase("imports", lane=timeline.SHIM):
        from shim import daemon  # noqa: PLC0415 - start must not wait for these imports

    daemon.run(record, listener, lambda: _ready(record))


def _ready(record: StartRecord) -> None:
    """Release ``start``, which waits on our standard error; from now on, containerd gets our log lines."""
    if record.protocol == "grpc":
        zygote_protocol.write(2, daemonize.READY)
        descriptor = daemonize.open_log(record.bundle)
        os.dup2(descriptor, 2)
        os.close(descriptor)
