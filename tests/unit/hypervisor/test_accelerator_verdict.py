"""KVM is used only if it ran guest code before TCG did."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor import Accelerator, Verdict, accelerator
from hypervisor.accelerator import _Run, race
from tests.waiting import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hypervisor import interface
    from hypervisor.architecture import Architecture


QEMU = Path("/usr/bin/qemu")


KVM, TCG = Accelerator.KVM, Accelerator.TCG
HEAD_START_S = 0.02
NEVER_S = 10 * WITHIN_S
FAILED = "QEMU killed by signal 6"


def names_in(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


@pytest.fixture
def let_deadline_pass(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The race's deadline passes when this is called, which a run of TCG does, and not before."""
    deadline = asyncio.Timeout(None)
    monkeypatch.setattr(accelerator, "_HEAD_START_S", HEAD_START_S)
    monkeypatch.setattr(accelerator.asyncio, "timeout", lambda _seconds: deadline)

    def pass_by() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(deadline.reschedule, loop.time())

    return pass_by


@pytest.mark.parametrize(
    ("kvm", "tcg", "chosen", "reason"),
    [
        ((0.0, None), (NEVER_S, None), KVM, "KVM ran the probe"),
        ((0.06, None), (NEVER_S, None), KVM, "KVM ran the probe"),
        ((0.06, None), (0.0, "no TCG in this QEMU"), KVM, "KVM ran the probe"),
        ((NEVER_S, None), (0.0, None), TCG, "KVM is slower than TCG"),
        ((0.0, FAILED), (NEVER_S, None), TCG, f"KVM does not run guest code: {FAILED}"),
        ((0.06, FAILED), (NEVER_S, None), TCG, f"KVM does not run guest code: {FAILED}"),
        ((NEVER_S, None), (0.0, "no TCG in this QEMU"), TCG, "KVM did not run the probe"),
    ],
    ids=["at once", "faster", "no TCG", "slower", "crashes", "crashes later", "hangs, and no TCG"],
)
async def test_the_first_to_run_the_payload_wins(
    let_deadline_pass: Callable[[], None],
    kvm: tuple[float, str | None],
    tcg: tuple[float, str | None],
    chosen: interface.Accelerator,
    reason: str,
) -> None:
    async def run(which: interface.Accelerator) -> _Run:
        elapsed_s, failure = kvm if which is KVM else tcg
        over = asyncio.Event()
        asyncio.get_running_loop().call_later(elapsed_s, over.set)
        await over.wait()
        if which is TCG and failure is not None and kvm[0] == NEVER_S:
            let_deadline_pass()
        return _Run(elapsed_s=elapsed_s, failure=failure)

    verdict = await race(run)
    assert (verdict.accelerator, verdict.proven) == (chosen, True)
    assert reason in verdict.reason


async def test_tcg_is_not_run_if_kvm_is_good() -> None:
    asked = []

    async def run(which: interface.Accelerator) -> _Run:
        asked.append(which)
        return _Run(elapsed_s=0.1, failure=None)

    await race(run)
    assert asked == [KVM]


async def test_a_race_without_a_winner_is_not_remembered(let_deadline_pass: Callable[[], None]) -> None:
    over = []

    async def run(which: interface.Accelerator) -> _Run:
        if which is TCG:
            let_deadline_pass()
        try:
            never: asyncio.Future[_Run] = asyncio.get_running_loop().create_future()
            return await never
        finally:
            over.append(which)

    verdict = await race(run)
    assert (verdict.accelerator, verdict.proven) == (TCG, False)
    assert "neither KVM nor TCG" in verdict.reason
    assert sorted(over, key=str) == [KVM, TCG]


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """A host whose KVM opens; counts how often it is measured."""
    count = []

    async def measure(qemu: Path, architecture: Architecture) -> accelerator.Verdict:
        count.append(qemu)
        return Verdict(accelerator=Accelerator.KVM, reason=f"measurement {len(count)}")

    monkeypatch.setattr(accelerator, "_measure", measure)
    monkeypatch.setattr(accelerator, "KVM_DEVICE", Path("/dev/null"))
    return count


async def test_a_verdict_is_cached(measurements: list[Any], tmp_path: Path) -> None:
    first = await accelerator.choose_accelerator(QEMU, cache=tmp_path / "verdict.json")
    second = await accelerator.choose_accelerator(QEMU, cache=tmp_path / "verdict.json")
    assert first == second
    assert len(measurements) == 1


@pytest.mark.parametrize(
    ("verdict", "age_s", "measured_anew"),
    [
        (Verdict(accelerator=KVM, reason="won"), 1e6, False),
        (Verdict(accelerator=TCG, reason="lost"), 10, False),
        (Verdict(accelerator=TCG, reason="lost"), 301, True),
        (Verdict(accelerator=TCG, reason="from the future"), -60, True),
        (Verdict(accelerator=TCG, reason="nobody won", proven=False), 0, True),
    ],
    ids=["KVM won", "KVM lost lately", "KVM lost a while ago", "the clock was set back", "nobody won"],
)
async def test_a_failed_kvm_is_measured_again(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    verdict: accelerator.Verdict,
    age_s: float,
    measured_anew: bool,
) -> None:
    asked = []

    async def measure(*_: Architecture | Path) -> accelerator.Verdict:
        asked.append(verdict)
        return verdict

    monkeypatch.setattr(accelerator, "_measure", measure)
    monkeypatch.setattr(accelerator, "KVM_DEVICE", Path("/dev/null"))
    cache = tmp_path / "verdict.json"
    await accelerator.choose_accelerator(QEMU, cache=cache)
    if cache.exists():
        os.utime(cache, times=(time.time() - age_s,) * 2)
    await accelerator.choose_accelerator(QEMU, cache=cache)
    assert len(asked) == (2 if measured_anew else 1)


async def test_another_qemu_or_another_boot_is_measured_again(
    measurements: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "verdict.json"
    await accelerator.choose_accelerator(QEMU, cache=cache)
    await accelerator.choose_accelerator(Path("/opt/qemu"), cache=cache)
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another\n")
    monkeypatch.setattr(accelerator, "_BOOT_ID", boot_id)
    await accelerator.choose_accelerator(Path("/opt/qemu"), cache=cache)
    assert len(measurements) == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", json.dumps({"key": 1}).encode()])
async def test_a_damaged_cache_is_ignored(measurements: list[Any], tmp_path: Path, content: bytes) -> None:
    cache = tmp_path / "verdict.json"
    cache.write_bytes(content)
    verdict = await accelerator.choose_accelerator(QEMU, cache=cache)
    assert verdict.reason == "measurement 1"
    assert json.loads(cache.read_text())["accelerator"] == "kvm"


async def test_without_the_device_the_reason_names_it_and_nothing_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "KVM_DEVICE", tmp_path / "kvm")
    verdict = await accelerator.choose_accelerator(QEMU, cache=tmp_path / "verdict.json")
    assert verdict.accelerator is Accelerator.TCG
    assert str(tmp_path / "kvm") in verdict.reason
    assert names_in(tmp_path) == []


async def test_another_user_cannot_delay_a_start_with_a_lock(tmp_path: Path) -> None:
    lock = tmp_path / "verdict.lock"
    lock.touch(mode=0o644)

    async with accelerator._locked(lock):
        assert lock.stat().st_mode & 0o777 == 0o600


async def test_the_wait_for_a_lock_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "_LOCK_S", 0.01)
    entered = False
    async with accelerator._locked(tmp_path / "lock"), accelerator._locked(tmp_path / "lock"):
        entered = True

    assert entered
