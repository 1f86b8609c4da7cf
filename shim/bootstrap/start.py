"""``start``: find or make the shim of a container's group, and tell containerd its address."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import time

from shim import config, zygote_protocol
from shim.bootstrap import grouping
from shim.bootstrap.dialect import MAX_INPUT, bare, check_grpc, identify_caller, reply_of, version_for
from shim.host import daemonize, private_directory, state_directory
from shim.host.daemonize import READY
from shim.host.ledger import SHIM_PROCESS, Ledger
from shim.host.state_directory import StartRecord
from shim.identifiers import check_identifier
from shim.refusal import Refusal
from shim.telemetry import timeline
from shim.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.bootstrap.command_line import CommandLine, Invocation
    from shim.host.daemonize import MakeShim


DEFAULT_SOCKET_DIR = "/run/containerd/s"
_READY_TIMEOUT_S = 10.0
_CLEANUP_TIMEOUT_S = 2.0
#: Room for the command lines of shims: the zygote's own arguments are overwritten in its forks.
_TITLE_BYTES = 2048
_REHEARSAL = "rehearsal"


def start(line: CommandLine, invocation: Invocation) -> bytes | None:
    """Return the address of the running shim that serves the container.

    :param line: flags as containerd gives them; the working directory is the bundle.
    :param invocation: the command line and standard input.
    :returns: the text for standard output, in the dialect of the caller; empty if this is a zygote's fork and
        the configuration wants no zygote.
    :raises Refusal: if the host, the command line, the input, the configuration or the bundle does not
        allow it; nothing is left behind.
    :raises OSError: if the host fails; nothing is left behind.
    """
    sent = zygote_protocol.read_input() if invocation.sent is None else invocation.sent
    began_s, born_at_s = time.monotonic(), invocation.born_at_s or timeline.born_at_s()
    timeline.note("interpreter", lane=timeline.START, began_s=born_at_s, ended_s=began_s)
    _check_host()
    check_identifier(line.namespace, phase="start", what="namespace")
    check_identifier(line.id, phase="start", what="id")
    bundle = os.getcwd()
    if len(sent) > MAX_INPUT:
        raise Refusal(f"start: standard input: more than {MAX_INPUT} bytes; send smaller runtime options")
    caller = identify_caller(sent, line)
    found = config.locate(
        os.environ,
        options_path=caller.params.options.config_path,
        options_body=caller.params.options.config_body,
    )
    settings = config.parse(found)
    if invocation.make_shim is not None and not settings.shim.zygote:
        return None
    group = grouping.group_of(bundle, line.id)
    check_identifier(group, phase="start", what="group")
    if settings.shim.protocol == "grpc":
        check_grpc(caller, line.publish_binary)
    socket_name = grouping.socket_name(address=line.address, namespace=line.namespace, group=group)
    record = StartRecord(
        namespace=line.namespace,
        id=group,
        bundle=bundle,
        grpc_address=bare(caller.params.grpc_address),
        ttrpc_address=bare(caller.params.ttrpc_address),
        publish_binary=caller.params.binary,
        config_text=config.render(settings),
        config_source=found.source,
        protocol=settings.shim.protocol,
        version=version_for(caller, bundle, line.publish_binary),
        socket_path=grouping.socket_path(caller.params.socket_dir or DEFAULT_SOCKET_DIR, socket_name),
        state_directory=state_directory.path_of(settings.shim.state_dir, socket_name),
        debug=line.debug or caller.params.log_level < 0,
        dialect=caller.dialect,
        started_at=time.time(),
        hako_version=VERSION,
    )
    timeline.note(
        "input, configuration, bundle", lane=timeline.START, began_s=began_s, ended_s=time.monotonic()
    )
    while True:
        with timeline.phase("lock", lane=timeline.START):
            lock = state_directory.lock(record.state_directory)
        try:
            if _is_live(record.socket_path):
                reply = _join(record, container=line.id)
            elif not _remove_leftovers(record):
                reply = _make(record, container=line.id, make_shim=invocation.make_shim or daemonize.spawn)
            else:
                continue
            timeline.note("start", lane=timeline.CONTAINERD, began_s=born_at_s, ended_s=time.monotonic())
            if invocation.make_shim is None:  # otherwise this process becomes the shim, which writes it later
                timeline.write(record.state_directory)
        finally:
            os.close(lock)
        if invocation.make_shim is None and settings.shim.zygote:
            _launch_zygote(line.address)
        return reply


def rehearse(directory: str) -> None:
    """Do what takes time in a ``start``, but make no shim, and leave nothing behind.

    :param directory: a path that does not exist, or that an interrupted rehearsal has left.
    :raises OSError: if the host fails.
    :raises Refusal: if the directory cannot be removed.
    """
    name = grouping.socket_name(address=directory, namespace="", group="")
    record = StartRecord(
        namespace="",
        id=grouping.group_of(directory, _REHEARSAL),
        bundle=directory,
        grpc_address="",
        ttrpc_address="",
        publish_binary="",
        config_text="",
        config_source="",
        protocol="ttrpc",
        socket_path=grouping.socket_path(directory, "socket"),
        state_directory=state_directory.path_of(directory, name),
        debug=False,
        dialect="1.7",
        started_at=time.time(),
    )

    def make_no_shim(*_: object, register: Callable[[int], None], **__: object) -> None:
        register(os.getpid())

    lock = state_directory.lock(record.state_directory)
    try:
        _is_live(record.socket_path)
        _make(record, container=record.id, make_shim=make_no_shim)
        timeline.write(record.state_directory)
        with contextlib.closing(Ledger(record.state_directory)) as ledger:
            ledger.directory(directory)
            _undo(ledger)
    finally:
        os.close(lock)
        timeline.forget()


def _check_host() -> None:
    machine = os.uname().machine
    if machine != "x86_64":
        raise Refusal(f"start: host: its architecture is {machine}; only x86_64 is supported")
    if os.geteuid() != 0:
        raise Refusal(f"start: host: runs as uid {os.geteuid()}; root is required, run containerd as root")


def _is_live(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # noqa: FBT003 - its only spelling
        try:
            probe.connect(path)  # which never waits: unix(7)
        except BlockingIOError:  # the shim is slow, and has many callers already
            return True
        except OSError:
            return False
        return True


def _remove_leftovers(record: StartRecord) -> bool:
    """Undo the remains of a sandbox of the same name that was killed together with containerd.

    :returns: whether there was something; then the state directory, and the lock with it, is gone.
    """
    try:
        ledger = Ledger(record.state_directory)
    except FileNotFoundError:
        return False
    try:
        _undo(ledger)
    finally:
        ledger.close()
    return True


def _undo(ledger: Ledger) -> None:
    failures = ledger.undo_all(deadline_s=_CLEANUP_TIMEOUT_S)
    if failures:
        raise Refusal(f"start: {failures[0]}")


def _join(record: StartRecord, *, container: str) -> bytes:
    """Add a container to a running sandbox, so that no ``delete`` of another ends the sandbox."""
    ledger = Ledger(record.state_directory)
    ledger.created(container)
    ledger.close()
    running = state_directory.read_record(record.state_directory)
    return _publish(running, bundle=record.bundle, dialect=record.dialect)


def _make(record: StartRecord, *, container: str, make_shim: MakeShim) -> bytes:
    """Make the daemon of a sandbox, and wait until its socket accepts connections; the lock is held."""
    ledger = Ledger(record.state_directory, create=True)
    done = False
    try:
        with timeline.phase("state", lane=timeline.START):
            ledger.created(container)
            ledger.file(record.socket_path)
            private_directory.make(os.path.dirname(record.socket_path))
            state_directory.write_record(record)
        with timeline.phase("daemon", lane=timeline.START):
            if record.protocol == "grpc":
                _spawn_grpc(record, ledger, make_shim=make_shim)
            else:
                _spawn_ttrpc(record, ledger, make_shim=make_shim)
        with timeline.phase("reply", lane=timeline.START):
            reply = _publish(record, bundle=record.bundle, dialect=record.dialect)
        done = True
        return reply
    finally:
        if not done:
            _undo(ledger)
        ledger.close()


def _spawn_ttrpc(record: StartRecord, ledger: Ledger, *, make_shim: MakeShim) -> None:
    """Hand a listening socket to the daemon: connections wait in it while the daemon imports its code."""
    with socket.socket(socket.AF_UNIX) as listener:
        _remove_dead_socket(record)
        previous = os.umask(0o177)
        try:
            listener.bind(record.socket_path)
        finally:
            os.umask(previous)
        listener.listen()
        log = daemonize.open_log(record.bundle)
        _spawn(record, ledger, make_shim=make_shim, error_output=log, listener=listener.fileno())
        os.close(log)


def _spawn_grpc(record: StartRecord, ledger: Ledger, *, make_shim: MakeShim) -> None:
    """Wait until the daemon is ready: a gRPC server can only listen on a socket that it made itself."""
    _remove_dead_socket(record)
    reader, writer = os.pipe()
    try:
        _spawn(record, ledger, make_shim=make_shim, error_output=writer, listener=None)
    finally:
        os.close(writer)
    try:
        _wait_until_ready(reader)
    finally:
        os.close(reader)


def _remove_dead_socket(record: StartRecord) -> None:
    try:
        os.unlink(record.socket_path)
    except FileNotFoundError:
        return


def _spawn(
    record: StartRecord, ledger: Ledger, *, make_shim: MakeShim, error_output: int, listener: int | None
) -> None:
    def register(pid: int) -> None:
        ledger.process(pid, name=SHIM_PROCESS)

    flags = ["-namespace", record.namespace, "-id", record.id, "-address", record.grpc_address]
    make_shim(
        record.state_directory,
        [*flags, "-state", record.state_directory],
        error_output=error_output,
        listener=listener,
        register=register,
    )


def _launch_zygote(address: str) -> None:
    """Start a zygote for the next caller, unless one runs or is starting; a failure is harmless.

    :param address: containerd's.
    """
    with contextlib.suppress(OSError):
        private_directory.make(zygote_protocol.ZYGOTE_DIRECTORY)
        path = f"{zygote_protocol.socket_path(zygote_protocol.identity_of(address))}.lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            # The zygote inherits the lock and holds it until it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            arguments = ["-zygote", address.ljust(_TITLE_BYTES)]
            daemonize.fork(
                lambda: daemonize.execute(arguments, error_output=null, listener=lock), before=lambda _: None
            )
        finally:
            os.close(null)
            os.close(lock)


def _wait_until_ready(reader: int) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    said = b""
    while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        block = os.read(reader, 1 << 16)
        said += block
        if READY in block:
            return
        if not block:
            lines = said.decode(errors="replace").split("\n")
            reason = next((text for text in reversed(lines) if text.strip()), "it said nothing")
            raise Refusal(f"start: daemon: it died before it was ready: {reason}; read containerd's log")
    raise Refusal(f"start: daemon: not ready within {_READY_TIMEOUT_S:g} s; read containerd's log")


def _publish(record: StartRecord, *, bundle: str, dialect: str) -> bytes:
    """Write the files that containerd and ``delete`` look for into the bundle, and format the reply."""
    address, reply = reply_of(record, dialect=dialect)
    state_directory.point_to(record.state_directory, bundle=bundle)
    state_directory.write_atomically(os.path.join(bundle, "address"), address)
    return reply
