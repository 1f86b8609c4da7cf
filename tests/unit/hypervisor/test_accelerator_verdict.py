"""KVM is used if it ran guest code faster than TCG did, and for no other reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hypervisor import Accelerator, Verdict, accelerator
from hypervisor.accelerator import _Run, judge

QEMU = Path("/usr/bin/qemu")


def ran(elapsed_s):
    return _Run(elapsed_s=elapsed_s, failure=None)


def failed(cause):
    return _Run(elapsed_s=1.0, failure=cause)


@pytest.mark.parametrize(
    ("kvm", "tcg", "chosen", "reason"),
    [
        (ran(0.2), ran(0.8), Accelerator.KVM, "ran the probe in 0.20 s"),
        (ran(0.2), failed("not built in"), Accelerator.KVM, "ran the probe"),
        (ran(0.9), ran(0.8), Accelerator.TCG, "slower than TCG: 0.90 s against 0.80 s"),
        (failed("QEMU killed by signal 6"), ran(0.8), Accelerator.TCG, "QEMU killed by signal 6"),
    ],
    ids=["faster", "no TCG to compare", "slower", "crashes"],
)
def test_the_verdict(kvm, tcg, chosen, reason):
    verdict = judge(kvm=kvm, tcg=tcg)
    assert verdict.accelerator is chosen
    assert reason in verdict.reason


@pytest.fixture
def measurements(monkeypatch, tmp_path):
    """A host whose KVM opens; counts how often it is measured."""
    count = []

    async def measure(qemu, machine):
        count.append(qemu)
        return Verdict(accelerator=Accelerator.KVM, reason=f"measurement {len(count)}")

    monkeypatch.setattr(accelerator, "_measure", measure)
    monkeypatch.setattr(accelerator, "KVM_DEVICE", Path("/dev/null"))
    return count


async def test_a_verdict_is_kept(measurements, tmp_path):
    first = await accelerator.choose_accelerator(QEMU, cache=tmp_path / "verdict.json")
    second = await accelerator.choose_accelerator(QEMU, cache=tmp_path / "verdict.json")
    assert first == second
    assert len(measurements) == 1


async def test_another_qemu_or_another_boot_is_measured_anew(measurements, tmp_path, monkeypatch):
    cache = tmp_path / "verdict.json"
    await accelerator.choose_accelerator(QEMU, cache=cache)
    await accelerator.choose_accelerator(Path("/opt/qemu"), cache=cache)
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another\n")
    monkeypatch.setattr(accelerator, "_BOOT_ID", boot_id)
    await accelerator.choose_accelerator(Path("/opt/qemu"), cache=cache)
    assert len(measurements) == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", json.dumps({"key": 1}).encode()])
async def test_a_damaged_cache_is_measured_anew(measurements, tmp_path, content):
    cache = tmp_path / "verdict.json"
    cache.write_bytes(content)
    verdict = await accelerator.choose_accelerator(QEMU, cache=cache)
    assert verdict.reason == "measurement 1"
    assert json.loads(cache.read_text())["accelerator"] == "kvm"


async def test_without_the_device_the_reason_names_it_and_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "KVM_DEVICE", tmp_path / "kvm")
    verdict = await accelerator.choose_accelerator(QEMU, cache=tmp_path / "verdict.json")
    assert verdict.accelerator is Accelerator.TCG
    assert str(tmp_path / "kvm") in verdict.reason
    assert list(tmp_path.iterdir()) == []
