"""A bundle's ``config.json``, decoded once in each process.

A shim needs it three times in its first milliseconds: to find the sandbox of a container, to boot the
machine, and to create the container. A specification may be a megabyte long.
"""

from __future__ import annotations

import json
import os

from shim.host import named_files

_NAME = "config.json"
_last: tuple[str, tuple[int, ...], object] = ("", (), None)


def path_in(bundle: str) -> str:
    """Name the file.

    :param bundle: the bundle directory.
    """
    return os.path.join(bundle, _NAME)


def read(bundle: str) -> object:
    """Decode the file, unless it was the last decoded file and has not changed since.

    :param bundle: the bundle directory.
    :returns: the decoded file; do not change it, because other callers may have the same object.
    :raises OSError: if it cannot be read, or is not a regular file.
    :raises ValueError: if it is not JSON.
    :raises RecursionError: if it is nested too deeply.
    """
    global _last  # noqa: PLW0603 - one cache for the whole process
    path = path_in(bundle)
    state = _state_of(path)
    if _last[:2] != (path, state):
        _last = (path, state, json.loads(named_files.read_regular(path)))
    return _last[2]


def _state_of(path: str) -> tuple[int, ...]:
    """Return a value that changes whenever the file is written or replaced."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
