"""Limits of the host's kernel that its administrator has raised; containers in a machine get them, too.

Under another runtime, they apply to every container. Only limits that do not depend on the host's size are
passed on; the guest's kernel derives the others from its own size.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

from proto.extensions import AT_LEAST_ANNOTATION

_CAP_SYS_RESOURCE = 24  # linux/capability.h
_ROOT = Path("/proc/sys")
# With Linux's defaults since 5.10.
_DEFAULTS = {
    "fs.aio-max-nr": 1 << 16,
    "fs.inotify.max_queued_events": 1 << 14,
    "fs.inotify.max_user_instances": 128,
    "fs.nr_open": 1 << 20,
    "fs.pipe-max-size": 1 << 20,
    "fs.pipe-user-pages-soft": 1 << 14,
    "kernel.keys.maxbytes": 20_000,
    "kernel.keys.maxkeys": 200,
    "kernel.keys.root_maxbytes": 25_000_000,
    "kernel.keys.root_maxkeys": 1_000_000,
    "kernel.pty.max": 1 << 12,
    "vm.max_map_count": 65_530,
}
# The kernel allows as many as fit into 1 % of the memory, at about this size each. If the limit is twice as
# high or more, an administrator has set it.
_WATCHES = "fs.inotify.max_user_watches"
_WATCH_BYTES = 1344


def most_open_files() -> int:
    """Return how many files a child of this process may open, once it has raised its limit to the maximum."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with Path("/proc/self/status").open(encoding="ascii") as file:
        effective = next(line for line in file if line.startswith("CapEff:"))
    if limit == resource.RLIM_INFINITY or int(effective.split()[1], 16) >> _CAP_SYS_RESOURCE & 1:
        return int((_ROOT / "fs/nr_open").read_text(encoding="ascii"))
    return limit


def most_open_by_all() -> int:
    """Return how many files may be open on this host before only root can open more."""
    return int((_ROOT / "fs/file-max").read_text(encoding="ascii"))


def raised(root: Path = _ROOT) -> dict[str, int]:
    """Read the limits that are higher than the kernel's defaults.

    :param root: the kernel's directory of them.
    :returns: value by name.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    usual = {**_DEFAULTS, _WATCHES: 2 * (memory // 100 // _WATCH_BYTES)}
    found = {name: _read(root / name.replace(".", "/")) for name in usual}
    return {name: value for name, value in found.items() if value > usual[name]}


def announce(spec: dict[str, Any], limits: dict[str, int]) -> dict[str, Any]:
    """Write the host's limits into a container's specification, replacing such annotations of its own.

    :param spec: the decoded ``config.json``.
    :param limits: value by name.
    :raises AttributeError, TypeError: if the specification is malformed.
    """
    annotations = spec.get("annotations") or {}
    own = {key: value for key, value in annotations.items() if not key.startswith(AT_LEAST_ANNOTATION)}
    told = {f"{AT_LEAST_ANNOTATION}{name}": str(value) for name, value in limits.items()}
    return {**spec, "annotations": {**own, **told}}


def _read(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # not in this kernel
        return 0
