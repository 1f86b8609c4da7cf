"""Copying a template's memory into a clone's. Also a program of its own, so that the clone's cgroup pays.

    memory_copy.py SOURCE TARGET BYTES

Both are descriptors; BYTES is how much data there must be. Run without site packages, this starts in a
hundredth of a second.
"""

from __future__ import annotations

import errno
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


def data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """List where a sparse file has data.

    :param fd: the file.
    :returns: offset and end of each range, in bytes.
    :raises OSError: if the file cannot be read.
    """
    end = 0
    while True:
        try:
            begin = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # no data after this
                raise
            return
        end = os.lseek(fd, begin, os.SEEK_HOLE)
        yield begin, end


def copy(source: int, target: int) -> int:
    """Copy a sparse file's data to the same places of another.

    :param source: the one.
    :param target: the other, of the same length.
    :returns: how many bytes were copied.
    :raises OSError: if it fails, for example for want of memory.
    """
    copied = 0
    for begin, end in data_ranges(source):
        os.lseek(target, begin, os.SEEK_SET)
        offset = begin
        while offset < end:
            # In the kernel, from page to page: nothing is mapped, and no page is cleared first.
            count = os.sendfile(target, source, offset, end - offset)
            if not count:
                return copied
            offset += count
            copied += count
    return copied


if __name__ == "__main__":
    wanted = int(sys.argv[3])
    done = copy(int(sys.argv[1]), int(sys.argv[2]))
    if done < wanted:
        sys.exit(f"{done} bytes of data instead of {wanted}")
