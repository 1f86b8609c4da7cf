"""Which Hako this is."""

from __future__ import annotations

import functools
from importlib import metadata


@functools.cache
def version() -> str:
    """Return the version of the installed distribution, or say that this is a bare source tree.

    A process that asks once goes on to tell its own version after another one was installed.
    """
    try:
        return metadata.version("containerd-shim-hako")
    except metadata.PackageNotFoundError:
        return "0+source"
