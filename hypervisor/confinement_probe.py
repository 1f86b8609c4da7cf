"""Finds out whether this host can confine processes, by starting one that does nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hypervisor.confinement import of_program
from hypervisor.launcher import MARK
from hypervisor.process import ChildProcess

if TYPE_CHECKING:
    from hypervisor.interface import Identity

_PROGRAM = Path("/usr/bin/true")
_TIMEOUT_S = 10.0


async def jail_problem(identity: Identity) -> str | None:
    """Return why processes cannot be confined on this host; ``None`` if they can.

    :param identity: the user of the process.
    """
    try:
        process = ChildProcess.spawn("jail", [str(_PROGRAM)], confinement=of_program(_PROGRAM, identity))
    except NotImplementedError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    if await process.ended_well(timeout_s=_TIMEOUT_S):
        return None
    return process.last_words().removeprefix(MARK) or process.obituary()
