"""A failed start of a virtual machine is explained in one line, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor import Channel, VmStartError

from .conftest import START_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from tests.integration.hypervisor.conftest import Machines


async def failure_of(vm: Any) -> str:
    with pytest.raises(VmStartError) as caught:
        await vm.start(timeout_s=START_S)
    assert vm.processes() == []
    message = str(caught.value)
    assert message.startswith("start vm: ")
    assert "not running within" not in message, "it was noticed only at the deadline"
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        pytest.param({"machine_options": "nonsense=on"}, "nonsense", id="machine option"),
        pytest.param({"kernel": Path("/nonexistent/vmlinux")}, "/nonexistent/vmlinux", id="no kernel"),
        pytest.param({"initrd": Path("/nonexistent/initrd")}, "/nonexistent/initrd", id="no initrd"),
        pytest.param({"kernel": Path("/etc/passwd")}, "kernel", id="not a kernel"),
        pytest.param({"qemu": Path("/nonexistent/qemu")}, "/nonexistent/qemu", id="no QEMU"),
        pytest.param({"qemu": Path("/bin/true")}, "QEMU exited with status 0", id="not QEMU"),
        pytest.param(
            {"virtiofsd": Path("/nonexistent/virtiofsd")}, "/nonexistent/virtiofsd", id="no virtiofsd"
        ),
        pytest.param({"virtiofsd": Path("/bin/true")}, "not a virtio-fs daemon", id="not virtiofsd"),
        pytest.param({"share_source": Path("/nonexistent/share")}, "/nonexistent/share", id="no directory"),
        pytest.param({"directory": Path("/nonexistent/dir")}, "/nonexistent/dir", id="no private directory"),
        pytest.param({"memory_bytes": 1 << 50, "max_memory_bytes": 1 << 50}, "memory", id="too much memory"),
        pytest.param(
            {"channel": Channel.VHOST_USER_VSOCK, "vsock_daemon": Path("/bin/false")},
            "vhost-device-vsock exited with status 1",
            id="vsock daemon fails",
        ),
    ],
)
async def test_the_cause_is_named(machines: Machines, changes: dict[str, Any], cause: str) -> None:
    assert cause in await failure_of(machines(**changes))


async def test_a_directory_whose_later_mounts_would_stay_unseen_is_refused(
    machines: Machines, tmp_path: Path, unshared: Any
) -> None:
    assert "not on a shared mount" in await failure_of(machines(share_source=unshared))


@pytest.fixture
def unshared(tmp_path: Path) -> Iterator[Any]:
    target = tmp_path / "unshared"
    target.mkdir()
    subprocess.run(["/bin/mount", "--bind", target, target], check=True)
    try:
        subprocess.run(["/bin/mount", "--make-private", target], check=True)
        yield target
    finally:
        subprocess.run(["/bin/umount", target], check=True)


async def test_a_ledger_that_cannot_be_written_stops_the_start(machines: Machines) -> None:
    vm = machines()

    def refuse(name: Any, pid: Any) -> None:
        machines.note(name, pid)
        raise OSError(28, os.strerror(28), "/ledger")

    vm._host._on_process = refuse
    assert "/ledger: No space left on device" in await failure_of(vm)


async def test_a_machine_that_does_not_answer_is_given_up_in_time(machines: Machines, tmp_path: Path) -> None:
    silent = tmp_path / "qemu"
    silent.write_text("#!/bin/sh\nexec sleep 100000\n")
    silent.chmod(0o755)
    vm = machines(qemu=silent)
    async with asyncio.timeout(START_S):
        with pytest.raises(VmStartError, match=r"not running within 0\.5 s"):
            await vm.start(timeout_s=0.5)
