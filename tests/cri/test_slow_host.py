"""A host on which unmounting takes longer than containerd waits for it: see containerd's issue 7496."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.cri.conftest import Stack
    from tests.cri.pods import Pod

SLOW_S = 12  # the runtime interface gives up on deleting a task after 10 s
AT_ONCE_S = 5.0


@contextlib.contextmanager
def slow_unmounting(pid: int, trace: Path) -> Iterator[None]:
    """Let the first unmounting of each thread of a process take long.

    :param pid: the process.
    :param trace: a new file, which lists the calls that were slow.
    """
    inject = f"--inject=umount2:delay_enter={SLOW_S}s:when=1"
    argv = ["/usr/bin/strace", "--follow-forks", f"--attach={pid}", f"--output={trace}", inject]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        assert "attached" in strace.stderr.readline()
        try:
            yield
        finally:
            strace.send_signal(signal.SIGINT)


@pytest.mark.mainly
@pytest.mark.timeout(240)
def test_a_slow_unmount_delays_no_other_pod_and_leaves_nothing(
    stack: Stack, new_pod: Callable[..., Pod], tmp_path: Path
) -> None:
    if not stack.is_hako:
        pytest.skip("this traces Hako's shim")
    pod = new_pod("slow")
    gone, other = (pod.run(name, "sleep", "100000") for name in ("gone", "other"))
    words = (f"-id {pod.id}", "-state ")
    [shim] = [
        each for each in stack.containerd.nursery.descendants() if all(word in each.command for word in words)
    ]
    trace = tmp_path / "trace"
    with slow_unmounting(shim.pid, trace):
        start = time.monotonic()
        stopping = stack.cri.begin("StopContainer", container_id=gone.id, timeout=0)
        while not (trace.exists() and "umount2(" in trace.read_text()):
            assert time.monotonic() - start < SLOW_S, "nothing is unmounted"
            time.sleep(0.05)
        asked = time.monotonic()
        assert other.exec("echo", "here").stdout == "here\n"
        assert time.monotonic() - asked < AT_ONCE_S, "another container waits for the unmounting"
        stopping.result()
        assert time.monotonic() - start > SLOW_S, "it is said to be gone although it is still mounted"
        assert (gone.state(), gone.status().exit_code) == ("EXITED", 137)
        gone.remove()
        assert gone.id not in _mounts_of(shim.pid)
        assert other.state() == "RUNNING"
        pod.remove()
    assert "(DELAYED)" in trace.read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(shim.pid, 0)


def _mounts_of(pid: int) -> str:
    return Path(f"/proc/{pid}/mountinfo").read_text(encoding="utf-8")
