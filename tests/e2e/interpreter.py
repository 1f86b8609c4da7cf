"""Python in a container: the machine's own, with the tests' programs beside it."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.e2e.conftest import Stack

PROGRAM_TIMEOUT_S = patient(180.0)
TESTS = Path(__file__).parents[1]
READ_ONLY = {"/usr": "/usr", "/usr/lib": "/lib", "/usr/lib64": "/lib64", str(TESTS): "/tree/tests"}


class Interpreter:
    """A container that runs the programs.

    :param stack: the stack whose containerd runs it.
    :param name: its id.
    """

    def __init__(self, stack: Stack, name: str) -> None:
        self.stack = stack
        self.name = name
        self._numbers = itertools.count(1)

    def run(self, program: str, *arguments: str) -> str:
        """Run a program that must succeed.

        :param program: a module of ``tests.e2e.programs``.
        :param arguments: its arguments.
        :returns: its output.
        """
        return self.execute(*_command("/tree", program), *arguments)

    def execute(self, *command: str) -> str:
        """Run a command that must succeed, and return its output."""
        argv = ("task", "exec", "--exec-id", self._exec_id(), self.name, *command)
        result = self.stack.containerd.ctr(*argv, timeout_s=PROGRAM_TIMEOUT_S)
        assert result.code == 0, result.stderr
        return result.stdout

    def ask(self, *command: str) -> str:
        """Run a command that only looks, and says something."""
        asked = self.stack.containerd.ask
        result = asked(self.name, self._exec_id(), *command, timeout_s=PROGRAM_TIMEOUT_S)
        assert result.code == 0, result.stderr
        return result.stdout

    def _exec_id(self) -> str:
        return f"exec-{next(self._numbers)}"


def run_on_the_host(program: str, *arguments: str) -> str:
    """Run a program on the host, as :meth:`Interpreter.run` does in a container."""
    argv = [*_command(str(TESTS.parent), program), *arguments]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def _command(tree: str, program: str) -> list[str]:
    return ["env", f"PYTHONPATH={tree}", "/usr/bin/python3", "-B", "-m", f"tests.e2e.programs.{program}"]


@contextlib.contextmanager
def interpreter(
    stack: Stack, *, binds: dict[Path, str], options: Sequence[str] = ()
) -> Iterator[Interpreter]:
    """Run a container with Python in it for the length of a block.

    :param stack: the stack whose containerd runs it.
    :param binds: directories of the host, and where they are writable in the container.
    :param options: further options of ``ctr run``.
    """
    name = new_id()
    mounts = [
        *(f"type=bind,src={source},dst={target},options=rbind:ro" for source, target in READ_ONLY.items()),
        *(f"type=bind,src={source},dst={target},options=rbind:rw" for source, target in binds.items()),
    ]
    flags = [word for mount in mounts for word in ("--mount", mount)]
    started = stack.containerd.run(IMAGE, name, "sleep", "100000", options=["--detach", *flags, *options])
    try:
        assert started.code == 0, started.stderr
        yield Interpreter(stack, name)
    finally:
        stack.containerd.remove(name)
