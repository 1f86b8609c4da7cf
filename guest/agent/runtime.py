"""Driving crun, the OCI runtime inside the guest."""

from __future__ import annotations

import _socket
import _thread
import fcntl
import os
import time

from guest.agent import cgroup, files, reaper, streams, timeline
from guest.agent.console import log as report
from guest.agent.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from guest.agent.reaper import Exit
    from guest.agent.streams import ProcessStreams

_CRUN = "/usr/bin/crun"
_STATE = "/run/crun"
_WORK = "/run/hako"
_TIMEOUT_S = 120.0
_SIGKILL = 9

_AHEAD = "/run/hako/ahead"
_AHEAD_ID = "+ahead"
"""No container has this id, because the agent refuses ids with a plus sign."""

_lock = _thread.allocate_lock()
_serial = 0
_sealed_fd = -1
_ahead: _Ahead | None = None


class Started:
    """A process that crun has handed over to the agent.

    :param pid: its process id.
    :param end: its end.
    :param its_streams: its standard streams.
    """

    __slots__ = ("end", "pid", "streams")

    def __init__(self, pid: int, end: Exit, its_streams: ProcessStreams) -> None:
        self.pid = pid
        self.end = end
        self.streams = its_streams


def prepare() -> None:
    """Do now the one-time work of the first command."""
    global _ahead  # noqa: PLW0603  there is one, for the first container
    _sealed_crun()
    _ahead = _Ahead()


def _sealed_crun() -> str:
    """Give the path of a sealed copy of crun.

    crun refuses to run from a file that a container could overwrite through /proc: it makes a safe copy of
    itself and starts again. From a sealed file it starts only once, which halves its start-up.
    """
    global _sealed_fd  # noqa: PLW0603  one copy for the life of the machine
    with _lock:
        if _sealed_fd < 0:
            fd = os.memfd_create("crun", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            with open(_CRUN, "rb", buffering=0) as file:
                os.sendfile(fd, file.fileno(), 0, os.fstat(file.fileno()).st_size)
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            _sealed_fd = fd
            # Only the copy is used from now on, and both would take memory.
            os.unlink(_CRUN)
    return f"/proc/self/fd/{_sealed_fd}"


def _scratch() -> str:
    """Make a directory for one run of crun."""
    global _serial  # noqa: PLW0603  numbers the runs
    with _lock:
        _serial += 1
        path = f"{_WORK}/{_serial}"
    files.make_directories(path, mode=0o700)
    return path


def _spawn(
    launch: reaper.Launch,
    arguments: list[str],
    *,
    stdio: tuple[int, int, int],
    log: str,
    oom_score_adj: int = 0,
) -> tuple[int, Exit]:
    argv = ["crun", f"--log={log}", "--cgroup-manager=cgroupfs", *arguments]
    return launch.spawn(_sealed_crun(), argv, stdio, oom_score_adj=oom_score_adj)


def _await(command: str, pid: int, end: Exit, *, log: str, began_s: float, program: str = "") -> None:
    if not end.wait(_TIMEOUT_S):
        reaper.signal(pid, end, _SIGKILL)
        raise AgentError(f"crun: {command}: no end after {_TIMEOUT_S:.0f} s; see the guest's console")
    timeline.note(f"crun {command}", began_s)
    if end.status != 0:
        raise AgentError(_cause(command, log, program))


def _run(
    launch: reaper.Launch,
    arguments: list[str],
    *,
    stdio: tuple[int, int, int],
    log: str,
    process: dict[str, Any] | None = None,
) -> None:
    began_s = time.monotonic()
    # crun sets the score only of a container's init; other processes inherit it from their crun.
    score, program = (process.get("oomScoreAdj", 0), process["args"][0]) if process else (0, "")
    pid, end = _spawn(launch, arguments, stdio=stdio, log=log, oom_score_adj=score)
    _await(arguments[0], pid, end, log=log, began_s=began_s, program=program)


def _cause(command: str, log: str, program: str) -> str:
    try:
        lines = [line.strip() for line in files.read(log).splitlines() if line.strip()]
    except OSError:
        lines = []
    told = in_words_of_go(lines[0], program=program) if lines else "failed without a message"
    return f"crun: {command}: {told}"


def in_words_of_go(message: str, *, program: str) -> str:
    """Word crun's message as Go programs do, because clients such as Docker recognize errors by the words.

    :param message: as crun has it, with the C library's words for an errno at its end.
    :param program: the program to run, as crun does not always name it.
    :returns: the same with Go's words, which begin with small letters.
    """
    # Go has one phrase for every file that is not a program, directories included.
    message = message.replace(
        "open executable: Operation not permitted", "open executable: Permission denied"
    )
    message = message.replace("open executable:", f'exec: "{program}":')
    found, quote, after = message.partition("executable file `")
    name, unquote, rest = after.partition("` not found in $PATH")
    if quote and unquote:
        message = f'{found}exec: "{name}": executable file not found in $PATH{rest}'
    told, colon, cause = message.rpartition(": ")
    return f"{told}{colon}{cause[:1].lower()}{cause[1:]}"


def run(*arguments: str) -> None:
    """Run a crun command that takes no input and leaves no process.

    :param arguments: command, options and operands.
    :raises AgentError: with crun's own message, if it fails.
    """
    scratch = _scratch()
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        with reaper.Launch() as launch:
            _run(launch, list(arguments), stdio=(null, null, null), log=f"{scratch}/log")
    finally:
        os.close(null)
        files.remove_tree(scratch)


class _Ahead:
    """A ``crun create`` that is started before its container is known.

    It waits for its configuration on a FIFO. Under emulation, its loading, linking and first steps take more
    than a quarter of the whole command. In a clone, they are already done.
    """

    __slots__ = ("_config_fd", "_end", "_pid", "_pipes")

    def __init__(self) -> None:
        files.make_directories(_AHEAD, mode=0o700)
        os.mkfifo(f"{_AHEAD}/config.json")
        self._pipes = streams.Pipes()
        arguments = ["create", f"--bundle={_AHEAD}", f"--pid-file={_AHEAD}/pid", _AHEAD_ID]
        with reaper.Launch() as launch:
            self._pid, self._end = _spawn(launch, arguments, stdio=self._pipes.child, log=f"{_AHEAD}/log")
        self._pipes.close_child()
        # Returns when crun has opened its end.
        self._config_fd = os.open(f"{_AHEAD}/config.json", os.O_WRONLY | os.O_CLOEXEC)

    @property
    def lives(self) -> bool:
        """Whether it still waits; it may have been killed for memory."""
        return self._end.status is None

    def create(self, container_id: str, config: str, *, program: str) -> Started:
        """Let it create a container without a terminal.

        :param container_id: the container.
        :param config: the content of its ``config.json``.
        :param program: the program that its init runs.
        :returns: its init.
        :raises AgentError: with crun's own message, if it fails.
        """
        began_s = time.monotonic()
        its_streams = self._pipes.streams()
        try:
            with reaper.Launch() as begun:
                self._configure(config)
                log = f"{_AHEAD}/log"
                _await("create", self._pid, self._end, log=log, began_s=began_s, program=program)
                # All that crun knows of a container's id is the name of this directory.
                os.rename(f"{_STATE}/{_AHEAD_ID}", f"{_STATE}/{container_id}")
                pid = int(files.read(f"{_AHEAD}/pid"))
                return Started(pid, begun.watch(pid), its_streams)
        except BaseException:
            its_streams.close()
            raise

    def _configure(self, config: str) -> None:
        # crun reads the FIFO once, and later copies the file of that name.
        files.create(f"{_AHEAD}/new", config, mode=0o600)
        os.rename(f"{_AHEAD}/new", f"{_AHEAD}/config.json")
        left = memoryview(config.encode())
        try:
            while left:
                left = left[os.write(self._config_fd, left) :]
        except BrokenPipeError:
            report("crun: it did not read all of its configuration")  # it will report why
        finally:
            os.close(self._config_fd)


def create(container_id: str, config: str, *, bundle: str, process: dict[str, Any]) -> Started:
    """Create a container up to the point where its init waits to be started.

    :param container_id: the container.
    :param config: the content of its ``config.json``.
    :param bundle: its directory.
    :param process: the part of the configuration that describes its init.
    :returns: its init.
    :raises AgentError: with crun's own message, if it fails.
    """
    ahead = None if process["terminal"] else _take_ahead()
    if ahead is not None:
        return ahead.create(container_id, config, program=process["args"][0])
    files.create(f"{bundle}/config.json", config, mode=0o600)
    return launch(["create", f"--bundle={bundle}"], container_id, process=process)


def _take_ahead() -> _Ahead | None:
    global _ahead
    with _lock:
        taken, _ahead = _ahead, None
    return taken if taken is not None and taken.lives else None


def start(container_id: str) -> None:
    """Let the init of a created container run.

    For this, ``crun start`` only writes to the FIFO that the container waits on. Under emulation, starting a
    program for that would take longer than the rest of the request.

    :param container_id: the container.
    :raises AgentError: with crun's own message, if it cannot be started.
    """
    fifo = f"{_STATE}/{container_id}/exec.fifo"
    try:
        # Does not wait for a reader: if there is none, init is dead.
        fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            # By this file, crun tells a started container from a created one.
            os.unlink(fifo)
            os.write(fd, b"\0")
        finally:
            os.close(fd)
    except OSError:
        # crun's own error message is the best one.
        run("start", container_id)


def delete(container_id: str, *, path: str) -> None:
    """Undo what crun has made for a container whose processes have ended.

    :param container_id: the container.
    :param path: its cgroup.
    :raises AgentError: with crun's own message, if it cannot be deleted.
    """
    try:
        cgroup.remove(path)
        files.remove_tree(f"{_STATE}/{container_id}")
    except OSError:
        # A process may not have disappeared yet, and crun waits for it.
        run("delete", "--force", container_id)


def launch(command: list[str], operand: str, *, process: dict[str, Any]) -> Started:
    """Run ``crun create`` or ``crun exec --detach`` and adopt the process it leaves behind.

    :param command: the command with its own options.
    :param operand: the container.
    :param process: the ``process`` object of the specification.
    :returns: the process.
    :raises AgentError: with crun's own message, if it fails.
    """
    scratch = _scratch()
    try:
        with reaper.Launch() as begun:
            arguments = [*command, f"--pid-file={scratch}/pid"]
            connect = _on_terminal if process["terminal"] else _on_pipes
            its_streams = connect(begun, [*arguments, operand], process, scratch)
            pid = int(files.read(f"{scratch}/pid"))
            return Started(pid, begun.watch(pid), its_streams)
    finally:
        files.remove_tree(scratch)


def _on_pipes(
    begun: reaper.Launch, arguments: list[str], process: dict[str, Any], scratch: str
) -> ProcessStreams:
    pipes = streams.Pipes()
    its_streams = pipes.streams()
    try:
        _run(begun, arguments, stdio=pipes.child, log=f"{scratch}/log", process=process)
    except BaseException:
        its_streams.close()
        raise
    finally:
        pipes.close_child()
    return its_streams


def _on_terminal(
    begun: reaper.Launch, arguments: list[str], process: dict[str, Any], scratch: str
) -> ProcessStreams:
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        listener.bind(f"{scratch}/console")
        listener.listen(1)
        command, *rest = arguments
        arguments = [command, f"--console-socket={scratch}/console", *rest]
        _run(begun, arguments, stdio=(null, null, null), log=f"{scratch}/log", process=process)
        # crun has succeeded, so its message is in the socket.
        return streams.of_terminal(_receive_descriptor(listener))
    finally:
        os.close(null)
        listener.close()


def _receive_descriptor(listener: _socket.socket) -> int:
    """Take the one descriptor that crun has sent to the console socket."""
    listener.settimeout(0)
    fd, _address = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001  as in vsock
    peer = _socket.socket(fileno=fd)
    try:
        _data, ancillary, _flags, _address = peer.recvmsg(4096, _socket.CMSG_SPACE(4))
    finally:
        peer.close()
    for level, kind, content in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            terminal = int.from_bytes(content[:4], "little")
            fcntl.fcntl(terminal, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
            return terminal
    raise AgentError("crun: console: no terminal came with the message")
