"""The probe against the real QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

from hypervisor import Accelerator, architecture, choose_accelerator
from hypervisor.accelerator import _run
from hypervisor.argv import probe_argv

QEMU = Path("/usr/bin/qemu-system-x86_64")


def commands() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # another's, which has ended
            found.append(path.read_bytes().decode(errors="replace"))
    return found


async def test_the_payload_runs_under_tcg_and_reports_through_the_exit_status(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(architecture.X86_64.probe_kernel)
    argv = probe_argv(QEMU, Accelerator.TCG, kernel, architecture=architecture.X86_64)
    run = await _run(argv, expected=architecture.X86_64.probe_status)
    assert run.failure is None
    assert run.elapsed_s > 0


async def test_a_payload_that_does_not_end_is_cut_off(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    endless = architecture.X86_64.probe_kernel[: -len(b"\xe6\xf4\xf4")] + b"\xeb\xfe"
    kernel.write_bytes(endless.ljust(len(architecture.X86_64.probe_kernel), b"\x90"))
    argv = probe_argv(QEMU, Accelerator.TCG, kernel, architecture=architecture.X86_64)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.5):
            await _run(argv, expected=architecture.X86_64.probe_status)
    assert not any(str(kernel) in command for command in commands())


async def test_an_accelerator_that_cannot_start_fails_with_qemus_words(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(architecture.X86_64.probe_kernel)
    broken = dataclasses.replace(
        architecture.X86_64, cpu_models={**architecture.X86_64.cpu_models, Accelerator.TCG: "abacus"}
    )
    argv = probe_argv(QEMU, Accelerator.TCG, kernel, architecture=broken)
    run = await _run(argv, expected=broken.probe_status)
    assert "abacus" in str(run.failure)


async def test_this_host_gets_a_verdict_with_a_reason_and_keeps_it(tmp_path: Path) -> None:
    cache = tmp_path / "accelerator.json"
    verdict = await choose_accelerator(QEMU, cache=cache)
    assert verdict.reason
    if cache.exists():  # the device opens, so code was run
        assert json.loads(cache.read_text())["accelerator"] == verdict.accelerator.value
    assert await choose_accelerator(QEMU, cache=cache) == verdict
