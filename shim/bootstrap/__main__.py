"""``python -m shim.bootstrap``: do an action, or run as the daemon or zygote that the command line names."""

from __future__ import annotations

import os
import sys

from shim import zygote_protocol
from shim.bootstrap.actions import perform
from shim.bootstrap.command_line import Invocation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.bootstrap.command_line import CommandLine

#: Of the 5 s that containerd gives a ``delete``. The next zygote removes what this leaves.
_LEAVE_S = 1.0


def main(sent: bytes | None = None) -> int:
    """Do one action in this process.

    :param sent: the standard input, if it has been read.
    :returns: the exit status.
    """
    answer = perform(Invocation(arguments=sys.argv[1:], sent=sent), otherwise=_live)
    assert answer is not None  # noqa: S101 - only a zygote may be told that it is unwanted
    status, text = answer
    if status and os.isatty(2):
        text += b"\n"  # containerd inserts the text into one of its own lines
    zygote_protocol.write(2 if status else 1, text)
    if sys.argv[-1] == "delete":
        from shim.host import releases  # noqa: PLC0415 - the other actions do without

        # The process that was deleted may have been the last of an old release. containerd waits for us.
        releases.leave(lock_s=_LEAVE_S)
    return status


def _live(line: CommandLine) -> bool:
    """Run as the daemon of a sandbox or as a zygote until its end, if the command line says so."""
    if line.state:
        from shim.bootstrap import serve  # noqa: PLC0415 - the actions do without

        serve.serve(line.state)
    elif line.zygote:
        from shim.bootstrap import zygote  # noqa: PLC0415 - the actions do without

        zygote.serve(line.zygote.rstrip())
    return bool(line.state or line.zygote)


if __name__ == "__main__":
    sys.exit(main())
