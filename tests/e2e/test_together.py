"""Many containers at the same time."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id

if TYPE_CHECKING:
    from tests.e2e.conftest import Stack

COUNT = 10


@pytest.mark.alone
@pytest.mark.timeout(240)
def test_ten_containers_started_at_once_all_run_and_end_cleanly(one_stack: Stack) -> None:
    started = [
        subprocess.Popen(
            one_stack.containerd.run_argv(
                IMAGE, new_id(), "sh", "-c", f"echo {number}; exit {number}", options=["--rm"]
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(COUNT)
    ]
    outcomes = [(*process.communicate(timeout=200), process.returncode) for process in started]

    assert outcomes == [(f"{number}\n", "", number) for number in range(COUNT)]
