"""How ``start`` gets a shim from the zygote, the warmed process that forks them, and how one comes to be.

Nobody depends on it: whatever goes wrong with it, ``start`` runs the program anew instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys

from shim import daemonize
from shim.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

GO = b"\0"
#: Room for the command lines of shims: the zygote's own arguments are overwritten in its children.
TITLE_BYTES = 2048
_ANSWER_TIMEOUT_S = 0.5
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


class ForkRequest(Record):
    """What a shim is told that the zygote forks."""

    state_directory: str
    working_directory: str
    #: The command line it shows, without the program.
    arguments: list[str]
    environment: dict[str, str]
    attributes: dict[str, Any]


def socket_path(state_dir: str) -> str:
    """Place the socket of the zygote that may stand in for this process: same program, same surroundings.

    :param state_dir: the directory of all sandboxes.
    """
    import hashlib  # noqa: PLC0415 - as in grouping

    with open("/proc/self/cgroup", encoding="utf-8") as file:
        cgroup = file.read()
    namespaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in _NAMESPACES]
    surroundings = repr((sys.executable, __file__, namespaces, cgroup))
    return os.path.join(state_dir, "zygote", hashlib.sha256(surroundings.encode()).hexdigest()[:16])


def ask(request: ForkRequest, descriptors: list[int], *, path: str, register: Callable[[int], None]) -> bool:
    """Have a shim forked.

    :param request: what it is to be.
    :param descriptors: its standard error, and its listening socket if it has one.
    :param path: the zygote's socket.
    :param register: called with the shim's pid while it still waits; if this process dies before it returns,
        the shim ends too.
    :returns: whether it runs; False if there is no zygote, or none that is fit.
    :raises OSError: from ``register``.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(_ANSWER_TIMEOUT_S)
        try:
            connection.connect(path)
            socket.send_fds(connection, [json.dumps(request.as_dict()).encode()], descriptors)
            pid = connection.recv(32)
        except OSError:
            return False
        if not pid:
            return False
        register(int(pid))
        try:
            connection.send(GO)
        except OSError:
            return False
    return True


def launch(path: str) -> None:
    """Start a zygote for the next one who asks, unless one is coming up; failing is harmless.

    :param path: its socket.
    """
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # The zygote inherits the lock and holds it for as long as it lives.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            arguments = ["-zygote", path.ljust(TITLE_BYTES)]
            daemonize.spawn(arguments, listener=lock, error_output=null, before_exec=lambda _: None)
            os.close(null)
        finally:
            os.close(lock)
