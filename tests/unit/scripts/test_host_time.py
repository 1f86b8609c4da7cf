"""Processor time is attributed to roles."""

from __future__ import annotations

import pytest

from scripts.benchmarks.host_time import GUEST, role

QEMU = "/usr/bin/qemu-system-x86_64 -name box"


@pytest.mark.parametrize(
    ("command", "thread", "expected"),
    [
        (QEMU, "CPU 0/KVM", GUEST),
        ("", "CPU 1/TCG", GUEST),
        (QEMU, "qemu-system-x86", "QEMU's main thread"),
        (QEMU, "call_rcu", "QEMU's other threads"),
        ("", "vhost-1234", "QEMU's other threads"),
        ("python -I -S /x/hypervisor/memory_copy.py 3 4", "python", "copier"),
        ("/usr/lib/qemu/virtiofsd --fd=3", "virtiofsd", "virtio-fs daemon"),
        ("", "vring_worker", "vsock daemon"),
        ("python /x/containerd-shim-hako-v2 -id a -state /run/hako/a", "python", "shim"),
        ("python /x/containerd-shim-hako-v2 -id a -address b start", "python", "start and delete"),
        ("", "containerd-shim", "start and delete"),
        ("/usr/bin/containerd --config a", "containerd", "containerd"),
        ("/usr/bin/ctr run a", "ctr", "ctr"),
        ("", "runc:[2:INIT]", "runc"),
        ("", "echo", "others"),
    ],
)
def test_each_thread_has_a_role(command: str, thread: str, expected: str) -> None:
    assert role(command, thread) == expected
