"""``hako install``: the configuration with which a node's containerd offers Hako to Kubernetes."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

from shim.refusal import Refusal

if TYPE_CHECKING:
    import argparse
    from typing import Any

_VERSION_TIMEOUT_S = 10.0

_FIRST = """\
# containerd {version}: append this to /etc/containerd/config.toml. As an imported file it would
# replace all that is said of the plugin there.
# containerd must find containerd-shim-hako-v2 in its PATH.
version = 2

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.hako]
runtime_type = "io.containerd.hako.v2"
# The devices of the host are not in the machine.
privileged_without_host_devices = true
# What a pod may ask of Hako.
pod_annotations = ["io.hako.*", "io.katacontainers.*"]
"""

_SECOND = """\
# containerd {version}: put this into /etc/containerd/conf.d/hako.toml, and make sure that
# /etc/containerd/config.toml says: imports = ["/etc/containerd/conf.d/*.toml"]
# containerd must find containerd-shim-hako-v2 in its PATH.
version = 3

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.hako]
runtime_type = "io.containerd.hako.v2"
# The devices of the host are not in the machine.
privileged_without_host_devices = true
# What a pod may ask of Hako.
pod_annotations = ["io.hako.*", "io.katacontainers.*"]
# "shim" makes pods without a pause container; "podsandbox" is what every containerd does.
sandboxer = "podsandbox"
"""


def add_to(commands: Any) -> None:
    """Offer the command.

    :param commands: what ``add_subparsers`` returned.
    """
    parser = commands.add_parser("install", help="say what containerd must be told to offer Hako")
    parser.add_argument(
        "--print", action="store_true", required=True, help="print it: files are left to the operator"
    )
    parser.add_argument(
        "--containerd", default="containerd", metavar="PROGRAM", help="another than the one in PATH"
    )


def run(chosen: argparse.Namespace) -> int:
    """Print it.

    :param chosen: the command line.
    :returns: the exit status.
    :raises Refusal: if there is no such containerd, or Hako does not work with it.
    """
    print(drop_in(found_version(chosen.containerd)), end="")
    return 0


def drop_in(version: str) -> str:
    """Write the configuration for a containerd.

    :param version: its version, such as ``1.7.24``.
    :returns: TOML with comments that say where it goes.
    :raises Refusal: if Hako does not work with it.
    """
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    if not (major.isdigit() and minor.isdigit()) or (int(major), int(minor)) < (1, 6):
        raise Refusal(f"install: containerd {version}: not supported; install containerd 1.6 or later")
    return (_FIRST if int(major) == 1 else _SECOND).format(version=version)


def found_version(program: str) -> str:
    """Ask a containerd for its version.

    :param program: its name or path.
    :raises Refusal: if it is not there or does not tell.
    """
    path = shutil.which(program)
    if path is None:
        raise Refusal(f"install: {program}: not found; install containerd, or name its program")
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_VERSION_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Refusal(f"install: {path} --version: {error}; reinstall containerd") from error
    # "containerd <Go module> <version> <revision>"
    words = done.stdout.split()
    return words[2].removeprefix("v") if len(words) > 2 else "of unknown version"
