"""A host of an unknown architecture is refused in one line."""

from __future__ import annotations

import platform

import pytest

from hypervisor.architecture import X86_64, for_host
from hypervisor.errors import UnsupportedHostError


def test_an_x86_64_host_gets_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert for_host() is X86_64


def test_another_architecture_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(UnsupportedHostError, match=r"riscv64 is not supported; use x86_64$"):
        for_host()
