"""A container's process inherits attributes from the shim, as it would from a runtime like runc."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from shim.sandbox.inheritance import handed_down

if TYPE_CHECKING:
    from shim.agent.client import Agent


HAKO, OTHER = cast("Agent", SimpleNamespace(is_hako=True)), cast("Agent", SimpleNamespace(is_hako=False))
SHOW = (
    "import resource, sys; from types import SimpleNamespace; "
    "from shim.sandbox.inheritance import handed_down; "
    "resource.setrlimit(getattr(resource, sys.argv[1]), (int(sys.argv[2]), int(sys.argv[3]))); "
    "print(handed_down(SimpleNamespace(is_hako=True)).rlimits.get(sys.argv[1]))"
)


def limit_handed_down(kind: str, soft: int, hard: int) -> str:
    argv = [sys.executable, "-c", SHOW, kind, str(soft), str(hard)]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


def test_a_shim_takes_the_priority_of_the_process_that_calls_it() -> None:
    take = "import os, sys; from shim.host import daemonize; daemonize.take_attributes(of=int(sys.argv[1]))"
    with subprocess.Popen(["/usr/bin/sleep", "1000"]) as served:
        os.setpriority(os.PRIO_PROCESS, served.pid, 7)
        argv = [sys.executable, "-c", f"{take}; print(os.nice(0))", str(served.pid)]
        said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        served.kill()
    assert said == "7\n"


def test_limits_are_inherited_from_this_process() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert handed_down(HAKO).rlimits["RLIMIT_NOFILE"] == (soft, hard)


@pytest.mark.parametrize(
    ("kind", "soft", "hard", "expected"),
    [
        ("RLIMIT_CORE", 0, -1, "None"),  # the guest kernel's default
        ("RLIMIT_CORE", 5, 7, "(5, 7)"),
        ("RLIMIT_FSIZE", 1 << 40, -1, f"({1 << 40}, {(1 << 64) - 1})"),
        ("RLIMIT_STACK", -1, -1, f"({(1 << 64) - 1}, {(1 << 64) - 1})"),
    ],
)
def test_a_limit_that_differs_from_the_guests_default_is_sent(
    kind: str, soft: int, hard: int, expected: str
) -> None:
    assert limit_handed_down(kind, soft, hard) == expected


def test_open_files_stay_below_the_default_limit_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 1 << 30))
    assert handed_down(OTHER).rlimits["RLIMIT_NOFILE"] == (100, 1 << 20)
    assert handed_down(HAKO).rlimits["RLIMIT_NOFILE"] == (100, 1 << 30)


def test_the_oom_score_is_inherited_from_this_process() -> None:
    own = Path("/proc/self/oom_score_adj").read_text(encoding="ascii")
    assert handed_down(OTHER).oom_score_adj == int(own)
