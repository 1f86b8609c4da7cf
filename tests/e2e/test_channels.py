"""A container's life over each way between host and guest that this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.busybox import IMAGE
from tests.e2e.conftest import new_id
from tests.e2e.containerd import converse
from tests.e2e.test_refusals import configured

if TYPE_CHECKING:
    from tests.e2e.conftest import Stack

pytestmark = pytest.mark.hako


@pytest.mark.parametrize(
    ("channel", "device"),
    [
        ("vhost-user-vsock", "vhost-user-vsock-pci"),
        ("virtio-serial", "virtserialport"),
        pytest.param(
            "vhost-vsock",
            "vhost-vsock-pci",
            marks=pytest.mark.skipif(not Path("/dev/vhost-vsock").exists(), reason="not in this kernel"),
        ),
    ],
)
def test_a_container_lives_over_the_channel_that_is_configured(
    one_stack: Stack, channel: str, device: str
) -> None:
    containerd = one_stack.containerd
    name = new_id()
    with configured(one_stack, hypervisor=f'channel = "{channel}"'):
        started = containerd.run(IMAGE, name, "sleep", "1000", options=["--detach"])
    try:
        assert started.code == 0, started.stderr
        [qemu] = [
            process.command
            for process in containerd.nursery.descendants()
            if "qemu-system" in process.command and name in process.command
        ]
        assert device in qemu
        assert converse(containerd.ctr_argv("task", "exec", "--exec-id", "input", name, "cat")) == 0
        result = containerd.exec(name, "channel", "sh", "-c", "echo err >&2; exit 3")
        assert (result.code, result.stderr.splitlines()[0]) == (3, "err")
        assert len(containerd.exec(name, "much", "head", "-c", "300000", "/dev/zero").stdout) == 300000
    finally:
        containerd.remove(name)
