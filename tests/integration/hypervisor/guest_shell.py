"""A guest with only a shell on the agent's port: it shows how the guest's kernel handles a device."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from guest.image import cpio
from tests.patience import patient

if TYPE_CHECKING:
    import socket

PARAMETERS = ("rdinit=/shell/init",)

INIT = b"""#!/shell/busybox sh
exec </dev/kmsg >/dev/kmsg 2>&1
export PATH=/shell
/shell/busybox --install -s /shell
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read name needs; do insmod /lib/modules/$name.ko 2>/dev/null; done </lib/modules/depends
until port=$(grep -l hako.agent /sys/class/virtio-ports/*/name 2>/dev/null); do usleep 20000; done
port=/dev/$(basename $(dirname $port))
if grep -q hako.template /proc/cmdline; then
    dd if=/dev/urandom of=/junk bs=1M count=64; rm /junk
    echo '<3>hako-agent: serving'
fi
while true; do sh <>$port >&0 2>&1; done
"""
END = b"<end of command>"


def initrd(image: Path) -> bytes:
    """Put the shell over an image: the kernel unpacks archives one over the other."""
    busybox = Path("/usr/bin/busybox").read_bytes()
    entries = [
        cpio.regular("/shell/busybox", busybox, mode=0o755),
        cpio.regular("/shell/init", INIT, mode=0o755),
    ]
    return (image / "initrd").read_bytes() + cpio.archive(entries)


class GuestShell:
    """One command after the other.

    :param connection: the agent's port.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = asyncio.Lock()

    async def __call__(self, command: str, *, timeout_s: float = patient(120)) -> str:
        """Run a command; return its output."""
        loop = asyncio.get_running_loop()
        async with self._lock, asyncio.timeout(timeout_s):
            await loop.sock_sendall(self._connection, command.encode() + b"\necho '" + END + b"'\n")
            output = b""
            while not output.endswith(END + b"\n"):
                part = await loop.sock_recv(self._connection, 65536)
                assert part, f"the guest ended after {output!r}"
                output += part
        return output.removesuffix(END + b"\n").decode().strip()

    async def until(self, condition: str) -> None:
        """Wait in the guest until a shell's condition holds."""
        await self(f"until {condition}; do usleep 5000; done")

    def close(self) -> None:
        self._connection.close()
