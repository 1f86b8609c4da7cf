"""A daemon runs only once it is recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.waiting import WITHIN_S

ROOT = Path(__file__).parents[4]
PROGRAM = """
import os, sys
from shim.host import daemonize
if sys.argv[1:] == ["daemon"]:
    os.write(2, b"runs")
    sys.exit()
def register(pid):
    os.write(1, b"%d " % pid)
    {register}
daemonize.spawn("", ["daemon"], listener=None, error_output=int(sys.argv[1]), register=register)
"""


def said(tmp_path: Path, register: str) -> tuple[int, bytes]:
    """Spawn a daemon; return its pid, and its output up to its end."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(register=register))
    reader, writer = os.pipe()
    parent = subprocess.run(
        [sys.executable, str(program), str(writer)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        pass_fds=[writer],
        capture_output=True,
        timeout=WITHIN_S,
        check=False,
    )
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        # Reading ends when the daemon ends, which is the last to hold the pipe.
        return int(parent.stdout), file.read()


def test_a_recorded_daemon_runs(tmp_path: Path) -> None:
    pid, output = said(tmp_path, "pass")
    assert pid > 0
    assert output == b"runs"


def test_a_daemon_does_not_run_if_it_cannot_be_recorded(tmp_path: Path) -> None:
    assert said(tmp_path, "raise OSError")[1] == b""


def test_a_daemon_does_not_run_if_start_is_killed_before_it_is_recorded(tmp_path: Path) -> None:
    assert said(tmp_path, "os.kill(os.getpid(), 9)")[1] == b""
