"""A file system whose server never answers."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NOSUID_NODEV, _DETACH = 6, 2
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def hung_at(place: Path) -> Iterator[Path]:
    """Mount one for a block; who touches it waits until the block ends.

    :param place: an empty directory.
    :returns: the path of a file in it.
    """
    server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
        if _libc.mount(b"hung", os.fsencode(place), b"fuse", _NOSUID_NODEV, options) != 0:
            raise OSError(ctypes.get_errno(), "mount")
        yield place / "file"
    finally:
        os.close(server)  # now each request fails
        _libc.umount2(os.fsencode(place), _DETACH)
