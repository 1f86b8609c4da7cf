"""The zygote: a process that has imported what a shim needs, and forks shims on request.

A fork takes a few milliseconds, and all shims share the memory of what was imported. The zygote never runs
what it imported: no event loop, no thread, no gRPC object exists before a fork.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import traceback

from shim import bootstrap, daemonize
from shim.zygote_client import GO, ForkRequest

IDLE_S = 600.0  # a node that has started no pod for as long can do without the memory
_REQUEST_TIMEOUT_S = 0.5  # as long as `start` waits for the answer
_MAX_REQUEST = 1 << 18
_OWN_PACKAGES = ("shim", "hypervisor", "proto")
_ARGUMENTS_START = 47  # fields of /proc/self/stat, counted from 0: proc(5)
_ARGUMENTS_END = 48


def serve(path: str) -> None:
    """Fork shims until nobody has asked for a while, or the program has changed.

    The caller's descriptor 3 is the lock that makes this the only zygote of its socket.

    :param path: the socket to serve on.
    :raises OSError: if it cannot be made.
    """
    os.chdir("/")
    os.nice(10)  # the shim that was started just before comes first
    _warm()
    os.setpriority(os.PRIO_PROCESS, 0, 0)
    files = _files()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        previous = os.umask(0o177)
        listener.bind(path)
        os.umask(previous)
        try:
            listener.listen()
            listener.settimeout(IDLE_S)
            _fork_shims(listener, files)
        finally:
            os.unlink(path)


def _warm() -> None:
    import pyroute2  # noqa: F401, PLC0415 - a shim whose sandbox has an interface needs it

    from shim import daemon  # noqa: F401, PLC0415 - importing it is the point
    from shim.transport import grpc_server  # noqa: F401, PLC0415 - as above

    # What is there by now is there for good: the collector need not look at it, and so not write to its
    # memory, which would end the sharing.
    gc.collect()
    gc.freeze()


def _files() -> dict[str, int]:
    """Note when each file of the program was changed."""
    modules = [sys.modules[name] for name in list(sys.modules) if name.partition(".")[0] in _OWN_PACKAGES]
    paths = [path for path in (getattr(module, "__file__", None) for module in modules) if path]
    return {path: os.stat(path).st_mtime_ns for path in paths}


def _unchanged(files: dict[str, int]) -> bool:
    try:
        return all(os.stat(path).st_mtime_ns == changed_at for path, changed_at in files.items())
    except FileNotFoundError:
        return False


def _fork_shims(listener: socket.socket, files: dict[str, int]) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            return
        with connection:
            if not _unchanged(files):
                return
            connection.settimeout(_REQUEST_TIMEOUT_S)
            try:
                body, descriptors, _, _ = socket.recv_fds(connection, _MAX_REQUEST, 2)
                request = ForkRequest(**json.loads(body))
            except (OSError, ValueError, TypeError):
                continue  # whoever it was is gone, or speaks another version's language
            if os.fork() == 0:
                _be_a_shim(request, descriptors, connection)
            for descriptor in descriptors:
                os.close(descriptor)


def _be_a_shim(request: ForkRequest, descriptors: list[int], connection: socket.socket) -> None:
    """Never returns: what the zygote holds is not the shim's to clean up."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        connection.send(str(os.getpid()).encode())
        if connection.recv(1) == GO:
            _settle(request, descriptors)
            bootstrap.serve(request.state_directory)
        status = 0
    except BaseException:  # noqa: BLE001 - as the interpreter does at the end of a program
        traceback.print_exc()
    finally:
        os._exit(status)


def _settle(request: ForkRequest, descriptors: list[int]) -> None:
    """Become what a program started anew would be."""
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.working_directory)
    _show(request.arguments)
    daemonize.Attributes(**request.attributes).take()
    error_output, *listeners = descriptors
    daemonize.detach(listener=listeners[0] if listeners else None, error_output=error_output)


def _show(arguments: list[str]) -> None:
    """Overwrite the command line that process lists show."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    # The first two fields end with the parenthesis.
    start, end = (int(fields[place - 2]) for place in (_ARGUMENTS_START, _ARGUMENTS_END))
    shown = "\0".join([*daemonize.program(), *arguments]).encode(errors="surrogateescape")
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(start)
        memory.write(shown[: end - start - 1].ljust(end - start, b"\0"))
