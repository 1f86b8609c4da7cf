"""Debian 13's programs on Debian 12: a guest image of its packages, QEMU 10, and virtiofsd in Rust."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from scripts import fetch_package

if TYPE_CHECKING:
    from collections.abc import Mapping

SUITE = "trixie"
_LIBRARY = Path("/var/lib/hako")
GUEST_IMAGE = _LIBRARY / "guest-13"
_QEMU = _LIBRARY / "bin/qemu-10"
_DAEMON_FILES, _DAEMON = fetch_package.CACHE / "virtiofsd-13", _LIBRARY / "bin/virtiofsd-13"
_PACKAGES = fetch_package.CACHE / "packages-13"

# It needs a newer C library than the system may have, so it is started with its own.
_WRAPPER = f"""#!/bin/sh
exec {_DAEMON_FILES}/usr/lib64/ld-linux-x86-64.so.2 --library-path {_DAEMON_FILES}/usr/lib/x86_64-linux-gnu \\
    {_DAEMON_FILES}/usr/libexec/virtiofsd "$@"
"""


def prepare() -> Mapping[Path, Path]:
    """Fetch and build the newer programs.

    :returns: the replacement of each path.
    :raises RuntimeError: if no mirror is configured.
    :raises subprocess.CalledProcessError: if apt or the builder fails; its message is on standard error.
    """
    fetch_package.fetch("virtiofsd", suite=SUITE, directory=_DAEMON_FILES, with_dependencies=True)
    _DAEMON.write_text(_WRAPPER, encoding="utf-8")
    _DAEMON.chmod(0o755)
    # The builder takes packages from the suites that apt knows; here, only from the newer one.
    words = [option for option in fetch_package.apt_options(SUITE) if option != "-o"]
    settings = (option.split("=", 1) for option in words)
    configuration = fetch_package.CACHE / "apt" / f"{SUITE}.conf"
    configuration.write_text("".join(f'{key} "{value}";\n' for key, value in settings), encoding="utf-8")
    _PACKAGES.mkdir(exist_ok=True)
    hako = Path(sys.executable).with_name("hako")
    subprocess.run(
        [hako, "image", "build", "--output", GUEST_IMAGE, "--cache", _PACKAGES],
        env={**os.environ, "APT_CONFIG": str(configuration)},
        check=True,
    )
    return {
        _LIBRARY / "guest": GUEST_IMAGE,
        Path("/usr/bin/qemu-system-x86_64"): _QEMU,
        Path("/usr/lib/qemu/virtiofsd"): _DAEMON,
    }
