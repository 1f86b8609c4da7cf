"""How long a machine takes to boot."""

from __future__ import annotations

import dataclasses
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from guest.image import cpio
from hypervisor import QemuHypervisor, template_key
from proto.extensions import AGENT_PORT
from scripts.benchmarks import bare
from scripts.benchmarks.harness import Samples, alternate
from scripts.benchmarks.stage import MeasurementError
from shim import config
from shim.agent.client import Agent
from shim.host import mounts
from shim.machine.template_store import TemplateStore
from tests.e2e.busybox import BUSYBOX
from tests.patience import patient

if TYPE_CHECKING:
    from hypervisor import VmSpec
    from scripts.benchmarks.stage import Stage

BOOT_TIMEOUT_S = patient(120.0)
MARK = b"bench: a shell"
SHELL = f"#!/bin/busybox sh\necho '{MARK.decode()}'\nexec /bin/busybox sh\n"


def cold_over_bare(stage: Stage) -> Samples:
    """Boot a machine of the default configuration: from QEMU's spawn to the agent's first answer.

    The time includes daemons, devices and the control connection, but not the shim and containerd.
    Baseline: the same QEMU, accelerator, processor, memory, kernel and kernel parameters, with a serial port
    as the only device and only busybox in the initramfs, from the spawn to the first line of its shell.
    """
    spec = bare.spec(stage, template=False)
    initrd = stage.home / "bare-initrd"
    initrd.write_bytes(
        cpio.archive(
            [
                cpio.directory("/dev"),
                cpio.character_device("/dev/console", 5, 1),
                cpio.regular("/bin/busybox", BUSYBOX.read_bytes(), mode=0o755),
                cpio.regular("/init", SHELL.encode(), mode=0o755),
            ]
        )
    )

    return alternate(
        stage.rounds, value=lambda: _time_boot(stage, spec), baseline=lambda: _boot_bare(spec, initrd)
    )


def clone_over_cold(stage: Stage) -> Samples:
    """Clone a machine of the default configuration: from QEMU's spawn to the agent's first answer.

    The time includes copying the template's memory, plugging in the share and the channel, and setting the
    guest's randomness and clock, but not the shim and containerd.
    Baseline: the same machine, booted.
    """
    spec = bare.spec(stage, template=True)
    found = TemplateStore(Path(config.HypervisorConfig().template_dir)).find(template_key(spec))
    if found is None:
        raise MeasurementError("template: it was built for another machine than the one that is booted")
    clone = dataclasses.replace(spec, template=found.path)
    return alternate(
        stage.rounds,
        value=lambda: _time_boot(stage, clone),
        baseline=lambda: _time_boot(stage, spec),
    )


def _time_boot(stage: Stage, spec: VmSpec) -> float:
    with tempfile.TemporaryDirectory(dir=stage.home) as directory:
        return stage.runner.run(_boot(spec, Path(directory)))


async def _boot(spec: VmSpec, directory: Path) -> float:
    """Clone or boot a machine until its agent answers; return how long that took, in seconds."""
    share = directory / "share"
    share.mkdir()
    mounts.share_directory(share)
    try:
        placed = dataclasses.replace(spec, directory=directory, share_source=share)
        began_s = time.perf_counter()
        vm = QemuHypervisor(placed, on_process=lambda _name, _pid: None)
        try:
            await vm.start(timeout_s=BOOT_TIMEOUT_S)
            connection = await vm.connect(AGENT_PORT, timeout_s=BOOT_TIMEOUT_S)
            is_clone = spec.template is not None
            agent = await Agent.over(connection, timeout_s=BOOT_TIMEOUT_S, is_clone=is_clone)
            took_s = time.perf_counter() - began_s
            await agent.aclose()
        finally:
            await vm.stop()
        return took_s
    finally:
        mounts.unmount(share)


def _boot_bare(spec: VmSpec, initrd: Path) -> float:
    began_s = time.perf_counter()
    limited = ["/usr/bin/timeout", f"{BOOT_TIMEOUT_S:.0f}", *bare.argv(spec, initrd)]
    with subprocess.Popen(
        limited, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as vm:
        assert vm.stdout is not None  # noqa: S101 - requested above
        try:
            for line in vm.stdout:
                if MARK in line:
                    return time.perf_counter() - began_s
        finally:
            vm.terminate()
    raise MeasurementError("bare machine: it ended before its shell wrote anything")
