"""How long a machine takes to boot."""

from __future__ import annotations

import dataclasses
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from guest.image import cpio
from hypervisor import AGENT_PORT, QemuHypervisor, VmSpec
from hypervisor.argv import kernel_command_line
from hypervisor.machine import for_host
from scripts.benchmarks.harness import Samples, alternate
from scripts.benchmarks.stage import MeasurementError
from shim import config, mounts
from shim.agent import Agent
from shim.host import resolve
from shim.sizing import plan
from tests.e2e.busybox import BUSYBOX

if TYPE_CHECKING:
    from scripts.benchmarks.stage import Stage

BOOT_TIMEOUT_S = 120.0
MARK = b"bench: a shell"
SHELL = f"#!/bin/busybox sh\necho '{MARK.decode()}'\nexec /bin/busybox sh\n"
MIB = 1 << 20


def cold_over_bare(stage: Stage) -> Samples:
    """Boot a machine as the default configuration makes it: from its spawn to the agent's first answer.

    Daemons, devices and the control connection are part of it; the shim and containerd are not.
    Baseline: the same QEMU, accelerator, processor, memory, kernel and kernel parameters, with a serial port
    as the only device and an initramfs that is but busybox, from the spawn to the first line of its shell.
    """
    stage.configure()
    settings = config.parse(config.locate({"HAKO_CONFIG": str(stage.config)}))
    spec = stage.runner.run(_spec(settings))
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

    def cold() -> float:
        with tempfile.TemporaryDirectory(dir=stage.home) as directory:
            return stage.runner.run(_boot(spec, Path(directory)))

    return alternate(stage.rounds, value=cold, baseline=lambda: _boot_bare(spec, initrd))


async def _spec(settings: config.Config) -> VmSpec:
    choice, sizes = await resolve(settings), plan(settings.hypervisor, {})
    return VmSpec(
        name="bench",
        directory=Path(),
        qemu=Path(settings.hypervisor.qemu),
        machine_options="",
        kernel=Path(settings.guest.kernel),
        initrd=Path(settings.guest.initrd),
        kernel_parameters=(),
        accelerator=choice.accelerator,
        vcpus=sizes.boot.vcpus,
        max_vcpus=sizes.most.vcpus,
        memory_bytes=sizes.boot.memory_bytes,
        max_memory_bytes=sizes.most.memory_bytes,
        share_source=Path(),
        virtiofsd=choice.virtiofsd,
        channel=choice.channel,
        vsock_daemon=choice.vsock_daemon,
        network_namespace=None,
        root_ports=0,
    )


async def _boot(spec: VmSpec, directory: Path) -> float:
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
            agent = await Agent.over(connection, timeout_s=BOOT_TIMEOUT_S)
            took_s = time.perf_counter() - began_s
            await agent.aclose()
        finally:
            await vm.stop()
        return took_s
    finally:
        mounts.unmount(share)


def _boot_bare(spec: VmSpec, initrd: Path) -> float:
    machine = for_host()
    argv = [
        *(str(spec.qemu), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", machine.type, "-accel", spec.accelerator.value),
        *("-cpu", machine.cpu_models[spec.accelerator], "-smp", str(spec.vcpus)),
        *("-m", f"{spec.memory_bytes // MIB}M", "-kernel", str(spec.kernel), "-initrd", str(initrd)),
        *("-append", f"{kernel_command_line(spec, machine=machine)} console=ttyS0", "-serial", "stdio"),
    ]
    began_s = time.perf_counter()
    limited = ["/usr/bin/timeout", f"{BOOT_TIMEOUT_S:.0f}", *argv]
    with subprocess.Popen(
        limited, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as vm:
        assert vm.stdout is not None  # noqa: S101 - it was asked for above
        try:
            for line in vm.stdout:
                if MARK in line:
                    return time.perf_counter() - began_s
        finally:
            vm.terminate()
    raise MeasurementError("bare machine: it ended before its shell said a word")
