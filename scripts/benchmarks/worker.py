"""Runs load programs, and talks with them over their streams."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from typing import TYPE_CHECKING, Self

from scripts.benchmarks import load
from scripts.benchmarks.stage import MeasurementError
from tests.e2e.busybox import IMAGE, PYTHON_OPTIONS
from tests.patience import patient

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from scripts.benchmarks.stage import Stage

LIFETIME_S = patient(600.0)
"""A program that hangs is killed after this time, and its measurement fails."""


class Worker:
    """A load program that uses the streams of a command.

    :param name: where it runs, for messages.
    :param command: what brings it up; it is ended when the block is left.
    """

    def __init__(self, name: str, command: Sequence[str | Path]) -> None:
        self._name = name
        self._program = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._end = threading.Timer(LIFETIME_S, self._program.kill)
        self._end.start()

    def __enter__(self) -> Self:
        """Wait until the program is ready.

        :raises MeasurementError: if it never is.
        """
        try:
            self._hear(load.READY)
        except MeasurementError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the command."""
        self._end.cancel()
        self._program.kill()
        self._program.communicate()

    def ask(self, *order: object) -> float:
        """Have the program work.

        :param order: a name of :data:`scripts.benchmarks.load.WORK`, and its arguments.
        :returns: how long the program says that it took, in seconds.
        :raises MeasurementError: if it fails.
        """
        assert self._program.stdin is not None  # noqa: S101 - it was asked for above
        self._program.stdin.write(f"{' '.join(map(str, order))}\n")
        self._program.stdin.flush()
        return float(self._hear(load.TOOK))

    def _hear(self, wanted: str) -> str:
        """Wait for a line that begins with a word, and return its rest; a console echoes what was asked."""
        assert self._program.stdout is not None  # noqa: S101 - it was asked for above
        last = ""
        for line in self._program.stdout:
            last = line.strip()
            if last.startswith(wanted):
                return last.removeprefix(wanted)
            if last.startswith(load.FAILED):
                raise MeasurementError(f"{self._name}: {last.removeprefix(load.FAILED)}")
        self._program.kill()
        _, errors = self._program.communicate()
        raise MeasurementError(f"{self._name}: it ended: {errors.strip() or last}")


@contextlib.contextmanager
def in_container(stage: Stage, *options: str, serves: bool = False) -> Iterator[Worker]:
    """Keep a container under Hako for a block, in which the load program runs.

    :param stage: where.
    :param options: of ``ctr run``.
    :param serves: whether the program serves the others' network measurements.
    :raises MeasurementError: if it does not start.
    """
    name = stage.new_id()
    program = f"type=bind,src={load.__file__},dst=/load.py,options=rbind:ro"
    command = stage.hako.run_argv(
        IMAGE,
        name,
        *("/usr/bin/python3", "-ISB", "/load.py", *([load.SERVE] if serves else [])),
        options=[*PYTHON_OPTIONS, "--mount", program, *options],
    )
    try:
        with Worker(f"container {name}", command) as worker:
            yield worker
    finally:
        stage.hako.remove(name)
