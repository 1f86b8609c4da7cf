"""One side of what two containers do through a volume that both have: sockets, FIFOs, locks, memory, events.

Run as a program in a container, whose Python has little more than what this imports. ``serve DIRECTORY...``
waits in each directory for the other side, ``meet DIRECTORY...``. That one prints a JSON object with its
observations of the first side, by directory.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import select
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any


TIMEOUT_S = 30
IN_CREATE = 0x100
EVENT_HEADER_BYTES = 16


class Served:
    """A directory that the other side is waited for in.

    :param path: where it is.
    """

    def __init__(self, path: Any) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{path}/socket")
        self.listener.listen(4)
        self.peers: list[socket.socket] = []
        os.mkfifo(f"{path}/fifo")
        self.fifo = os.open(f"{path}/fifo", os.O_RDWR | os.O_NONBLOCK)
        self.locked = [os.open(f"{path}/{name}", os.O_RDWR | os.O_CREAT) for name in ("flock", "fcntl")]
        fcntl.flock(self.locked[0], fcntl.LOCK_EX)
        fcntl.lockf(self.locked[1], fcntl.LOCK_EX)
        page = os.open(f"{path}/page", os.O_RDWR | os.O_CREAT)
        os.ftruncate(page, mmap.PAGESIZE)
        self.page = mmap.mmap(page, mmap.PAGESIZE)
        libc = ctypes.CDLL(None, use_errno=True)
        self.events = libc.inotify_init1(0)
        libc.inotify_add_watch(self.events, os.fsencode(path), IN_CREATE)

    def answer(self, ready: Any) -> None:
        """Report the events to the peers; a new peer makes the page of memory change."""
        if self.listener in ready:
            self.peers.append(self.listener.accept()[0])
            self.page[0] = self.page[0] + 1
            self.peers[-1].sendall(b"socket\n")
        for fd, word in ((self.fifo, b"fifo\n"), (self.events, b"inotify\n")):
            if fd in ready:
                os.read(fd, 4096)
                for peer in self.peers:
                    peer.sendall(word)


def serve(paths: Any) -> None:
    """Serve directories forever."""
    served = [Served(path) for path in paths]
    print("serving", flush=True)
    while True:
        everything = [fd for one in served for fd in (one.listener, one.fifo, one.events)]
        ready = set(select.select(everything, [], [])[0])
        for one in served:
            one.answer(ready)


def is_locked(lock: Any, path: Any) -> Any:
    """Tell whether a lock that does not want to write is refused."""
    fd = os.open(path, os.O_RDONLY)
    try:
        lock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def meet(path: Any) -> Any:
    """Return the observations of the other side in a directory."""
    seen = []
    page = mmap.mmap(os.open(f"{path}/page", os.O_RDONLY), mmap.PAGESIZE, prot=mmap.PROT_READ)
    before = page[0]
    for name, lock in (("flock", fcntl.flock), ("fcntl", fcntl.lockf)):
        if is_locked(lock, f"{path}/{name}"):
            seen.append(name)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(TIMEOUT_S)
        try:
            peer.connect(f"{path}/socket")
        except OSError:
            return seen
        heard = peer.makefile("r")
        seen.append(heard.readline().strip())
        if page[0] != before:
            seen.append("mmap")
        try:
            os.write(os.open(f"{path}/fifo", os.O_WRONLY | os.O_NONBLOCK), b"x")
            seen.append(heard.readline().strip())
            os.mkfifo(f"{path}/made-{os.getpid()}")
            seen.append(heard.readline().strip())
        except OSError as error:
            seen.append(os.strerror(error.errno) if error.errno else "nothing heard")
    return seen


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2:])
    print(json.dumps({path: meet(path) for path in sys.argv[2:]}))
