"""Finds out which accelerator really runs guest code on this host, by running some, and caches the result.

An open ``/dev/kvm`` proves little: guests may crash or crawl under the KVM of a nested host. So KVM and
TCG run a race, and KVM gets a head start. A victory of KVM is remembered until the next boot. A defeat is
remembered only for a while, because a busy host may be to blame. A race without a winner is not remembered.
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
from typing import TYPE_CHECKING

from hypervisor import architecture
from hypervisor.argv import probe_argv
from hypervisor.interface import Accelerator
from hypervisor.process import ChildProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

KVM_DEVICE = Path("/dev/kvm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_HEAD_START_S = 0.5
"""Twice what KVM needs on an ordinary host. Such a host does not need to run TCG at all."""

_SLOW_S = 1.0
_DEADLINE_S = 20.0
_LOCK_S, _LOCK_INTERVAL_S = 2 * _DEADLINE_S, 0.05
_DEFEAT_KEPT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The accelerator to use.

    :param accelerator: the accelerator.
    :param reason: one line, for the operator.
    :param proven: whether guest code was run, and its outcome decided.
    """

    accelerator: Accelerator
    reason: str
    proven: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One run of the probe kernel; ``failure`` is ``None`` if it ran to its end."""

    elapsed_s: float
    failure: str | None


async def choose_accelerator(qemu: Path, *, cache: Path) -> Verdict:
    """Find the accelerator that runs guest code fastest.

    Takes less than a second if KVM is good, and otherwise as long as the faster of the two; later calls read
    the verdict from the cache. Callers in other processes wait for each other, so that one measurement
    does not slow another.

    :param qemu: the QEMU system emulator.
    :param cache: the file that keeps the verdict; its directory must exist.
    :raises UnsupportedHostError: if this machine's architecture is not supported.
    :raises OSError: if the cache cannot be written, or no process can be made.
    """
    host_architecture = architecture.for_host()
    try:
        os.close(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        # Not remembered: a loaded module or a new permission should count at once, and asking is cheap.
        reason = f"{KVM_DEVICE}: {error.strerror}"
        return Verdict(accelerator=Accelerator.TCG, reason=reason, proven=False)
    key = _key(qemu)
    async with _locked(cache.with_suffix(".lock")):
        verdict = _load(cache, key)
        if verdict is None:
            verdict = await _measure(qemu, host_architecture)
            if verdict.proven:
                _store(cache, key, verdict)
        return verdict


@contextlib.asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """Hold a lock during a block; after the longest time of a measurement, continue without the lock."""
    # No other user may open it: a lock on it would stop every start.
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(lock, 0o600)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOCK_S):
                while not _try_lock(lock):  # noqa: ASYNC110 - flock(2) has neither an event nor a deadline
                    await asyncio.sleep(_LOCK_INTERVAL_S)
        yield
    finally:
        os.close(lock)


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def judge(*, kvm: _Run | None, tcg: _Run | None) -> Verdict:
    """Decide between two runs of the same payload.

    :param kvm: the run under KVM, or ``None`` if it had not ended when TCG's had, or in time.
    :param tcg: the run under TCG, or ``None`` if there was none, or it had not ended.
    """
    if kvm is not None and kvm.failure is None:
        slow = ", which is slow" if kvm.elapsed_s > _SLOW_S else ""
        reason = f"KVM ran the probe in {kvm.elapsed_s:.2f} s{slow}"
        return Verdict(accelerator=Accelerator.KVM, reason=reason)
    if kvm is not None:
        return Verdict(accelerator=Accelerator.TCG, reason=f"KVM does not run guest code: {kvm.failure}")
    if tcg is not None and tcg.failure is None:
        reason = f"KVM is slower than TCG, which ran the probe in {tcg.elapsed_s:.2f} s"
        return Verdict(accelerator=Accelerator.TCG, reason=reason)
    if tcg is not None:
        reason = f"KVM did not run the probe within {_DEADLINE_S:g} s"
        return Verdict(accelerator=Accelerator.TCG, reason=reason)
    reason = f"neither KVM nor TCG ran the probe within {_DEADLINE_S:g} s; the next start tries again"
    return Verdict(accelerator=Accelerator.TCG, reason=reason, proven=False)


async def _measure(qemu: Path, host_architecture: architecture.Architecture) -> Verdict:
    with tempfile.NamedTemporaryFile(prefix="hako-probe-") as kernel:
        kernel.write(host_architecture.probe_kernel)
        kernel.flush()

        async def run(accelerator: Accelerator) -> _Run:
            argv = probe_argv(qemu, accelerator, Path(kernel.name), architecture=host_architecture)
            return await _run(argv, expected=host_architecture.probe_status)

        return await race(run)


async def race(run: Callable[[Accelerator], Awaitable[_Run]]) -> Verdict:
    """Have both accelerators run the payload until one has.

    :param run: runs it under one of them.
    :returns: the verdict. If KVM fails, it loses at once; if TCG fails, that proves nothing about KVM.
    """
    runs = [asyncio.ensure_future(run(Accelerator.KVM))]
    kvm, tcg = runs[0], None
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DEADLINE_S):
                await asyncio.wait([kvm], timeout=_HEAD_START_S)
                if not kvm.done():
                    tcg = asyncio.ensure_future(run(Accelerator.TCG))
                    runs.append(tcg)
                    await asyncio.wait(runs, return_when=asyncio.FIRST_COMPLETED)
                    if not kvm.done() and tcg.result().failure is not None:
                        await asyncio.wait([kvm])
        return judge(
            kvm=kvm.result() if kvm.done() else None, tcg=tcg.result() if tcg and tcg.done() else None
        )
    finally:
        for each in runs:
            each.cancel()
        await asyncio.wait(runs)


async def _run(argv: list[str], *, expected: int) -> _Run:
    begin = time.monotonic()
    process = ChildProcess.spawn("QEMU", argv)
    try:
        status = await asyncio.shield(process.exited)
    finally:
        process.kill()
        await process.exited
    failure = None if status.code == expected else process.obituary()
    return _Run(elapsed_s=time.monotonic() - begin, failure=failure)


def _key(qemu: Path) -> list[str | int]:
    """Name the scope of a verdict: this boot of the host and this build of QEMU."""
    modified = 0
    with contextlib.suppress(FileNotFoundError):
        modified = qemu.stat().st_mtime_ns
    return [_BOOT_ID.read_text().strip(), str(qemu), modified]


def _load(cache: Path, key: list[str | int]) -> Verdict | None:
    try:
        kept = json.loads(cache.read_bytes())
        accelerator = Accelerator(kept["accelerator"])
        is_fresh = 0 <= time.time() - cache.stat().st_mtime < _DEFEAT_KEPT_S
        if kept["key"] == key and (accelerator is Accelerator.KVM or is_fresh):
            return Verdict(accelerator=accelerator, reason=str(kept["reason"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # absent or not ours: measured again and overwritten
    return None


def _store(cache: Path, key: list[str | int], verdict: Verdict) -> None:
    new = cache.with_suffix(".new")
    new.write_text(
        json.dumps({"key": key, "accelerator": verdict.accelerator.value, "reason": verdict.reason})
    )
    new.rename(cache)
