"""``containerd-shim-hako-v2``: what containerd executes, tens of milliseconds from start to exit.

Nothing here or below may import more than an action needs; ``tests/unit/shim`` counts the modules.
"""

from __future__ import annotations

import os
import sys
import time

from shim import command_line
from shim.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.command_line import CommandLine
    from shim.state_directory import StartRecord

_NAME = "io.containerd.hako.v2"
# No more than crun in the guest honours; id-mapped mounts do not reach into a virtual machine.
_FEATURES = (
    '{"ociVersionMin":"1.0.0","ociVersionMax":"1.1.0",'
    '"linux":{"mountExtensions":{"idmap":{"enabled":false}}}}'
)


def main() -> int:
    """Do one action; the entry point of the console script.

    :returns: the exit status.
    """
    action = "command line"
    try:
        line = command_line.parse(sys.argv[1:])
        action = line.action or action
        output = _perform(line)
    except Refusal as refusal:
        return _fail(str(refusal))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{action}: {where}{error.strerror or error}; look at the host")
    _write(1, output)
    return 0


def _perform(line: CommandLine) -> bytes:
    if line.info:
        return _info()
    if line.version:
        return f"containerd-shim-hako-v2:\n  Version: {_version()}\n  Runtime: {_NAME}\n".encode()
    if line.action == "start":
        from shim import start  # noqa: PLC0415 - the other actions do without

        return start.start(line)
    if line.action == "delete":
        from shim import delete  # noqa: PLC0415 - the other actions do without

        return delete.delete(line)
    if not line.action and line.state:
        serve(line.state)
        return b""
    if not line.action and line.zygote:
        from shim import zygote  # noqa: PLC0415 - the other actions do without

        zygote.serve(line.zygote.rstrip())
        return b""
    raise Refusal(
        f"command line: {line.action or 'no action'}: not an action; containerd runs start and delete, "
        "people run -v and -info"
    )


def _info() -> bytes:
    from shim import bootstrap_wire  # noqa: PLC0415 - the other actions do without

    return bootstrap_wire.encode_runtime_info(name=_NAME, version=_version(), features=_FEATURES)


def _version() -> str:
    from shim import version  # noqa: PLC0415 - the other actions do without

    return version.version()


def serve(state: str) -> None:
    """Be the daemon that ``start`` left behind.

    :param state: the state directory of its sandbox.
    """
    from shim import daemonize, kernel, state_directory, timeline  # noqa: PLC0415 - the other actions do without

    timeline.note("process", lane=timeline.SHIM, began_s=timeline.born_at_s(), ended_s=time.monotonic())
    record = state_directory.read_record(state)
    daemonize.name_this_process()
    kernel.become_subreaper()
    with timeline.phase("imports", lane=timeline.SHIM):
        from shim import daemon  # noqa: PLC0415 - everything that start must not wait for

    listener = None if record.protocol == "grpc" else daemonize.LISTENER_DESCRIPTOR
    daemon.run(record, listener, lambda: _ready(record))


def _ready(record: StartRecord) -> None:
    """Let ``start`` go, which waits on our standard error; what is said from now on goes to containerd."""
    from shim import daemonize, start  # noqa: PLC0415 - the other actions do without

    if record.protocol == "grpc":
        _write(2, start.READY)
        descriptor = daemonize.open_log(record.bundle)
        os.dup2(descriptor, 2)
        os.close(descriptor)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _fail(message: str) -> int:
    # containerd puts what it reads into the middle of a line of its own.
    ending = "\n" if os.isatty(2) else ""
    _write(2, (message.replace("\n", " ") + ending).encode(errors="replace"))
    return 1


if __name__ == "__main__":
    sys.exit(main())
