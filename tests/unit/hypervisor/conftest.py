"""A virtual machine's specification for tests that start none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hypervisor import Accelerator, Channel, VmSpec


@pytest.fixture
def make_spec(tmp_path):
    def make(**changes: Any) -> VmSpec:
        values: dict[str, Any] = {
            "name": "sandbox-1",
            "directory": tmp_path,
            "qemu": Path("/usr/bin/qemu-system-x86_64"),
            "machine_options": "",
            "kernel": Path("/guest/vmlinux"),
            "initrd": Path("/guest/initrd"),
            "kernel_parameters": (),
            "accelerator": Accelerator.TCG,
            "vcpus": 1,
            "max_vcpus": 4,
            "memory_bytes": 512 << 20,
            "max_memory_bytes": 4 << 30,
            "share_source": tmp_path / "share",
            "virtiofsd": Path("/usr/libexec/virtiofsd"),
            "channel": Channel.VIRTIO_SERIAL,
            "vsock_daemon": None,
            "network_namespace": None,
        }
        return VmSpec(**{**values, **changes})

    return make
