"""``containerd-shim-hako-v2`` without a zygote: what containerd executes, done in tens of milliseconds.

Nothing here or below may import more than an action needs; ``tests/unit/shim`` counts the modules.
"""

from __future__ import annotations

import os
import sys
import time

from shim import command_line, entry
from shim.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.command_line import CommandLine
    from shim.start import MakeShim
    from shim.state_directory import StartRecord

_NAME = "io.containerd.hako.v2"


def main(sent: bytes | None = None) -> int:
    """Do one action in this process.

    :param sent: the standard input, if it has been read.
    :returns: the exit status.
    """
    answer = perform(sys.argv[1:], sent)
    assert answer is not None  # noqa: S101 - only a zygote can be unwanted
    status, text = answer
    if status and os.isatty(2):
        text += b"\n"  # containerd puts what it reads into the middle of a line of its own
    entry.write(2 if status else 1, text)
    return status


def perform(
    arguments: list[str],
    sent: bytes | None,
    *,
    make_shim: MakeShim | None = None,
    born_at_s: float | None = None,
) -> tuple[int, bytes] | None:
    """Do one action.

    :param arguments: the command line without the program.
    :param sent: the standard input, if it has been read.
    :param make_shim: how ``start`` gets a shim if this is a zygote's fork.
    :param born_at_s: when the caller's process was forked, if this is another.
    :returns: the exit status, and what goes to standard output, or to standard error if the status is not 0;
        nothing if this is a zygote's fork and the configuration wants none.
    """
    action = "command line"
    try:
        line = command_line.parse(arguments)
        action = line.action or action
        output = _perform(line, sent, make_shim, born_at_s)
    except Refusal as refusal:
        return 1, _one_line(str(refusal))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return 1, _one_line(f"{action}: {where}{error.strerror or error}; look at the host")
    return None if output is None else (0, output)


def _one_line(message: str) -> bytes:
    return message.replace("\n", " ").encode(errors="replace")


def _perform(
    line: CommandLine, sent: bytes | None, make_shim: MakeShim | None, born_at_s: float | None
) -> bytes | None:
    if line.info:
        return _info()
    if line.version:
        return f"containerd-shim-hako-v2:\n  Version: {_version()}\n  Runtime: {_NAME}\n".encode()
    if line.action == "start":
        from shim import start  # noqa: PLC0415 - the other actions do without

        data = entry.read_input() if sent is None else sent
        return start.start(line, data, make_shim=make_shim, born_at_s=born_at_s)
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
    from shim import bootstrap_wire, features  # noqa: PLC0415 - the other actions do without

    return bootstrap_wire.encode_runtime_info(name=_NAME, version=_version(), features=features.FEATURES)


def _version() -> str:
    from shim import version  # noqa: PLC0415 - the other actions do without

    return version.version()


def serve(state: str, *, born_at_s: float | None = None) -> None:
    """Be the daemon that ``start`` left behind.

    :param state: the state directory of its sandbox.
    :param born_at_s: since when this process is to be the daemon, in seconds of ``time.monotonic()``, if it
        was something else before.
    """
    from shim import daemonize, kernel, state_directory, timeline  # noqa: PLC0415 - the other actions do without

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
        from shim import daemon  # noqa: PLC0415 - everything that start must not wait for

    daemon.run(record, listener, lambda: _ready(record))


def _ready(record: StartRecord) -> None:
    """Let ``start`` go, which waits on our standard error; what is said from now on goes to containerd."""
    from shim import daemonize, start  # noqa: PLC0415 - the other actions do without

    if record.protocol == "grpc":
        entry.write(2, start.READY)
        descriptor = daemonize.open_log(record.bundle)
        os.dup2(descriptor, 2)
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
