"""Print the users' rights to directories and files, and the effects of their changes.

The first argument is a directory that is not there yet.
"""

from __future__ import annotations

import itertools
import os
import socket
import stat
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e.programs.identities import attempts_as, shown

if TYPE_CHECKING:
    from collections.abc import Callable

USERS = [(0, 0, ()), (1000, 1000, ()), (264, 51020, (7, 266)), (2000, 2000, (1000,))]
DIRECTORIES = [(0, 266, 0o2775), (2000, 1000, 0o1770), (0, 0, 0o755)]
FILES = [(1000, 1000, 0o4775), (0, 266, 0o2070), (2000, 7, 0o640)]


def _create(path: str, flags: int, mode: int = 0o666) -> None:
    os.close(os.open(path, flags | os.O_CREAT, mode))


def _bind(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path)


def _write(path: str, flags: int = 0) -> None:
    opened = os.open(path, os.O_WRONLY | flags)
    os.write(opened, b"x")
    os.close(opened)


IN_A_DIRECTORY: dict[str, Callable[[str], object]] = {
    "create": lambda d: _create(f"{d}/new", os.O_WRONLY),
    "create with set-id bits": lambda d: _create(f"{d}/new", os.O_WRONLY, 0o6775),
    "create without rights": lambda d: _create(f"{d}/new", os.O_RDWR, 0),
    "open or create": lambda d: _create(f"{d}/old", os.O_RDWR),
    "create what is there": lambda d: _create(f"{d}/old", os.O_RDWR | os.O_EXCL),
    "make a directory": lambda d: os.mkdir(f"{d}/new"),
    "make a link": lambda d: os.symlink("anywhere", f"{d}/new"),
    "make a FIFO": lambda d: os.mkfifo(f"{d}/new"),
    "make a device": lambda d: os.mknod(f"{d}/new", 0o620 | stat.S_IFCHR, os.makedev(1, 3)),
    "bind a socket": lambda d: _bind(f"{d}/new"),
    "link": lambda d: os.link(f"{d}/../own", f"{d}/new"),
    "move in": lambda d: os.rename(f"{d}/../own", f"{d}/new"),
    "move over": lambda d: os.rename(f"{d}/../own", f"{d}/old"),
    "move out": lambda d: os.rename(f"{d}/old", f"{d}/../new"),
    "remove": lambda d: os.unlink(f"{d}/old"),
    "list": os.listdir,
    "change the mode": lambda d: os.chmod(d, 0o2771),
    "change the group": lambda d: os.chown(d, -1, 266),
}
TO_A_FILE: dict[str, Callable[[str], object]] = {
    "read": lambda f: Path(f).read_text(encoding="ascii"),
    "write": _write,
    "append": lambda f: _write(f, os.O_APPEND),
    "write anew": lambda f: _write(f, os.O_TRUNC),
    "cut": lambda f: os.truncate(f, 1),
    "change the mode": lambda f: os.chmod(f, 0o6775),
    "change the group": lambda f: os.chown(f, -1, 266),
    "take": lambda f: os.chown(f, os.getuid(), -1),
    "touch": os.utime,
    "date": lambda f: os.utime(f, (5, 5)),
    "set an attribute": lambda f: os.setxattr(f, "user.new", b"1"),
    "ask": lambda f: [os.access(f, mode) for mode in (os.R_OK, os.W_OK, os.X_OK)],
}


def main(place: str) -> None:
    """Make the files, try everything, and print it."""
    os.umask(0o022)
    os.mkdir(place)
    numbers = itertools.count()
    for user in USERS:
        uid, gid, _groups = user
        cases = []
        for (owner, group, mode), what in itertools.product(DIRECTORIES, IN_A_DIRECTORY):
            parent = f"{place}/{next(numbers)}"
            target = f"{parent}/target"
            os.makedirs(target)
            Path(f"{target}/old").write_text("old", encoding="ascii")
            os.chown(f"{target}/old", 2000, 266)
            os.chmod(f"{target}/old", 0o664)
            Path(f"{parent}/own").touch()
            os.chown(f"{parent}/own", uid, gid)
            os.chmod(parent, 0o777)
            os.chown(target, owner, group)
            os.chmod(target, mode)
            cases.append((f"{owner}:{group} {mode:o} {what}", target, IN_A_DIRECTORY[what]))
        for (owner, group, mode), what in itertools.product(FILES, TO_A_FILE):
            target = f"{place}/{next(numbers)}"
            Path(target).write_text("0123456789", encoding="ascii")
            os.chown(target, owner, group)
            os.chmod(target, mode)
            cases.append((f"{owner}:{group} {mode:o} {what}", target, TO_A_FILE[what]))
        answers = attempts_as(user, [partial(attempt, target) for _, target, attempt in cases])
        for (what, target, _), answer in zip(cases, answers, strict=True):
            print(f"{user} {what}: {answer}, {shown(target)}, {shown(f'{target}/new')}")


if __name__ == "__main__":
    main(sys.argv[1])
