"""Hooks of the OCI runtime specification: programs of the host that a specification names.

They run where runc would run them: in containerd's mount namespace instead of the shim's, in the bundle, and
in their own process group. They get the pid of the machine, which is in the sandbox's network namespace. So
the container has their interfaces from its start on.

https://github.com/opencontainers/runtime-spec/blob/v1.2.0/config.md#posix-platform-hooks
https://github.com/opencontainers/runtime-spec/blob/v1.2.0/runtime.md#lifecycle
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hypervisor import printable
from proto.kata import oci_pb2
from shim.agent.oci_fields import copy, refusing_malformed
from shim.errors import DeadlineExceeded, Internal, InvalidArgument
from shim.host import kernel
from shim.host.answering import all_answer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from shim.host.ledger import Ledger

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 60.0  # half of the kubelet's timeout for a request; runc waits forever
KILL_TIMEOUT_S = 2.0  # for a killed hook to be gone
VERSION = "1.2.0"
_BEFORE_START = ("prestart", "createRuntime")
_MAX_TIMEOUT_S = 1 << 31
_OUTPUT_BYTES = 4096
_SHOWN_LINES = 3
_SHOWN_CHARACTERS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """One program.

    :param name: its position in the specification and its path, for messages.
    :param path: the program.
    :param argv: its arguments, its own name first.
    :param environment: all of its environment.
    :param timeout_s: how long it may run, in seconds.
    """

    name: str
    path: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    timeout_s: float


def parse(spec: dict[str, Any]) -> dict[str, tuple[Hook, ...]]:
    """Read the hooks of a specification that run on the host.

    :param spec: the decoded ``config.json``.
    :returns: the hooks of each kind, in order.
    :raises InvalidArgument: if one is malformed or cannot run here; its name is in the message.
    """
    hooks = spec.get("hooks") or {}
    with refusing_malformed("spec: hooks"):
        copy({"hooks": hooks}, oci_pb2.Spec(), path="")  # refuses the fields that the table refuses
        return {
            kind: tuple(
                _parse_hook(each, name=f"hooks.{kind}[{number}]")
                for number, each in enumerate(hooks.get(kind) or ())
            )
            for kind in (*_BEFORE_START, "poststart", "poststop")
        }


def _parse_hook(hook: Any, *, name: str) -> Hook:
    if not isinstance(hook, dict):
        raise InvalidArgument(f"spec: {name}: not an object")
    path, timeout = hook.get("path"), hook.get("timeout")
    if not isinstance(path, str) or not path.startswith("/"):
        raise InvalidArgument(f"spec: {name}.path: {path!r}: not an absolute path")
    lists = {key: hook.get(key) or [] for key in ("args", "env")}
    for key, strings in {"path": [path], **lists}.items():
        if not isinstance(strings, list) or not all(_is_argument(each) for each in strings):
            raise InvalidArgument(f"spec: {name}.{key}: not made of strings that a program can be given")
    if timeout is not None and (type(timeout) is not int or timeout <= 0):
        raise InvalidArgument(f"spec: {name}.timeout: {timeout!r}: not a number of seconds above 0")
    variables = [each.partition("=") for each in lists["env"]]
    if not all(key and equals for key, equals, _ in variables):
        raise InvalidArgument(f"spec: {name}.env: an entry is not of the form NAME=VALUE")
    return Hook(
        name=f"{name} {path}",
        path=path,
        argv=tuple(lists["args"]) or (path,),
        environment={key: value for key, _, value in variables},
        timeout_s=DEFAULT_TIMEOUT_S if timeout is None else float(min(timeout, _MAX_TIMEOUT_S)),
    )


def _is_argument(value: Any) -> bool:
    try:
        return isinstance(value, str) and b"\0" not in value.encode()
    except UnicodeEncodeError:  # JSON can contain half of a surrogate pair
        return False


class Hooks:
    """The hooks of one container.

    :param container_id: its id.
    :param bundle: its bundle.
    :param spec: its decoded ``config.json``.
    :param mount_namespace: an open mount namespace to run them in; None is this process's own.
    :param ledger: where they are recorded while they run; None if there is no ledger.
    :raises InvalidArgument: if one is malformed, or cannot be run on the host.
    """

    def __init__(
        self,
        container_id: str,
        *,
        bundle: Path,
        spec: dict[str, Any],
        mount_namespace: int | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._hooks = parse(spec)
        self._container_id = container_id
        self._bundle = bundle
        self._annotations = spec.get("annotations") or {}
        self._mount_namespace = mount_namespace
        self._ledger = ledger
        self._is_undone = True

    async def created(self, *, pid: int) -> None:
        """Run the hooks between a container's creation and its start, up to the first failure.

        :param pid: the machine's.
        :raises Internal: if one fails.
        :raises DeadlineExceeded: if its file system does not answer.
        """
        self._is_undone = False
        for kind in _BEFORE_START:
            for hook in self._hooks[kind]:
                await self._run(hook, status="creating", pid=pid)

    async def started(self, *, pid: int) -> None:
        """Run the poststart hooks; failures are logged.

        :param pid: the machine's.
        """
        await self._run_all(self._hooks["poststart"], status="running", pid=pid)

    async def deleted(self) -> None:
        """Run the poststop hooks, unless no earlier hooks ran; failures are logged."""
        if not self._is_undone:
            self._is_undone = True
            await self.clean_up()

    async def clean_up(self) -> None:
        """Run the poststop hooks, even if no earlier hooks ran; failures are logged."""
        await self._run_all(self._hooks["poststop"], status="stopped", pid=None)

    async def _run_all(self, hooks: Iterable[Hook], *, status: str, pid: int | None) -> None:
        for hook in hooks:
            try:
                await self._run(hook, status=status, pid=pid)
            except (Internal, DeadlineExceeded) as error:
                log.warning("%s", error)

    async def _run(self, hook: Hook, *, status: str, pid: int | None) -> None:
        state = {
            "ociVersion": VERSION,
            "id": self._container_id,
            "status": status,
            **({} if pid is None else {"pid": pid}),
            "bundle": str(self._bundle),
            "annotations": self._annotations,
        }
        try:
            await all_answer([hook.path, str(self._bundle)], phase=f"hook: container {self._container_id}")
            running = _Running.start(
                hook,
                standard_input=json.dumps(state).encode(),
                directory=self._bundle,
                mount_namespace=self._mount_namespace,
            )
        except OSError as error:
            raise Internal(
                f"hook: container {self._container_id}: {hook.name}: {error.filename}: {error.strerror}"
            ) from error
        record = None if self._ledger is None else self._ledger.process(running.pid, name=hook.path)
        try:
            failure = await running.wait(timeout_s=hook.timeout_s)
        finally:
            await running.close()
            if self._ledger is not None and record is not None:
                self._ledger.undone(record)
        if failure:
            raise Internal(f"hook: container {self._container_id}: {hook.name}: {failure}")


class _Running:
    """A running hook.

    :param process: its first process, the leader of its group.
    :param output: the read end of the pipe for its output; closed by :meth:`close`.
    """

    def __init__(self, process: subprocess.Popen[bytes], *, output: int) -> None:
        self.pid = process.pid
        self._process = process
        self._output = output
        self._last = b""
        self._exited = asyncio.Event()
        self._pidfd = os.pidfd_open(process.pid)
        os.set_blocking(output, False)
        loop = asyncio.get_running_loop()
        loop.add_reader(output, self._read)
        loop.add_reader(self._pidfd, self._exited.set)

    @classmethod
    def start(
        cls, hook: Hook, *, standard_input: bytes, directory: Path, mount_namespace: int | None
    ) -> _Running:
        """Start a hook.

        :param standard_input: the content of its standard input.
        :param directory: its working directory.
        :raises OSError: if that does not exist, or the program cannot be executed.
        """
        # A file, because a hook that does not read all of it must not block the writer.
        source = os.memfd_create("state", os.MFD_CLOEXEC)
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            os.write(source, standard_input)
            os.lseek(source, 0, os.SEEK_SET)
            spawn = partial(_spawn, hook, directory, mount_namespace, standard_input=source, output=write_end)
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="hook") as executor:
                process = executor.submit(spawn).result()
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(source)
            os.close(write_end)
        return cls(process, output=read_end)

    async def wait(self, *, timeout_s: float) -> str:
        """Wait for its end, but not for processes that it leaves behind.

        :returns: why it failed; empty if it succeeded.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._exited.wait()
        except TimeoutError:
            return f"not finished within {timeout_s:g} s and killed{self._last_words()}"
        status = self._process.wait()
        if status == 0:
            return ""
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        return f"{how}{self._last_words()}"

    async def close(self) -> None:
        """Kill it and its whole group if it still runs, and release it."""
        try:
            if self._process.returncode is None:
                # It has not been reaped yet, so no other group can have its id.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(KILL_TIMEOUT_S):
                        await self._exited.wait()
                self._process.poll()
        finally:
            loop = asyncio.get_running_loop()
            for descriptor in (self._output, self._pidfd):
                loop.remove_reader(descriptor)
                os.close(descriptor)

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._output, 1 << 16)
            self._last = (self._last + data)[-_OUTPUT_BYTES:]
            if not data:
                asyncio.get_running_loop().remove_reader(self._output)

    def _last_words(self) -> str:
        self._read()
        lines = [line.strip() for line in self._last.decode(errors="replace").splitlines() if line.strip()]
        words = "; ".join(lines[-_SHOWN_LINES:])[-_SHOWN_CHARACTERS:]
        return f": {printable(words, limit=_SHOWN_CHARACTERS)}" if words else ""


def _spawn(
    hook: Hook, directory: Path, mount_namespace: int | None, *, standard_input: int, output: int
) -> subprocess.Popen[bytes]:
    """Start a hook in its own thread, which enters the namespace for it.

    :raises OSError: if it cannot be executed.
    """
    if mount_namespace is not None:
        kernel.enter_mount_namespace(mount_namespace)
    return subprocess.Popen(
        hook.argv,
        executable=hook.path,
        env=hook.environment,
        cwd=directory,
        stdin=standard_input,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
