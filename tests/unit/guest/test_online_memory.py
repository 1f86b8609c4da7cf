"""A memory block that the kernel's driver is busy with is left to it; other failures are reported."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guest.agent import sizing

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Let the kernel refuse two memory blocks; return the blocks that were tried."""
    tried = []

    def make(number: int) -> list[str]:
        def write(path: str, _text: str) -> None:
            tried.append(Path(path).parent.name)
            raise OSError(number, os.strerror(number), path)

        monkeypatch.setattr(sizing.files, "write", write)
        return tried

    for name in ("memory32", "memory33"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state").write_text("offline\n")
    monkeypatch.setattr(sizing, "_MEMORY", str(tmp_path))
    monkeypatch.setattr(sizing.modules, "load", lambda _name: True)
    monkeypatch.setattr(sizing.limits, "follow", lambda: None)
    return make


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBUSY, errno.ENODEV, errno.ENOENT])
def test_a_busy_memory_block_does_not_hold_up_others(refuse: Callable[[int], list[str]], number: int) -> None:
    tried = refuse(number)

    sizing.online_memory()

    assert tried == ["memory32", "memory33"]


def test_a_failure_of_the_kernel_is_reported(refuse: Callable[[int], list[str]]) -> None:
    refuse(errno.EIO)

    with pytest.raises(OSError, match="Input/output error"):
        sizing.online_memory()
