"""Why QEMU did not start is learnt from its last words, as long as it may take to end."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from hypervisor import host_side
from hypervisor.errors import QmpError
from hypervisor.host_side import HostSide
from tests.waiting import WITHIN_S

ENDS_AFTER_S = 0.2


@pytest.fixture
async def host(monkeypatch: pytest.MonkeyPatch) -> HostSide:
    """A machine whose QEMU ends some time after a moment."""
    monkeypatch.setattr(host_side, "LAST_WORDS_S", WITHIN_S)
    monkeypatch.setattr(host_side, "A_MOMENT_S", ENDS_AFTER_S / 20)
    loop = asyncio.get_running_loop()
    qemu: Any = SimpleNamespace(exited=loop.create_future(), obituary=lambda: "QEMU exited: no such machine")
    loop.call_later(ENDS_AFTER_S, qemu.exited.set_result, None)
    host = HostSide(lambda *_: None)
    host.qemu = qemu
    return host


@pytest.mark.parametrize(
    ("is_open", "cause"),
    [(False, "QEMU exited: no such machine"), (True, "QEMU: qmp: device_add: bad")],
    ids=["hangs up", "refuses"],
)
async def test_the_end_of_a_qemu_that_has_hung_up_is_awaited(
    host: HostSide, *, is_open: bool, cause: str
) -> None:
    qmp: Any = SimpleNamespace(is_open=is_open)
    host.qmp = qmp
    assert await host.early_cause(QmpError("qmp: device_add: bad")) == cause
