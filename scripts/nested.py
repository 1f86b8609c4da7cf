"""Prove the kernel vhost-vsock channel where it is missing: run Hako inside an outer machine.

The outer machine boots the guest image's kernel with the modules that a host needs. Its root is this
machine's, shared read-only by virtio-fs below an overlay in memory, so everything set up here is there too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from guest.image import cpio, packages
from guest.image.kernel import load_modules
from tests.e2e import busybox
from tests.e2e.containerd import RELEASES, Containerd, converse, running
from tests.e2e.nursery import Nursery

GUEST_IMAGE = Path("/var/lib/hako/guest")
PACKAGE_CACHE = Path("/var/cache/hako")
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
MODULES = (
    *("virtio_pci", "virtiofs", "overlay", "virtio_rng"),
    *("vhost_vsock", "vhost_net", "tun", "veth", "bridge", "loop"),
)
TIMEOUT_S = 900.0
INNER_TIMEOUT_S = 400.0
LINES = 20_000
PASSED = "nested: passed"
INIT = """#!/bin/busybox sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
/bin/busybox mount -t proc proc /proc
for module in /modules/*; do /bin/busybox insmod $module || echo "nested: $module failed"; done
/bin/busybox mount -t virtiofs -o ro root /lower
/bin/busybox mount -t tmpfs tmpfs /upper
/bin/busybox mkdir /upper/files /upper/work
/bin/busybox mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /root
cd /root
/bin/busybox mount -t proc proc proc
/bin/busybox mount -t sysfs sysfs sys
/bin/busybox mount -t cgroup2 cgroup2 sys/fs/cgroup
/bin/busybox mount -t devtmpfs devtmpfs dev
/bin/busybox mkdir -p dev/pts dev/shm
/bin/busybox mount -t devpts devpts dev/pts
for directory in dev/shm run tmp; do /bin/busybox mount -t tmpfs tmpfs $directory; done
/bin/busybox chroot /root /bin/sh -c "cd '{tree}' && '{python}' -m scripts.nested inside"
/bin/busybox poweroff -f
"""


def main() -> int:
    """Run the outer machine, or, with the argument ``inside``, what runs in it."""
    return _inside() if sys.argv[1:] == ["inside"] else _outside()


def _outside() -> int:
    with tempfile.TemporaryDirectory(prefix="hako-nested-") as directory:
        home = Path(directory)
        initrd = home / "initrd"
        initrd.write_bytes(_initrd(home))
        share = home / "root.sock"
        daemon_argv = [VIRTIOFSD, f"--socket-path={share}", "-o", "source=/,cache=auto,xattr,sandbox=chroot"]
        with subprocess.Popen(daemon_argv, stderr=subprocess.DEVNULL) as daemon:
            try:
                while not share.exists() and daemon.poll() is None:
                    time.sleep(0.02)
                return _watch(_qemu_argv(initrd, share))
            finally:
                daemon.terminate()


def _initrd(home: Path) -> bytes:
    found = packages.resolve((packages.kernel_package(),))
    images = tuple(package for package in found if package.name.startswith("linux-image-"))
    packages.fetch(images, cache=PACKAGE_CACHE)
    packages.unpack(images, cache=PACKAGE_CACHE, staging=home / "kernel")
    [tree] = (home / "kernel/usr/lib/modules").iterdir()
    init = INIT.format(tree=Path(__file__).resolve().parent.parent, python=sys.executable)
    return cpio.archive(
        [
            *(cpio.directory(f"/{name}") for name in ("proc", "lower", "upper", "root")),
            cpio.character_device("/dev/console", 5, 1),
            cpio.regular("/bin/busybox", busybox.BUSYBOX.read_bytes(), mode=0o755),
            cpio.regular("/init", init.encode(), mode=0o755),
            *(
                cpio.regular(f"/modules/{number:02}-{module.name}.ko", module.data)
                for number, module in enumerate(load_modules(tree, MODULES))
            ),
        ]
    )


def _qemu_argv(initrd: Path, share: Path) -> list[str]:
    return [
        *("/usr/bin/qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "q35,memory-backend=memory", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "3G"),
        *("-object", "memory-backend-memfd,id=memory,size=3G,share=on"),
        *("-kernel", str(GUEST_IMAGE / "vmlinux"), "-initrd", str(initrd)),
        *("-append", "console=ttyS0 quiet panic=-1", "-serial", "stdio"),
        *("-chardev", f"socket,id=share,path={share}"),
        *("-device", "vhost-user-fs-pci,chardev=share,tag=root", "-device", "virtio-rng-pci"),
    ]


def _watch(argv: list[str]) -> int:
    """Show the outer machine's console until it ends.

    :returns: 0 if what ran inside passed, else 1.
    """
    began_s = time.monotonic()
    passed = False
    with subprocess.Popen(
        ["/usr/bin/timeout", "--signal=KILL", f"{TIMEOUT_S:.0f}", *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as machine:
        assert machine.stdout is not None  # noqa: S101 - it was asked for above
        for line in machine.stdout:
            print(f"[{time.monotonic() - began_s:6.1f} s] {line.rstrip()}", flush=True)
            passed |= line.strip() == PASSED
    print("PASSED" if passed else "FAILED", f"in {time.monotonic() - began_s:.0f} s")
    return 0 if passed else 1


def _inside() -> int:
    print(f"nested: outer machine is up, kernel {os.uname().release}", flush=True)
    if not Path("/dev/vhost-vsock").exists():
        print("nested: /dev/vhost-vsock is missing", flush=True)
        return 1
    with tempfile.TemporaryDirectory(prefix="hako-") as directory, Nursery() as nursery:
        home = Path(directory)
        config = home / "config.toml"
        config.write_text(
            '[hypervisor]\nchannel = "vhost-vsock"\naccelerator = "tcg"\ntemplate = "off"\n'
            f"[guest]\nboot_timeout_s = {INNER_TIMEOUT_S:.0f}\n"
            f'[shim]\nlog_level = "debug"\nstate_dir = "{home}/hako"\n',
            encoding="utf-8",
        )
        daemon = Containerd(
            release=RELEASES[-1],
            home=home / "containerd",
            nursery=nursery,
            environment={"HAKO_CONFIG": str(config)},
            runtime="io.containerd.hako.v2",
        )
        with running(daemon):
            try:
                _life(daemon, home)
            finally:
                print(daemon.log.read_text(encoding="utf-8"), flush=True)
    print(PASSED, flush=True)
    return 0


def _life(daemon: Containerd, home: Path) -> None:
    """Run a container, talk to an exec in it, kill and delete it.

    :raises RuntimeError: if a step answers otherwise than it should.
    """
    archive = home / "busybox.tar"
    busybox.write_image(archive)
    daemon.ctr("images", "import", archive, timeout_s=INNER_TIMEOUT_S)
    print("nested: containerd is up, the image is imported", flush=True)
    name = "hako-nested"
    started = daemon.run(
        busybox.IMAGE, name, "sleep", "100000", options=["--detach"], timeout_s=INNER_TIMEOUT_S
    )
    if started.code != 0:
        raise RuntimeError(f"nested: run: {started.stderr}")
    print("nested: the container runs", flush=True)
    devices = [
        process.command for process in daemon.nursery.descendants() if "vhost-vsock-pci" in process.command
    ]
    if len(devices) != 1:
        raise RuntimeError("nested: no QEMU with a vhost-vsock device")
    result = daemon.ctr(
        *("task", "exec", "--exec-id", "code", name, "sh", "-c", "uname -r; echo error >&2; exit 42"),
        timeout_s=INNER_TIMEOUT_S,
    )
    print(f"nested: exec answered {result}", flush=True)
    if result.code != 42 or not result.stderr.startswith("error\n"):
        raise RuntimeError(f"nested: exec: {result}")
    counted = daemon.ctr(
        *("task", "exec", "--exec-id", "count", name, "seq", "1", f"{LINES}"), timeout_s=INNER_TIMEOUT_S
    )
    if counted.stdout.split() != [str(number + 1) for number in range(LINES)]:
        raise RuntimeError(f"nested: {len(counted.stdout)} bytes of output are not what was written")
    if "stdio: raw streams" not in daemon.log.read_text(encoding="utf-8"):
        raise RuntimeError("nested: the streams were not raw ones")
    echoed = converse(
        daemon.ctr_argv("task", "exec", "--exec-id", "echo", name, "cat"), timeout_s=INNER_TIMEOUT_S
    )
    if echoed != 0:
        raise RuntimeError(f"nested: echo: exit code {echoed}")
    daemon.ctr("task", "kill", "--signal", "9", name, timeout_s=INNER_TIMEOUT_S)
    daemon.wait_for_state(name, "STOPPED", timeout_s=INNER_TIMEOUT_S)
    deleted = daemon.ctr("task", "delete", name, timeout_s=INNER_TIMEOUT_S)
    if "137" not in deleted.stderr:
        raise RuntimeError(f"nested: delete: {deleted}")
    daemon.ctr("container", "delete", name)


if __name__ == "__main__":
    sys.exit(main())
