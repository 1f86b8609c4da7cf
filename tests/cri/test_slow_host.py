"""A host on which unmounting takes longer than containerd waits for it: see containerd's issue 7496."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from tests.waiting import ends, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.cri.conftest import Stack
    from tests.cri.pods import Pod

SLOW_S = 12  # the runtime interface gives up on deleting a task after 10 s
FOREVER_S = 10_000


@contextlib.contextmanager
def slow_unmounting(pid: int, trace: Path, *, takes_s: int) -> Iterator[None]:
    """Let the first unmounting of each thread of a process take long, at most until the block is over.

    :param pid: the process.
    :param trace: a new file, which lists the calls that are slow.
    :param takes_s: how long one takes, in seconds.
    """
    inject = f"--inject=umount2:delay_enter={takes_s}s:when=1"
    argv = ["/usr/bin/strace", "--follow-forks", f"--attach={pid}", f"--output={trace}", inject]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        assert "attached" in strace.stderr.readline()
        try:
            yield
        finally:
            strace.send_signal(signal.SIGINT)


@pytest.mark.mainly
def test_a_slow_unmount_delays_no_other_pod_and_leaves_nothing(
    stack: Stack, new_pod: Callable[..., Pod], tmp_path: Path
) -> None:
    if not stack.is_hako:
        pytest.skip("this traces Hako's shim")
    pod = new_pod("slow")
    gone, other = (pod.run(name, "sleep", "100000") for name in ("gone", "other"))
    shim, trace = pod.shim(), tmp_path / "trace"
    with slow_unmounting(shim, trace, takes_s=FOREVER_S):
        stopping = stack.cri.begin("StopContainer", container_id=gone.id, timeout=0)
        until(lambda: trace.exists() and "umount2(" in trace.read_text())
        # Another container does not wait for the unmounting.
        assert other.exec("echo", "here").stdout == "here\n"
        # It is not said to be gone while it is still mounted.
        with pytest.raises(grpc.FutureTimeoutError):
            stopping.result(SLOW_S)
    stopping.result()
    with slow_unmounting(shim, tmp_path / "later", takes_s=SLOW_S):
        assert (gone.state(), gone.status().exit_code) == ("EXITED", 137)
        gone.remove()
        assert gone.id not in _mounts_of(shim)
        assert other.state() == "RUNNING"
        pod.remove()
    assert ends(shim)


def _mounts_of(pid: int) -> str:
    return Path(f"/proc/{pid}/mountinfo").read_text(encoding="utf-8")
