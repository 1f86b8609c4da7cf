"""Copies a template's memory into a clone's. It is also a program, so that the clone's cgroup is charged.

    memory_copy.py SOURCE TARGET BYTES

SOURCE and TARGET are descriptors; BYTES is how much data SOURCE must have. Without site packages, the
program starts in a hundredth of a second.
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

    :param source: the file to copy from.
    :param target: the file to copy to, of the same length.
    :returns: how many bytes were copied.
    :raises OSError: if it fails, for example because memory runs out.
    """
    copied = 0
    for begin, end in data_ranges(source):
        os.lseek(target, begin, os.SEEK_SET)
        offset = begin
        while offset < end:
            # The kernel copies directly from page to page, without mapping or clearing pages first.
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
