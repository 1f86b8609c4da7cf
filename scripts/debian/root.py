"""Make the root directories of Debian hosts, in which the package is installed and tested.

``debootstrap`` unpacks and verifies Debian's packages; it is fetched as a package itself and not installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from scripts import fetch_package

if TYPE_CHECKING:
    from pathlib import Path

SUITES = ("bookworm", "trixie")
"""Debian 12 and 13."""
_PROGRAM_SUITE = "trixie"
_PROGRAM = fetch_package.CACHE / "debootstrap"
_STAMP = "etc/hako-root"
#: What a node has before Hako comes, and what Hako's package needs: it is installed without a network.
_PACKAGES = (
    *("busybox-static", "ca-certificates", "containerd", "iproute2", "python3", "qemu-system-x86", "runc"),
    "util-linux",
)
#: QEMU's own package has it in Debian 12.
_MORE = {"bookworm": (), "trixie": ("virtiofsd",)}


def make(suite: str) -> Path:
    """Make the root of a suite, unless it is there.

    :param suite: one of :data:`SUITES`.
    :returns: its directory, which is not to be changed.
    :raises RuntimeError: if no mirror is configured.
    :raises subprocess.CalledProcessError: if apt or debootstrap fails; its message is on standard error.
    """
    root = fetch_package.CACHE / f"root-{suite}"
    packages = [*_PACKAGES, *_MORE[suite]]
    stamp = hashlib.sha256(" ".join(packages).encode()).hexdigest()
    if (root / _STAMP).exists() and (root / _STAMP).read_text(encoding="ascii") == stamp:
        return root
    fetch_package.fetch("debootstrap", suite=_PROGRAM_SUITE, directory=_PROGRAM, with_dependencies=False)
    new = root.with_name(f".{root.name}.{os.getpid()}")
    try:
        subprocess.run(
            [
                _PROGRAM / "usr/sbin/debootstrap",
                "--variant=minbase",
                f"--keyring={fetch_package.KEYRING}",
                f"--include={','.join(packages)}",
                suite,
                new,
                fetch_package.debian_mirror(),
            ],
            env={**os.environ, "DEBOOTSTRAP_DIR": str(_PROGRAM / "usr/share/debootstrap")},
            check=True,
            stdout=sys.stderr,
        )
        for archive in (new / "var/cache/apt/archives").glob("*.deb"):
            archive.unlink()
        (new / _STAMP).write_text(stamp, encoding="ascii")
        shutil.rmtree(root, ignore_errors=True)
        new.rename(root)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return root


def main() -> int:
    """Run ``python -m scripts.debian.root SUITE...``."""
    parser = argparse.ArgumentParser(prog="scripts.debian.root", description=__doc__)
    parser.add_argument("suites", nargs="+", choices=SUITES, metavar="SUITE")
    try:
        for suite in parser.parse_args().suites:
            print(make(suite))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"root: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
