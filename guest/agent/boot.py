"""The first steps of process 1, before it serves: root, mounts, modules, console, loopback."""

from __future__ import annotations

import _socket
import fcntl
import os
import struct

from guest.agent import files, kernel, limits, modules, timeline
from guest.agent.kernel import MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RELATIME

_MOUNTS = (
    # Kata's agent mounts the same set (reference, section 3.1).
    ("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, ""),
    ("dev", "/dev", "devtmpfs", MS_NOSUID, ""),
    ("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, ""),  # noqa: S108  the guest's own
    ("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "ptmxmode=0666"),
    ("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755"),
    (
        "cgroup2",
        "/sys/fs/cgroup",
        "cgroup2",
        MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RELATIME,
        "nsdelegate,memory_recursiveprot",
    ),
)
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def prepare() -> None:
    """Bring the machine up to the point where containers can run.

    :raises OSError: if a mount or module fails that the agent needs.
    """
    _move_root()
    for source, target, fstype, flags, data in _MOUNTS:
        files.make_directories(target)
        kernel.mount(source, target, fstype=fstype, flags=flags, data=data)
    _fill_standard_descriptors()
    timeline.lap("mounts")
    modules.load_boot()
    timeline.lap("modules")
    _enable_controllers()
    limits.prepare()
    files.write("/proc/sys/kernel/printk_devkmsg", "on\n")
    os.unlink("/dev/ptmx")
    os.symlink("pts/ptmx", "/dev/ptmx")
    os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
    _raise_loopback()


def _move_root() -> None:
    """Put a bind mount of the root over the root.

    The initramfs is the root of the mount tree itself, which pivot_root(2) refuses to leave; a mount on
    top of it can be left, so containers get a real pivot_root instead of a chroot.
    """
    kernel.mount("/", "/mnt", flags=kernel.MS_BIND)
    os.chdir("/mnt")
    kernel.mount(".", "/", flags=kernel.MS_MOVE)
    os.chroot(".")
    os.chdir("/")


def _fill_standard_descriptors() -> None:
    """Occupy descriptors 0 to 2, which process 1 lacks when the console's driver is a module."""
    while (fd := os.open("/dev/null", os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def _enable_controllers() -> None:
    controllers = files.read("/sys/fs/cgroup/cgroup.controllers").split()
    files.write("/sys/fs/cgroup/cgroup.subtree_control", " ".join(f"+{name}" for name in controllers))


def _raise_loopback() -> None:
    channel = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    request = struct.pack("16sH14x", b"lo", 0)
    flags = struct.unpack("16sH14x", fcntl.ioctl(channel.fileno(), _SIOCGIFFLAGS, request))[1]
    fcntl.ioctl(channel.fileno(), _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))
    channel.close()
