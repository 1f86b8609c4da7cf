"""The lines for Docker's configuration, which is a single file without a place for drop-ins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

CONFIGURATION = Path("/etc/docker/daemon.json")
_TYPE = "io.containerd.hako.v2"
_ENTRY = '"hako": {"runtimeType": "io.containerd.hako.v2"}'


def missing(path: Path = CONFIGURATION) -> str:
    """Describe what to add to Docker's configuration.

    :param path: the file.
    :returns: one line; empty if there is no Docker, or it knows Hako.
    """
    if shutil.which("dockerd") is None and not path.exists():
        return ""
    try:
        document = _read(path)
    except (OSError, ValueError) as error:
        return f"Docker is not told: {path}: {error}; correct it"
    if _handlers(document):
        return ""
    if not path.exists():
        what = f'make {path} of the line `{{"runtimes": {{{_ENTRY}}}}}`'
    elif isinstance(document.get("runtimes"), dict):
        what = f"put `{_ENTRY}` into `runtimes` of {path}"
    else:
        what = f'put `"runtimes": {{{_ENTRY}}}` into {path}'
    return f"Docker takes no other file: {what}, then systemctl reload docker"


def left(path: Path = CONFIGURATION) -> str:
    """Describe the parts of Docker's configuration that name Hako.

    :param path: the file.
    :returns: one line; empty if it has nothing.
    """
    try:
        names = _handlers(_read(path))
    except (OSError, ValueError):
        return ""
    return f"left: {path} names Hako as {', '.join(names)}; take it out there" if names else ""


def _read(path: Path) -> dict[str, Any]:
    """Read the file, which need not exist.

    :raises ValueError: if Docker would refuse it.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - the fault is in the file
    return document


def _handlers(document: dict[str, Any]) -> list[str]:
    runtimes = document.get("runtimes")
    if not isinstance(runtimes, dict):
        return []
    return [
        name for name, each in runtimes.items() if isinstance(each, dict) and each.get("runtimeType") == _TYPE
    ]
