"""Start programs below one child subreaper, so that nothing they leave behind can get out of sight.

A shim detaches from containerd on purpose. Every orphan below the nursery is adopted by it, is reaped by
it, and is therefore found again as its descendant: the census needs no list of program names.

Run as a program, this module is the subreaper: it reads one JSON object per line (what to start) and writes
one per line (a process id, later its exit status). ``Nursery`` is the side that tests use.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PR_SET_CHILD_SUBREAPER = 36
ZYGOTE = " -zygote"
START_S = 120.0


@dataclass(frozen=True, slots=True)
class Process:
    """A process as ``/proc`` shows it."""

    pid: int
    parent: int
    state: str
    start_time: int
    command: str


def processes() -> dict[int, Process]:
    """Read every process of the machine."""
    found = {}
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # A name may have been cut within a character.
            status = (directory / "stat").read_text(encoding="utf-8", errors="replace")
            name, _, rest = status.rpartition(")")
            fields = rest.split()
            arguments = (directory / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            found[int(directory.name)] = Process(
                pid=int(directory.name),
                parent=int(fields[1]),
                state=fields[0],
                start_time=int(fields[19]),
                command=b" ".join(arguments).decode(errors="replace") or name.partition("(")[2],
            )
    return found


def descendants(ancestor: int) -> Iterator[Process]:
    """Yield the living processes below ``ancestor``."""
    everything = processes()
    pending = [ancestor]
    while pending:
        parent = pending.pop()
        for process in everything.values():
            if process.parent == parent and process.state != "Z":
                pending.append(process.pid)
                yield process


class Nursery:
    """The subreaper, seen from a test."""

    def __init__(self) -> None:
        """Start the subreaper."""
        self._program = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        #: How long each awaited program took from its fork to its end, in seconds.
        self.took_s: dict[int, float] = {}
        self._exits: dict[int, int] = {}
        self._buffer = b""

    def __enter__(self) -> Self:
        """Return the nursery; leaving the block ends everything below it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the subreaper, which kills all processes below it."""
        self._program.communicate(timeout=START_S)

    def spawn(
        self,
        argv: Sequence[str | Path],
        *,
        environment: Mapping[str, str],
        directory: Path,
        stdin: Path = Path("/dev/null"),
        stdout: Path,
        stderr: Path,
    ) -> int:
        """Start a program and return its process id.

        :param argv: the program and its arguments.
        :param environment: its whole environment.
        :param directory: its working directory.
        :param stdin: the file it reads.
        :param stdout: the file its standard output is appended to.
        :param stderr: the file its standard error is appended to; may be the same one.
        """
        assert self._program.stdin is not None
        request = {
            "argv": [str(argument) for argument in argv],
            "env": dict(environment),
            "cwd": str(directory),
            "files": [str(stdin), str(stdout), str(stderr)],
        }
        self._program.stdin.write(json.dumps(request).encode() + b"\n")
        self._program.stdin.flush()
        while "started" not in (reply := self._reply(deadline=time.monotonic() + START_S)):
            self._note_exit(reply)
        if reply["started"] is None:
            raise RuntimeError(f"nursery: {argv[0]}: {reply['error']}")
        pid = reply["started"]
        assert isinstance(pid, int)
        self._exits.pop(pid, None)  # of another program that had the same number
        return pid

    def wait(self, pid: int, *, timeout_s: float) -> int:
        """Return the exit status of a started program, negative for a signal.

        :raises TimeoutError: if it is still running after ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        while pid not in self._exits:
            self._note_exit(self._reply(deadline=deadline))
        return self._exits.pop(pid)

    def _note_exit(self, reply: dict[str, Any]) -> None:
        self._exits[reply["pid"]] = reply["status"]
        self.took_s[reply["pid"]] = reply["took_s"]

    def descendants(self) -> Iterator[Process]:
        """Yield every living process below the subreaper, at any depth, detached or not.

        Zygotes are left out: they serve no container, may come up at any time, and end with the containerd
        that they belong to, or with the nursery.
        """
        return (process for process in descendants(self._program.pid) if ZYGOTE not in process.command)

    def zygotes(self, address: Path) -> Iterator[Process]:
        """Yield the zygote of the containerd at an address; the fork that it keeps ends with it."""
        wanted = f"{ZYGOTE} {address} "
        found = [process for process in descendants(self._program.pid) if wanted in process.command]
        pids = {process.pid for process in found}
        return (process for process in found if process.parent not in pids)

    def _reply(self, *, deadline: float) -> dict[str, Any]:
        assert self._program.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._program.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError("nursery: a program: it did not end in time")
                chunk = os.read(self._program.stdout.fileno(), 65536)
                if not chunk:
                    raise RuntimeError("nursery: the subreaper ended")
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply = json.loads(line)
        assert isinstance(reply, dict)
        return reply


def _start(request: dict[str, Any]) -> dict[str, object]:
    stdin, stdout, stderr = request["files"]
    with open(stdin, "rb") as source, open(stdout, "ab") as output, open(stderr, "ab") as errors:  # noqa: PTH123
        try:
            child = subprocess.Popen(
                request["argv"],
                env=request["env"],
                cwd=request["cwd"],
                stdin=source,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as error:
            return {"started": None, "error": str(error)}
    child.returncode = 0  # the loop below reaps it; Popen must not complain
    return {"started": child.pid}


def main() -> None:
    """Serve requests until standard input ends, then kill the remaining processes."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    started: dict[int, float] = {}
    selector = selectors.DefaultSelector()
    selector.register(ours, selectors.EVENT_READ)
    selector.register(sys.stdin, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is ours:
                ours.recv(4096)
                continue
            line = sys.stdin.readline()
            if not line:
                while left := list(descendants(os.getpid())):
                    for process in left:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(process.pid, signal.SIGKILL)
                    os.waitpid(-1, 0)
                return
            request, began_s = json.loads(line), time.perf_counter()
            reply = _start(request)
            if isinstance(reply["started"], int):
                started[reply["started"]] = began_s
            print(json.dumps(reply), flush=True)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                if pid in started:
                    took_s = time.perf_counter() - started.pop(pid)
                    exited = {"pid": pid, "status": os.waitstatus_to_exitcode(status), "took_s": took_s}
                    print(json.dumps(exited), flush=True)


if __name__ == "__main__":
    main()
