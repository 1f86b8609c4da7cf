"""Which Hako this is."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """Return the version of the installed distribution, or say that this is a bare source tree."""
    try:
        return metadata.version("containerd-shim-hako")
    except metadata.PackageNotFoundError:
        return "0+source"
