"""The zygote: a process that has imported everything for a shim, and does ``start`` and ``delete`` at once.

It keeps one fork of itself ready, the spare. The spare takes the next request while the zygote forks another,
so no request waits for a fork. For ``start``, the spare makes the sandbox's socket and record, and then
becomes its shim. All shims share the memory of the imported modules. The zygote itself never runs their code:
no event loop, no thread and no gRPC object exists before a fork.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import marshal
import os
import select
import signal
import socket
import sys
import time
import traceback

from shim import zygote_protocol
from shim.bootstrap import actions
from shim.bootstrap import serve as daemon_life
from shim.bootstrap.command_line import Invocation
from shim.host import daemonize, releases, state_directory
from shim.host.ledger import Ledger
from shim.record import Record
from shim.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

IDLE_S = 600.0  # a node that has started no pod for this long can use the memory otherwise
_REQUEST_TIMEOUT_S = 1.0  # the caller waits this long for the first answer
_DONE_TIMEOUT_S = 10.0  # containerd kills a start that takes longer
_UNDO_TIMEOUT_S = 2.0
_MAX_REQUEST = 1 << 20
_MOST_CONTENT = 1 << 16  # the size of a file in /proc that is read here
_OWN_PACKAGES = ("shim", "hypervisor", "proto")
_ARGUMENTS_START = 47  # fields of /proc/self/stat, counted from 0: proc(5)
_ARGUMENTS_END = 48
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
#: The attributes that a process's children inherit: lines of /proc/[pid]/status.
_INHERITED = (
    *(b"Umask:", b"Uid:", b"Gid:", b"Groups:", b"Cap", b"NoNewPrivs:", b"Seccomp:"),
    *(b"Cpus_allowed:", b"Mems_allowed:"),
)
# The message of a spare to the zygote.
_TAKEN, _RETIRE = b"T", b"R"


class Request(Record):
    """The parts of a caller's request, in this order."""

    #: The zygote that is meant.
    identity: str
    #: containerd's process.
    parent: int
    working_directory: str
    arguments: list[str]
    environment: dict[bytes, bytes]
    sent: bytes
    #: When it was forked, in seconds of ``time.monotonic()``.
    born_at_s: float


def serve(address: str) -> None:
    """Serve one containerd until no request has arrived for a while, or the program has changed.

    The caller's descriptor 3 is the lock that makes this the only zygote of its socket.

    :param address: containerd's.
    :raises OSError: if the socket cannot be made.
    """
    os.chdir("/")
    os.nice(10)  # the shim that was started just before has priority
    root = releases.root()
    if root is not None:
        releases.prune(root, wait_s=0.0)
    _warm()
    os.setpriority(os.PRIO_PROCESS, 0, 0)
    # The kernel moves a process that is woken over a socket to the processor of the process that woke it,
    # where it would run first: the next spare would be forked before the request is done, and a shim would
    # begin before its caller has ended.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    identity = zygote_protocol.identity_of(address)
    path = zygote_protocol.socket_path(identity)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        previous = os.umask(0o177)
        listener.bind(path)
        os.umask(previous)
        try:
            listener.listen(128)
            listener.setblocking(False)  # noqa: FBT003 - its only spelling
            _keep_a_spare(listener, identity, files=_files())
        finally:
            os.unlink(path)
    releases.leave()


def _warm() -> None:
    import hashlib  # noqa: F401, PLC0415 - start needs it
    import tomllib  # noqa: F401, PLC0415 - as above

    import pyroute2  # noqa: F401, PLC0415 - a shim whose sandbox has an interface needs it

    from shim import daemon  # noqa: F401, PLC0415 - as above
    from shim.bootstrap import delete, start  # noqa: F401, PLC0415 - importing them is the point
    from shim.host import kernel  # noqa: F401, PLC0415 - as above
    from shim.services import management  # noqa: F401, PLC0415 - shims with a management client share it
    from shim.transport import grpc_server  # noqa: F401, PLC0415 - as above
    from shim.version import version  # noqa: PLC0415 - as above

    version()  # its shims also tell it when another release has been installed

    # All existing objects stay. If the collector ignores them, it does not write to their memory, which would
    # end the sharing.
    gc.collect()
    gc.freeze()
    gc.disable()  # until a fork is a shim


def _files() -> dict[str, int]:
    """Record when each file of the program, and the first file of each library, was changed."""
    paths = {sys.executable}
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if path and (name.partition(".")[0] in _OWN_PACKAGES or ("." not in name and "-packages/" in path)):
            paths.add(path)
    return {path: os.stat(path).st_mtime_ns for path in paths}


def _unchanged(files: dict[str, int]) -> bool:
    try:
        return all(os.stat(path).st_mtime_ns == changed_at for path, changed_at in files.items())
    except FileNotFoundError:
        return False


def _keep_a_spare(listener: socket.socket, identity: str, *, files: dict[str, int]) -> None:
    """Fork a spare, and another one whenever it is taken; return when no more are needed."""
    said = _TAKEN
    while said == _TAKEN:
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            ours.close()
            _be_the_spare(listener, theirs, identity, files)
        theirs.close()
        ours.settimeout(IDLE_S)
        try:
            said = ours.recv(1)
        except TimeoutError:
            return
        ours.close()


def _be_the_spare(
    listener: socket.socket, zygote: socket.socket, identity: str, files: dict[str, int]
) -> None:
    """Serve one request and exit without clean-up: the spare must not release what the zygote holds."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(daemonize.LISTENER_DESCRIPTOR)  # the lock is the zygote's alone
        _rehearse(identity, files)
        with _next_caller(listener, zygote) as caller:
            if not _unchanged(files):
                zygote.send(_RETIRE)
                os._exit(0)
            zygote.send(_TAKEN)
            caller.settimeout(_REQUEST_TIMEOUT_S)
            request = _receive(caller, identity)
            if request is not None:
                _do(request, caller)
        status = 0
    except BaseException:  # noqa: BLE001 - like the interpreter at the end of a program
        traceback.print_exc()
    finally:
        os._exit(status)


def _rehearse(identity: str, files: dict[str, int]) -> None:
    """Rehearse a request, without leaving anything behind.

    The kernel copies memory that a fork writes to; it is better done now than while containerd waits.
    After it, a start makes 53 page faults instead of 287.
    """
    from shim import config  # noqa: PLC0415 - the entry point does without
    from shim.bootstrap import command_line, dialect, start  # noqa: PLC0415 - as above

    _unchanged(files)
    _surroundings("self")
    environment = dict(os.environb)
    _adopt(environment)
    line = command_line.parse(["-namespace", "n", "-id", "i", "-address", "", "-publish-binary", "", "start"])
    marshal.loads(marshal.dumps((environment, line.as_dict())))  # noqa: S302 - its own message
    with contextlib.suppress(Refusal, OSError):
        dialect.identify_caller(b"", line)
        config.parse(config.locate(os.environ))
        start.rehearse(f"{zygote_protocol.socket_path(identity)}.rehearsal")


def _next_caller(listener: socket.socket, zygote: socket.socket) -> socket.socket:
    """Wait for a caller, or die with the zygote."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(zygote, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if listener.fileno() in ready:
            with contextlib.suppress(BlockingIOError):  # the caller is gone
                return listener.accept()[0]
        elif ready:
            os._exit(0)


def _receive(caller: socket.socket, identity: str) -> Request | None:
    """Read a request, and accept it if this process can do the work in its caller's place."""
    credentials = caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    if zygote_protocol.user_of(credentials) != os.geteuid():
        return None
    pid = int.from_bytes(credentials[:4], sys.byteorder)
    try:
        values = marshal.loads(caller.recv(_MAX_REQUEST))  # noqa: S302 - only root can send one
        request = Request(**dict(zip(Request.fields(), values, strict=True)))
        if request.identity == identity and _surroundings(pid) == _surroundings("self"):
            caller.send(zygote_protocol.ACCEPTED)
            return request
        caller.send(zygote_protocol.REFUSED)
    except (OSError, ValueError, TypeError, EOFError):
        pass  # the caller is gone, or is of another version
    return None


def _surroundings(pid: int | str) -> list[object]:
    """Describe the attributes of a process that confine its children."""
    found: list[object] = [os.readlink(f"/proc/{pid}/root")]
    found += [os.stat(f"/proc/{pid}/ns/{kind}").st_ino for kind in _NAMESPACES]
    found += [_content(f"/proc/{pid}/{name}") for name in ("cgroup", "limits")]
    found += [line for line in _content(f"/proc/{pid}/status").split(b"\n") if line.startswith(_INHERITED)]
    return found


def _content(path: str) -> bytes:
    """Read a short file with as few system calls as possible."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, _MOST_CONTENT)
    finally:
        os.close(descriptor)


def _do(request: Request, caller: socket.socket) -> None:
    """Serve a request, and become the shim that it needs."""
    _adopt(request.environment)
    os.chdir(request.working_directory)
    successor = Successor(parent=request.parent)
    invocation = Invocation(
        arguments=request.arguments,
        sent=request.sent,
        make_shim=successor.make,
        born_at_s=request.born_at_s,
    )
    answer = actions.perform(invocation)
    if answer is None:
        return
    status, output = answer
    with contextlib.suppress(OSError):  # containerd kills a start that takes too long
        caller.send(bytes([status]) + output[: zygote_protocol.MAX_ANSWER - 1])
    if successor.shim is None:
        caller.close()
        releases.leave()  # the process that was deleted may have been the last of an old release
        return
    caller.settimeout(_DONE_TIMEOUT_S)
    heard = b""
    with contextlib.suppress(OSError):
        heard = caller.recv(1)
    if heard == zygote_protocol.DONE:
        caller.close()  # a shim keeps only its own descriptors; closing this one later would be an error
        successor.shim()
    else:
        successor.undo()


def _adopt(environment: dict[bytes, bytes]) -> None:
    """Take over an environment, which usually differs little from this process's own."""
    for name in os.environb.keys() - environment.keys():
        del os.environb[name]
    for name, value in environment.items():
        if os.environb.get(name) != value:
            os.environb[name] = value


class Successor:
    """Makes the shim for a ``start``: this process, or a fork of it if ``start`` waits for it.

    :param parent: the process of containerd.
    """

    def __init__(self, *, parent: int) -> None:
        self._parent = parent
        self._directory = ""
        #: Turns this process into the shim once containerd has the answer; None if it does not become one.
        self.shim: Callable[[], None] | None = None

    def make(
        self,
        directory: str,
        arguments: list[str],
        *,
        error_output: int,
        listener: int | None,
        register: Callable[[int], None],
    ) -> None:
        """Stand in for :func:`shim.host.daemonize.spawn`; its parameters are explained there."""
        if listener is None:
            become = functools.partial(self._become, directory, arguments, None, error_output)
            daemonize.fork(become, before=register)
            return
        register(os.getpid())
        self._directory = directory
        descriptors = os.dup(listener), os.dup(error_output)
        self.shim = functools.partial(self._become, directory, arguments, *descriptors)

    def undo(self) -> None:
        """Undo a sandbox that containerd does not know."""
        held = state_directory.lock_existing(self._directory)
        if held is not None:
            Ledger(self._directory).undo_all(deadline_s=_UNDO_TIMEOUT_S)

    def _become(self, directory: str, arguments: list[str], listener: int | None, error_output: int) -> None:
        began_s = time.monotonic()
        os.environ.pop("NOTIFY_SOCKET", None)
        daemonize.detach(listener=listener, error_output=error_output)
        daemonize.take_attributes(of=self._parent)
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        _show(arguments)
        gc.enable()
        daemon_life.serve(directory, born_at_s=began_s)


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
