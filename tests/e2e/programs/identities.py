"""Try something as another user."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Identity = tuple[int, int, tuple[int, ...]]


def attempts_as(identity: Identity, attempts: Iterable[Callable[[], object]]) -> list[str]:
    """Run attempts in a separate process.

    :param identity: its user, group and further groups.
    :param attempts: the attempts.
    :returns: each attempt's result, or the name of its error.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        uid, gid, groups = identity
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        with os.fdopen(write_end, "w") as output:
            output.writelines(f"{attempt_one(attempt)}\n" for attempt in attempts)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as answers:
        answered = answers.read().splitlines()
    os.waitpid(child, 0)
    return answered


def attempt_one(attempt: Callable[[], object]) -> str:
    """Run one attempt, and return its result or the name of its error."""
    try:
        return str(attempt())
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def shown(path: str) -> str:
    """Return the mode and the owners of a file, if it exists."""
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "-"
    return f"{status.st_mode:o} {status.st_uid}:{status.st_gid}"
