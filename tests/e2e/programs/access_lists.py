"""Print what access control lists do: how they are set, checked and inherited.

The first argument is a directory that is not there yet.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import sys
from functools import partial
from pathlib import Path

from tests.e2e.programs.identities import attempt_one, attempts_as, shown

USERS = [(0, 0, ()), (1000, 1000, ()), (1001, 1001, ()), (1001, 1001, (266,))]
LISTS = {
    0o644: "u::rw- u:1000:--- g::r-- m::r-- o::r--",
    0o600: "u::rw- u:1000:r-- g::--- m::r-- o::---",
    0o660: "u::rw- u:1000:rw- g::--- m::r-- o::---",
    0o640: "u::rw- g::r-- g:266:rw- m::rw- o::---",
}
INHERITED = "u::rwx u:1000:rwx g::r-x m::rwx o::---"
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"

# As in linux/posix_acl_xattr.h: a version, then entries of tag, permissions and id.
_TAGS = {("u", False): 1, ("u", True): 2, ("g", False): 4, ("g", True): 8, ("m", False): 16, ("o", False): 32}
_ENTRY, _VERSION, _NOBODY = struct.Struct("<HHI"), struct.pack("<I", 2), 0xFFFFFFFF


def encoded(text: str) -> bytes:
    """Encode a list as the attribute that holds it."""
    entries = []
    for word in text.split():
        kind, name, rights = word.split(":")
        tag = _TAGS[kind, bool(name)]
        bits = sum(bit for letter, bit in (("r", 4), ("w", 2), ("x", 1)) if letter in rights)
        entries.append((tag, bits, int(name) if name else _NOBODY))
    return _VERSION + b"".join(_ENTRY.pack(*entry) for entry in sorted(entries))


def read(path: str, attribute: str = ACCESS) -> str:
    """Return a list as hexadecimal digits, or the name of the error."""
    return attempt_one(lambda: os.getxattr(path, attribute).hex())


def main(place: str) -> None:
    """Try everything and print it."""
    os.umask(0o022)
    os.mkdir(place)
    enforcement(f"{place}/file")
    masks(f"{place}/masked")
    for user, umask in (((0, 0, ()), 0o022), ((1000, 1000, ()), 0o077), ((1001, 1001, ()), 0o077)):
        os.umask(umask)
        inheritance(f"{place}/of-{user[0]}", user)
    os.umask(0o022)
    refusals(place)


def enforcement(path: str) -> None:
    """Check which users access control lists let in."""
    for mode, text in LISTS.items():
        Path(path).write_text("content", encoding="ascii")
        os.chmod(path, mode)
        print(text, attempt_one(partial(os.setxattr, path, ACCESS, encoded(text))), shown(path))
        for user in USERS:
            tries = [
                lambda: Path(path).read_text(encoding="ascii"),
                lambda: os.close(os.open(path, os.O_WRONLY)),
                lambda: [os.access(path, mode) for mode in (os.R_OK, os.W_OK, os.X_OK)],
            ]
            print(user, attempts_as(user, tries))
        os.unlink(path)


def masks(path: str) -> None:
    """See that the mode's group is the list's mask, and that a list can be taken away."""
    Path(path).touch()
    os.chmod(path, 0o600)
    os.setxattr(path, ACCESS, encoded(INHERITED))
    for mode in (0o640, 0o670):
        os.chmod(path, mode)
        print(
            shown(path),
            read(path),
            attempts_as((1000, 1000, ()), [lambda: os.close(os.open(path, os.O_WRONLY))]),
        )
    os.removexattr(path, ACCESS)
    print(shown(path), read(path))


def _create(path: str, mode: int) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, mode))


def _bind(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path)


MAKING = {
    "file": lambda path: _create(path, 0o666),
    "program": lambda path: _create(path, 0o2775),
    "directory": os.mkdir,
    "fifo": os.mkfifo,
    "node": lambda path: os.mknod(path, 0o666 | stat.S_IFREG),
    "socket": _bind,
}


def inheritance(directory: str, user: tuple[int, int, tuple[int, ...]]) -> None:
    """Check what new files inherit from a directory's list."""
    os.mkdir(directory)
    os.chown(directory, 0, 266)
    os.chmod(directory, 0o2755)
    for attribute in (ACCESS, DEFAULT):
        os.setxattr(directory, attribute, encoded(INHERITED))
    print(read(directory), read(directory, DEFAULT), shown(directory))
    tries = [lambda name=name, make=make: make(f"{directory}/{name}") for name, make in MAKING.items()]
    answers = attempts_as(user, tries)
    for name, answer in zip(MAKING, answers, strict=True):
        path = f"{directory}/{name}"
        print(user, name, answer, shown(path), read(path), read(path, DEFAULT))


def refusals(place: str) -> None:
    """See who may not set which list, and that a list takes the set-group-id bit away."""
    path = f"{place}/refused"
    Path(path).touch()
    plain = encoded("u::rwx g::r-x o::---")
    print(attempts_as((1000, 1000, ()), [lambda: os.setxattr(path, ACCESS, plain)]))
    print(attempt_one(lambda: os.setxattr(path, ACCESS, encoded("u::rwx u:5:r-- o::---"))))
    print(attempt_one(lambda: os.setxattr(path, DEFAULT, plain)))
    os.chown(path, 1000, 266)
    os.chmod(path, 0o2755)
    print(attempts_as((1000, 1000, ()), [lambda: os.setxattr(path, ACCESS, plain)]), shown(path))


if __name__ == "__main__":
    main(sys.argv[1])
