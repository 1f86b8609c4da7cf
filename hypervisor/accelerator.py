"""Which accelerator really runs guest code on this host: found by running some, remembered until reboot.

That ``/dev/kvm`` opens proves little: a nested host may offer KVM whose guests crash or crawl.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from hypervisor import machine
from hypervisor.argv import probe_argv
from hypervisor.interface import Accelerator
from hypervisor.process import Process

KVM_DEVICE = Path("/dev/kvm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_TCG_DEADLINE_S = 20.0
_KVM_DEADLINE_S = 5.0
"""Used only if there is no TCG to compare with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The accelerator to use.

    :param accelerator: the one.
    :param reason: one line, for the operator.
    """

    accelerator: Accelerator
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One run of the probe kernel; ``failure`` is ``None`` if it ran to its end."""

    elapsed_s: float
    failure: str | None


async def choose_accelerator(qemu: Path, *, cache: Path) -> Verdict:
    """Find the accelerator that runs guest code fastest.

    Takes about a second the first time after a boot; then the verdict is read from the cache. Callers in
    other processes wait for each other, so that one measurement does not slow another.

    :param qemu: the QEMU system emulator.
    :param cache: the file that keeps the verdict; its directory must exist.
    :raises UnsupportedHostError: if this machine's architecture is not supported.
    :raises OSError: if the cache cannot be written, or no process can be made.
    """
    this_machine = machine.for_host()
    try:
        os.close(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        # Not remembered: loading the module or a new permission should count at once, and asking is cheap.
        return Verdict(accelerator=Accelerator.TCG, reason=f"{KVM_DEVICE}: {error.strerror}")
    key = _key(qemu)
    with cache.with_suffix(".lock").open("w") as lock:
        await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
        verdict = _load(cache, key)
        if verdict is None:
            verdict = await _measure(qemu, this_machine)
            _store(cache, key, verdict)
        return verdict


def judge(*, kvm: _Run, tcg: _Run) -> Verdict:
    """Decide between two runs of the same payload.

    :param kvm: the run under KVM.
    :param tcg: the run under TCG.
    """
    if kvm.failure is not None:
        return Verdict(accelerator=Accelerator.TCG, reason=f"KVM does not run guest code: {kvm.failure}")
    if tcg.failure is None and kvm.elapsed_s >= tcg.elapsed_s:
        reason = f"KVM is slower than TCG: {kvm.elapsed_s:.2f} s against {tcg.elapsed_s:.2f} s"
        return Verdict(accelerator=Accelerator.TCG, reason=reason)
    return Verdict(accelerator=Accelerator.KVM, reason=f"KVM ran the probe in {kvm.elapsed_s:.2f} s")


async def _measure(qemu: Path, this_machine: machine.Machine) -> Verdict:
    with tempfile.NamedTemporaryFile(prefix="hako-probe-") as kernel:
        kernel.write(this_machine.probe_kernel)
        kernel.flush()

        async def run(accelerator: Accelerator, deadline_s: float) -> _Run:
            argv = probe_argv(qemu, accelerator, Path(kernel.name), machine=this_machine)
            return await _run(argv, expected=this_machine.probe_status, deadline_s=deadline_s)

        tcg = await run(Accelerator.TCG, _TCG_DEADLINE_S)
        # A KVM that needs longer than TCG is of no use, so nobody waits longer for it.
        kvm = await run(Accelerator.KVM, _KVM_DEADLINE_S if tcg.failure else tcg.elapsed_s)
    return judge(kvm=kvm, tcg=tcg)


async def _run(argv: list[str], *, expected: int, deadline_s: float) -> _Run:
    begin = time.monotonic()
    process = Process.spawn("QEMU", argv)
    try:
        async with asyncio.timeout(deadline_s):
            status = await asyncio.shield(process.exited)
    except TimeoutError:
        return _Run(elapsed_s=deadline_s, failure=f"the probe did not end within {deadline_s:.2f} s")
    finally:
        process.kill()
        await process.exited
    failure = None if status.code == expected else process.obituary()
    return _Run(elapsed_s=time.monotonic() - begin, failure=failure)


def _key(qemu: Path) -> list[str | int]:
    """Tell what a verdict is good for: this boot of the host, and this build of QEMU."""
    modified = 0
    with contextlib.suppress(FileNotFoundError):
        modified = qemu.stat().st_mtime_ns
    return [_BOOT_ID.read_text().strip(), str(qemu), modified]


def _load(cache: Path, key: list[str | int]) -> Verdict | None:
    try:
        kept = json.loads(cache.read_bytes())
        if kept["key"] == key:
            return Verdict(accelerator=Accelerator(kept["accelerator"]), reason=str(kept["reason"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # absent or not ours: measured anew and overwritten
    return None


def _store(cache: Path, key: list[str | int], verdict: Verdict) -> None:
    new = cache.with_suffix(".new")
    new.write_text(
        json.dumps({"key": key, "accelerator": verdict.accelerator.value, "reason": verdict.reason})
    )
    new.rename(cache)
