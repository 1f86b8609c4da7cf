"""A file that one side rewrites and lengthens, each time with one write, while the other reads it.

As a program, it reads the file of the first argument for the seconds of the second, or until it has read a
mixture of versions, and prints how many reads were of one version and how many of a mixture.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

READ_BYTES = 1 << 16
PAUSE_S = 0.01


def version(number: int) -> bytes:
    """Return the content of a version: each is longer than the one before."""
    return bytes([ord("a") + number % 26]) * (number + 1)


def rewrite(path: str, *, pause_s: float, is_over: Callable[[], bool]) -> bytes:
    """Write versions until that is over, at least one, and return the last one."""
    number = 0
    opened = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    while number == 0 or not is_over():
        os.pwrite(opened, version(number), 0)
        number += 1
        time.sleep(pause_s)
    os.close(opened)
    return version(number - 1)


def read(path: str) -> bytes:
    """Read the file anew."""
    opened = os.open(path, os.O_RDONLY)
    content = os.read(opened, READ_BYTES)
    os.close(opened)
    return content


def main(path: str, seconds: float) -> None:
    """Count reads of one version and mixtures."""
    whole = mixed = 0
    end = time.monotonic() + seconds
    while not mixed and time.monotonic() < end:
        content = read(path)
        if content == version(len(content) - 1):
            whole += 1
        else:
            mixed += 1
        time.sleep(PAUSE_S)
    print(whole, mixed)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
