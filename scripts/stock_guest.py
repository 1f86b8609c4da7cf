"""Make an initramfs with a stock Kata agent: ``python -m scripts.stock_guest AGENT OUTPUT``.

The agent must be a static program. The kernel's modules are those of Hako's own initramfs; all are loaded.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from pathlib import Path

from guest.image import cpio
from shim.config import GuestConfig

BUSYBOX = Path("/usr/bin/busybox")
DIRECTORIES = ("/proc", "/sys", "/run", "/mnt", "/root", "/var", "/sbin")
_HEADER, _FIELD, _MODE_AND_OTHERS = 110, 8, 13


def read_archive(data: bytes) -> dict[str, bytes]:
    """Read the files of a newc archive, by path without a leading slash.

    :param data: the archive.
    """
    files: dict[str, bytes] = {}
    at = 0
    while True:
        starts = range(at + 6, at + 6 + _FIELD * _MODE_AND_OTHERS, _FIELD)
        fields = [int(data[start : start + _FIELD], 16) for start in starts]
        size, name_size = fields[6], fields[11]
        name = data[at + _HEADER : at + _HEADER + name_size - 1].decode()
        at = _aligned(at + _HEADER + name_size)
        if name == "TRAILER!!!":
            return files
        files[name] = data[at : at + size]
        at = _aligned(at + size)


def archive(agent: bytes, own: dict[str, bytes]) -> bytes:
    """Write the initramfs.

    :param agent: the agent's program.
    :param own: the files of Hako's initramfs.
    """
    depends = next(name for name in own if name.endswith("modules/depends"))
    order = [line.split()[0] for line in own[depends].decode().splitlines()]
    loading = "".join(f"insmod /modules/{name}\n" for name in order)
    entries = [
        cpio.regular("/init", f"#!/bin/sh\n{loading}exec /usr/bin/kata-agent\n".encode(), mode=0o755),
        cpio.regular("/usr/bin/kata-agent", agent, mode=0o755),
        cpio.regular("/bin/busybox", BUSYBOX.read_bytes(), mode=0o755),
        *(cpio.symlink(f"/bin/{name}", "busybox") for name in ("sh", "insmod")),
        *(cpio.directory(path) for path in DIRECTORIES),
        cpio.directory("/tmp", mode=0o1777),  # noqa: S108 - the guest's
        *(cpio.regular(f"/etc/{name}", b"") for name in ("resolv.conf", "passwd", "group")),
        *(cpio.regular(f"/etc/{name}", b"localhost\n") for name in ("hostname", "hosts")),
        cpio.character_device("/dev/console", 5, 1),
        cpio.character_device("/dev/null", 1, 3, mode=0o666),
        cpio.character_device("/dev/urandom", 1, 9, mode=0o666),
    ]
    for name in order:
        path = f"{depends.removesuffix('depends')}{name}.ko"
        module = own.get(path) or zlib.decompress(own[f"{path}.z"])
        entries.append(cpio.regular(f"/modules/{name}", module))
    return cpio.archive(entries)


def _aligned(offset: int) -> int:
    return (offset + 3) & ~3


def main() -> int:
    """Run ``python -m scripts.stock_guest AGENT OUTPUT``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("agent", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    own = read_archive(Path(GuestConfig().initrd).read_bytes())
    arguments.output.write_bytes(archive(arguments.agent.read_bytes(), own))
    return 0


if __name__ == "__main__":
    sys.exit(main())
